#!/usr/bin/env bash
# dipy 1.12.1, write_mapping of what syn_registration returns: the affine in the header of the file is the inverse of that
# of the static image, on whose grid the field lies: it leads from the world to voxels, and other tools that take it at
# its word place the field elsewhere. And the half that resamples the moving image onto the static one, as
# mapping.transform does, is the second one, which the documentation calls backward, not the first, called forward.
#
# Output seen:
#   affine in the file is that of the static image: False
#   affine in the file is its inverse: True
#   half 0 resamples the moving image as the mapping does: False
#   half 1 resamples the moving image as the mapping does: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet dipy==1.12.1 nibabel==5.4.2 numpy==2.2.6
cat > "$folder/case.py" <<'PYTHON'
import sys

import nibabel as nib
import numpy as np
from dipy.align import syn_registration, write_mapping
from scipy import ndimage

path, affine = sys.argv[1], np.diag([1.5, 1.5, 1.5, 1])
blob = np.exp(-((np.moveaxis(np.indices((24, 24, 24)), 0, -1) - 11.5) ** 2 / (40, 25, 30)).sum(-1))
static, moving = blob, ndimage.shift(blob, (1.5, -1, 0.5), order=1)
warped, mapping = syn_registration(moving, static, moving_affine=affine, static_affine=affine, level_iters=[20])
write_mapping(mapping, path)
image = nib.load(path)
print("affine in the file is that of the static image:", np.allclose(image.affine, affine))
print("affine in the file is its inverse:", np.allclose(image.affine, np.linalg.inv(affine)))
for half in (0, 1):
    field = np.moveaxis(np.asarray(image.dataobj)[..., half], -1, 0) / 1.5  # voxels
    found = ndimage.map_coordinates(moving, np.indices(static.shape) + field, order=1)
    print(f"half {half} resamples the moving image as the mapping does:", np.allclose(found, warped, atol=1e-3))
PYTHON
"$folder/env/bin/python" "$folder/case.py" "$folder/mapping.nii.gz" 2> /dev/null | grep -v INFO | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(\(affine\|half\) .*\)/\1/p' "$0")
