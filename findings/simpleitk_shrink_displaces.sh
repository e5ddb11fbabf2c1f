#!/usr/bin/env bash
# SimpleITK's Shrink (ITK's ShrinkImageFilter) takes every k-th voxel of an image and sets the origin so that the old and
# the new grid have one centre. Where the number of voxels that it leaves out on both sides is odd, no voxel lies on the new
# grid: then each value is half a voxel of the old grid away from where the new header says it is. A factor of 2 does so on
# every even size. BinShrink, which takes means, is right. An image pyramid made by Shrink is displaced against its finest
# level, by up to half a finest voxel along each axis. Two images of even and of odd size are displaced against each other.
#
# The image is a ramp: each value is the voxel's coordinate in mm.
#
# Output seen:
#   SimpleITK 2.5.2
#   8 voxels, Shrink by 2: values - coordinates = 0.5
#   9 voxels, Shrink by 2: values - coordinates = 0.0
#   8 voxels, Shrink by 3: values - coordinates = 0.0
#   10 voxels, Shrink by 3: values - coordinates = 0.5
#   8 voxels, Shrink by 4: values - coordinates = 0.5
#   9 voxels, Shrink by 4: values - coordinates = 0.0
#   8 voxels, BinShrink by 2: values - coordinates = 0.0
#   9 voxels, BinShrink by 2: values - coordinates = 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet simpleitk==2.5.2 numpy==2.2.6
cat > "$folder/shrink.py" <<'PYTHON'
import numpy as np
import SimpleITK as sitk

print("SimpleITK", sitk.Version.VersionString().split("-")[0])
for name, size, factor in (("Shrink", 8, 2), ("Shrink", 9, 2), ("Shrink", 8, 3), ("Shrink", 10, 3), ("Shrink", 8, 4),
                           ("Shrink", 9, 4), ("BinShrink", 8, 2), ("BinShrink", 9, 2)):
    ramp = sitk.GetImageFromArray(np.broadcast_to(np.arange(size, dtype=np.float32), (8, 8, size)))
    small = getattr(sitk, name)(ramp, [factor] * 3)
    values = sitk.GetArrayFromImage(small)[0, 0]
    places = [small.TransformIndexToPhysicalPoint((i, 0, 0))[0] for i in range(small.GetSize()[0])]
    print(f"{size} voxels, {name} by {factor}: values - coordinates = {np.unique(values - places).item()}")
PYTHON
"$folder/env/bin/python" "$folder/shrink.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
