#!/usr/bin/env bash
# A warp of FNIRT holds displacements in FSL's own frame, whose axes are those of the voxel grid, in mm, with the first
# reversed where the grid is right-handed. Here each vector is (1, 2, 3), and the printed vector is the displacement in the
# world (RAS) of the voxel (4, 5, 6).
#
#   - nitransforms 25.1.0 negates x and takes y and z as they are, on every grid. That is right where the axes of the grid
#     are those of the world (LAS, RAS). It is wrong on a rotated grid, and on one whose first two axes are reversed, which
#     is how scanners store most axial images. fslpy 3.29.1, of FSL's authors, turns the vectors with the grid.
#   - nitransforms 25.1.0 reads no ITK transform of the types Euler3DTransform, VersorRigid3DTransform or
#     Similarity3DTransform, which hold three or four numbers for the rotation: a ValueError of NumPy. These are the types
#     that SimpleITK and ANTs' rigid stages write.
#
# Output seen:
#   LAS: nitransforms (-1.0, 2.0, 3.0), fslpy (-1.0, 2.0, 3.0)
#   LPS: nitransforms (-1.0, 2.0, 3.0), fslpy (1.0, -2.0, 3.0)
#   rotated by 0.4 about z: nitransforms (-1.0, 2.0, 3.0), fslpy (-1.7, 1.453, 3.0)
#   Euler3DTransform: ValueError
#   VersorRigid3DTransform: ValueError
#   Similarity3DTransform: ValueError
#   AffineTransform: read
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet nitransforms==25.1.0 fslpy==3.29.1 simpleitk==2.5.2 nibabel==5.4.2 numpy==2.2.6
cat > "$folder/warps.py" <<'PYTHON'
import os
import sys

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from fsl.data.image import Image
from fsl.transform import fnirt
from nitransforms.linear import Affine
from nitransforms.nonlinear import DenseFieldTransform

os.chdir(sys.argv[1])
turn = np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]])
las = np.diag([-2.0, 2, 2])
for name, axes in (("LAS", las), ("LPS", np.diag([-2.0, -2, 2])), ("rotated by 0.4 about z", turn @ las)):
    affine = nib.affines.from_matvec(axes, [0, 0, 0])
    vectors = nib.Nifti1Image(np.tile(np.float32([1, 2, 3]), (10, 12, 14, 1)), affine)
    vectors.header.set_intent(2006)
    nib.save(vectors, "warp.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((10, 12, 14), np.float32), affine), "image.nii.gz")
    image, voxel = Image("image.nii.gz"), np.array([[4.0, 5, 6]])
    point = nib.affines.apply_affine(affine, voxel)
    one = DenseFieldTransform.from_filename("warp.nii.gz", fmt="fsl").map(point) - point
    two = fnirt.readFnirt("warp.nii.gz", image, image).transform(voxel, "voxel", "world") - point
    one, two = (tuple((x.round(3) + 0.0).ravel().tolist()) for x in (one, two))
    print(f"{name}: nitransforms {one}, fslpy {two}")
for kind in (sitk.Euler3DTransform(), sitk.VersorRigid3DTransform(), sitk.Similarity3DTransform(), sitk.AffineTransform(3)):
    sitk.WriteTransform(kind, "transform.tfm")
    try:
        Affine.from_filename("transform.tfm", fmt="itk")
        seen = "read"
    except Exception as error:
        seen = type(error).__name__
    print(f"{kind.GetName()}: {seen}")
PYTHON
"$folder/env/bin/python" "$folder/warps.py" "$folder" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
