#!/usr/bin/env bash
# A warp of FreeSurfer in an .mgz file, written by surfa 0.6.3, the package of FreeSurfer's authors:
#
#   - nibabel 5.4.2 refuses it ("Unknown MGH format version"). FreeSurfer keeps the kind of a file in the upper bytes of
#     the version field, and nibabel compares the whole field with 1.
#   - surfa 0.6.3 itself cannot read it, nor any other .mgz, with NumPy 2.3 and newer, which it installs by default:
#     it reads by the binary mode of numpy.fromstring, which NumPy 2.3 has removed. With NumPy 2.2 it reads its file.
#
# Output seen, with NumPy 2.3.5 and then with 2.2.6:
#   nibabel: HeaderDataError, Unknown MGH format version
#   surfa: ValueError
#   nibabel: HeaderDataError, Unknown MGH format version
#   surfa: (8, 9, 10, 3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
cat > "$folder/case.py" <<'PYTHON'
import sys

import nibabel as nib
import numpy as np
import surfa as sf

path = sys.argv[1]
grid = sf.ImageGeometry((8, 9, 10), voxsize=1)
sf.Warp(np.zeros((8, 9, 10, 3), np.float32), grid, grid).save(path)
for name, read in (("nibabel", nib.load), ("surfa", sf.load_warp)):
    try:
        print(f"{name}:", read(path).shape)
    except nib.spatialimages.HeaderDataError as error:
        print(f"{name}: {type(error).__name__}, {error}")
    except ValueError as error:
        print(f"{name}: {type(error).__name__}")
PYTHON
for numpy in 2.3.5 2.2.6; do
    "$folder/env/bin/pip" install --quiet surfa==0.6.3 nibabel==5.4.2 numpy==$numpy
    "$folder/env/bin/python" "$folder/case.py" "$folder/warp.mgz" 2> /dev/null
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(nibabel\|surfa\): .*\)/\1/p' "$0")
