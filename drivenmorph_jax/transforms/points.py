"""World-space transforms and their files: displacements in RAS mm on a grid, and 4x4 affines.

Everything pulls back. x is a point of the fixed world, y of the moving world, both RAS mm. W is the affine of
the working grid, which lies in the fixed world, u the field found on it in voxels, T the affine alignment:

    fixed to moving   y = T d(x),        d(x) = W (w + u(w)),           w = W^-1 x
    moving to fixed   x = d^-1(T^-1 y),  d^-1(z) = W (w + u_inv(w)),    w = W^-1 z

A file holds the displacement y - x (or x - y). LPS, the world of ITK and ANTs, is (-x, -y, z) of RAS.
"""

import csv

import numpy as np

from drivenmorph_jax.errors import InputError


def move_table(source, out, transform):
    """Write the CSV file `source` to `out` with the points in its columns x, y, z, RAS mm, moved by a `Transform`.

    Raises InputError where it has no such columns, or what stands in them are no numbers.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        points = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} is not a table of points; give a CSV with a header and numbers in its columns "
                         "x, y, z") from error
    if not rows or not np.isfinite(points).all():
        raise InputError(f"{source} holds no points, or some that are not finite; give numbers in columns x, y, z")
    for row, point in zip(rows, transform.points(points), strict=True):
        row.update(zip("xyz", (f"{x:.6g}" for x in point), strict=True))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
