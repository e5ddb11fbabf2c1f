"""Points in CSV files, moved by a transform."""

import csv

import numpy as np

from drivenmorph_jax.errors import InputError


def move_table(source, out, transform):
    """Move the points of a CSV file by a `Transform`.

    The points are in the columns x, y, z of the file `source`, in RAS mm. The file `out` has the moved points and the
    other columns unchanged.

    Raises InputError where `source` cannot be read or has no points, where it lacks these columns, or where their
    values are not finite numbers.
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
