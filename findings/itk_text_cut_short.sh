#!/usr/bin/env bash
# SimpleITK 2.5.2 (ITK 5.4) reads a text transform (.tfm, .txt) that is cut short after its parameters, so that the line
# FixedParameters is missing, as the identity. There is no error and no warning, though the parameters are in the file.
#
# So whoever reads such a file should look for both lines of every transform first.
#
# Output seen: the point (10, 0, 0) by the file, and by the file without its last line
#   whole: (1.0, 12.0, 0.0)
#   without FixedParameters: (10.0, 0.0, 0.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet simpleitk==2.5.2
cat > "$folder/case.py" <<'PYTHON'
import sys
from pathlib import Path

import SimpleITK as sitk

path = Path(sys.argv[1])
affine = sitk.AffineTransform(3)
affine.SetMatrix((0, -1, 0, 1, 0, 0, 0, 0, 1))  # a quarter turn about the third axis
affine.SetCenter((1.0, 2.0, 0.0))
affine.SetTranslation((-2.0, 1.0, 0.0))
sitk.WriteTransform(affine, str(path))
whole = path.read_bytes()
short = whole[:whole.index(b"FixedParameters")]
for name, content in (("whole", whole), ("without FixedParameters", short)):
    path.write_bytes(content)
    print(f"{name}:", tuple(round(x, 6) + 0.0 for x in sitk.ReadTransform(str(path)).TransformPoint((10.0, 0, 0))))
PYTHON
"$folder/env/bin/python" "$folder/case.py" "$folder/a.tfm" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(whole\|without\).*\)/\1/p' "$0")
