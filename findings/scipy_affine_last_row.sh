#!/usr/bin/env bash
# scipy.ndimage.affine_transform compares the last row of a 4x4 matrix with 0 0 0 1 exactly. The usual mean of two affines,
# A expm(logm(A^-1 B) / 2), has a last row that rounding has changed, though never by more than 1e-14: nearly every such mean
# ends in a ValueError. The same matrix is taken as a 3x3 part and an offset. NumPy's inverses and products of affines keep
# the row exact, so nothing warns before the first mean.
#
# Output seen:
#   SciPy 1.16.3
#   means of two affines: more than 150 of 200 are refused as 4x4, none as a 3x3 with an offset
#   the same after the last row is set: none
#   inverses and products: none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet scipy==1.16.3 numpy==2.2.6
cat > "$folder/mean.py" <<'PYTHON'
import numpy as np
import scipy
from scipy import linalg, ndimage

print("SciPy", scipy.__version__)
rng, image = np.random.default_rng(0), np.zeros((4, 4, 4), np.float32)


def refused(*matrix):
    try:
        ndimage.affine_transform(image, *matrix)
    except ValueError as error:
        assert "homogeneous" in str(error)
        return True
    return False


def affine():
    x = np.eye(4)
    x[:3, :3] += 0.05 * rng.normal(size=(3, 3))
    x[:3, 3] = 10 * rng.normal(size=3)
    return x


whole = parts = repaired = plain = 0
for _ in range(200):
    a, b = affine(), affine()
    mean = a @ linalg.expm(np.real(linalg.logm(np.linalg.inv(a) @ b)) / 2)
    assert np.abs(mean[3] - (0, 0, 0, 1)).max() < 1e-14
    whole += refused(mean)
    parts += refused(mean[:3, :3], mean[:3, 3])
    mean[3] = 0, 0, 0, 1
    repaired += refused(mean)
    plain += refused(np.linalg.inv(a) @ b)
few = {True: "more than 150 of 200", False: f"{whole} of 200"}[whole > 150]
print(f"means of two affines: {few} are refused as 4x4, {parts or 'none'} as a 3x3 with an offset")
print(f"the same after the last row is set: {repaired or 'none'}")
print(f"inverses and products: {plain or 'none'}")
PYTHON
"$folder/env/bin/python" "$folder/mean.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
