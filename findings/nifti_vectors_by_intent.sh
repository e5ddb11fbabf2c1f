#!/usr/bin/env bash
# One and the same vector (1, 2, 3) in a NIfTI file of shape (X, Y, Z, 1, 3):
#
#   - SimpleITK 2.5.2 gives (-1, -2, 3) where the intent is 1006, since it takes the file as RAS and turns it to its own
#     LPS, and (1, 2, 3) where the intent is 1007. SimpleITK 2.3.1 gives a scalar image of five axes for intent 1006, which
#     cannot be used as a displacement field.
#   - surfa 0.6.3 takes intent 1006 as millimetres in RAS, and 1007, which is ITK's displacement field in millimetres in
#     LPS, as voxels, without a word.
#
# Output seen:
#   SimpleITK 2.5.2, intent 1006: 3-D, (-1.0, -2.0, 3.0)
#   SimpleITK 2.5.2, intent 1007: 3-D, (1.0, 2.0, 3.0)
#   surfa, intent 1006: disp_ras
#   surfa, intent 1007: disp_crs
#   SimpleITK 2.3.1, intent 1006: 5-D
#   SimpleITK 2.3.1, intent 1007: 3-D, (1.0, 2.0, 3.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet nibabel==5.4.2 numpy==2.2.6 surfa==0.6.3
cat > "$folder/itk.py" <<'PYTHON'
import sys

import nibabel as nib
import numpy as np
import SimpleITK as sitk

for intent in (1006, 1007):
    image = nib.Nifti1Image(np.broadcast_to(np.float32([1, 2, 3]), (8, 9, 10, 1, 3)).copy(), np.eye(4))
    image.header.set_intent(intent)
    path = f"{sys.argv[1]}/{intent}.nii.gz"
    nib.save(image, path)
    read = sitk.ReadImage(path)
    vector = f", {read.GetPixel(0, 0, 0)}" if read.GetDimension() == 3 else ""
    print(f"SimpleITK {sys.argv[2]}, intent {intent}: {read.GetDimension()}-D{vector}")
PYTHON
cat > "$folder/warps.py" <<'PYTHON'
import sys

import surfa as sf

for intent in (1006, 1007):
    form = sf.load_warp(f"{sys.argv[1]}/{intent}.nii.gz").format
    print(f"surfa, intent {intent}:", {1: "disp_crs", 3: "disp_ras"}[form])
PYTHON
{
    "$folder/env/bin/pip" install --quiet simpleitk==2.5.2
    "$folder/env/bin/python" "$folder/itk.py" "$folder" 2.5.2 2> /dev/null
    "$folder/env/bin/python" "$folder/warps.py" "$folder" 2> /dev/null
    "$folder/env/bin/pip" install --quiet simpleitk==2.3.1
    "$folder/env/bin/python" "$folder/itk.py" "$folder" 2.3.1 2> /dev/null
} | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(SimpleITK\|surfa\).*: .*\)/\1/p' "$0" | grep -v '^SimpleITK 2.5.2 gives')
