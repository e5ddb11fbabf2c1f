#!/usr/bin/env bash
# SimpleITK cannot read a file with a CenteredAffineTransform, a type of ITK's which ITK's own Python package, and through
# it uniGradICON, writes: ReadTransform raises, and so does GetNthTransform of a composite that holds one, though ITK has
# read it. SimpleITK turns what was read into an object of the closest type, AffineTransform, whose constructor refuses it.
#
# Output seen, of SimpleITK 2.4.1 and then of 2.5.2:
#   ReadTransform: Transform is not of type AffineTransform!
#   before that step: is linear True, the point (10, 0, 0) goes to (8.0, 8.0, 0.0)
#   ReadTransform: Transform is not of type AffineTransform!
#   before that step: is linear True, the point (10, 0, 0) goes to (8.0, 8.0, 0.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cat > "$folder/case.py" <<'PYTHON'
import sys
from pathlib import Path

import SimpleITK as sitk
from SimpleITK import _SimpleITK

path = sys.argv[1]
# A quarter turn about the third axis and about the centre (1, 0, 0), then a shift by (7, -1, 0).
Path(path).write_text("#Insight Transform File V1.0\n#Transform 0\nTransform: CenteredAffineTransform_double_3_3\n"
                      "Parameters: 0 -1 0 1 0 0 0 0 1 1 0 0 7 -1 0\nFixedParameters: 1 0 0\n")
try:
    sitk.ReadTransform(path)
    print("ReadTransform: read")
except RuntimeError as error:
    print("ReadTransform:", str(error).strip().splitlines()[-1].removeprefix("sitk::ERROR: "))
read = _SimpleITK.ReadTransform(path)
print(f"before that step: is linear {read.IsLinear()}, the point (10, 0, 0) goes to",
      tuple(round(x, 6) + 0.0 for x in read.TransformPoint((10.0, 0.0, 0.0))))
PYTHON
for version in 2.4.1 2.5.2; do
    "$folder/env/bin/pip" install --quiet simpleitk==$version
    "$folder/env/bin/python" "$folder/case.py" "$folder/a.tfm"
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(ReadTransform\|before that step\):.*\)/\1/p' "$0")
