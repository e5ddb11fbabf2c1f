"""Points in CSV files and in the .fcsv files of 3D Slicer, moved by a transform; and landmarks, which are pairs."""

import re
from dataclasses import dataclass

import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import PATHS

# A cell as it stands in the file, with quotes or without, and what ends it.
CELL = re.compile(r'([^\S\r\n]*"(?:[^"]++|"")*+"[^\S\r\n]*|[^,\r\n]*)(,|\r\n|\n|\r|\Z)')
# A comment "# key = value", as an .fcsv names its columns and its frame.
COMMENT = re.compile(r"^#[ \t]*(\w+)[ \t]*=(.*)$", re.MULTILINE)
PAIR = ("fixed_x", "fixed_y", "fixed_z", "moving_x", "moving_y", "moving_z")
# From a frame to RAS and back. The first versions of Slicer 4 number the frames.
SIGNS = {"RAS": (1, 1, 1), "0": (1, 1, 1), "LPS": (-1, -1, 1), "1": (-1, -1, 1)}


def move_table(source, out, move):
    """Move the points of a table by a function of points (N, 3) in RAS mm, such as `Transform.points`.

    The table `source` is a CSV file with a header, whose columns x, y, z are in RAS mm; or an .fcsv file, whose
    comments name the columns and the frame, RAS or LPS. In the file `out` the values of x, y, z are replaced. They are
    in the frame of `source` and not rounded. All other text is unchanged.

    Raises InputError where `source` cannot be read or has no points; where it does not name these columns or the frame;
    where values are not finite numbers; or where a row of a CSV has more values than there are columns.
    """
    text = _read(source)
    rows = list(_rows(text))
    columns, signs, table = _parts(source, text, [row for row in rows if any(map(_bare, row[1]))])
    if not table:
        raise InputError(f"{source} holds no points; give a table with a row for each point")
    points = np.array([_point(source, line, cells, columns) for line, cells, _ in table])
    for (_, cells, _), point in zip(table, move(points * signs) * signs, strict=True):
        for k, x in zip(columns, point.tolist(), strict=True):
            cells[k] = cells[k].replace(_bare(cells[k]), repr(x))
    with open(out, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(",".join(cells) + end for _, cells, end in rows)


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve, such as a sulcus, as a polyline in a fixed and in a moving image, in RAS mm."""

    name: str
    fixed: np.ndarray  # (n, 3)
    moving: np.ndarray  # (m, 3)
    radius: float  # mm; nan where it is not given
    weight: float  # in (0, 1]


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of a fixed image, and where they lie in a moving image, in RAS mm; and curves in both."""

    names: tuple[str, ...]
    fixed: np.ndarray  # (N, 3)
    moving: np.ndarray  # (N, 3)
    radius: np.ndarray  # (N,), mm; nan where it is not given
    weight: np.ndarray | None = None  # (N,), in (0, 1]; None where each is 1
    curves: tuple[Curve, ...] = ()


def read_landmarks(source):
    """The `Landmarks` of a CSV file with the columns fixed_x, fixed_y, fixed_z, moving_x, moving_y and moving_z.

    Points are in RAS mm, as in `move_table`. The columns name, radius, weight and curve may be missing, and their cells
    empty. A landmark without a name is called after its line. Without a weight it has 1. Other columns are not used.

    Rows with one name in the column curve are, in their order, a curve of that name. A row may have the point of one
    image only, so the curve may have more points in one image than in the other. The first radius and the first weight
    of its rows are those of the curve.

    `source` may also be an array (N, 6) of fixed and moving points. Its landmarks are called by their numbers, from 1.

    Raises InputError where `source` cannot be read or has no landmarks, where it lacks a column, where values are not
    finite numbers, a radius is not above 0 or a weight not in (0, 1], or where a curve has no two points in an image.
    """
    if not isinstance(source, PATHS):
        return _landmarks_of(np.asarray(source, float))
    rows = [row for row in _rows(_read(source)) if any(map(_bare, row[1]))]
    columns = list(map(_bare, rows[0][1])) if rows else []
    if any(columns.count(name) != 1 for name in PAIR):
        raise InputError(f"{source} is not a table of landmarks; give a CSV with a header and numbers in its columns "
                         f"{', '.join(PAIR)}")
    if not rows[1:]:
        raise InputError(f"{source} holds no landmarks; give a row for each")
    found = [_landmark(source, line, dict(zip(columns, map(_bare, cells), strict=False)))
             for line, cells, _ in rows[1:]]
    single = [row for row in found if not row["curve"]]
    names = dict.fromkeys(row["curve"] for row in found if row["curve"])  # in their order
    return Landmarks(tuple(row["name"] for row in single),
                     *(np.array([row[role] for row in single]).reshape(-1, 3) for role in ("fixed", "moving")),
                     *(np.array([row[name] for row in single], float) for name in ("radius", "weight")),
                     tuple(_curve(source, name, [row for row in found if row["curve"] == name]) for name in names))


def _landmark(source, line, row):
    """The values of a row {column: cell}: name, curve, fixed and moving (3,), radius and weight.

    In a row of a curve a point may be None. Raises InputError where the row cannot be used.
    """
    found = {"name": row.get("name") or f"line {line}", "curve": row.get("curve")}
    for role, columns in (("fixed", PAIR[:3]), ("moving", PAIR[3:])):
        numbers = [_number(row.get(name)) for name in columns]
        empty = found["curve"] and not any(row.get(name) for name in columns)
        if None in numbers and not empty:
            raise InputError(f"{source} has no finite numbers {', '.join(PAIR)} in line {line}; correct or delete the "
                             "line")
        found[role] = None if empty else numbers
    for name, most, otherwise in (("radius", np.inf, np.nan), ("weight", 1, 1)):
        number = _number(row[name]) if row.get(name) else otherwise
        if number is None or not (np.isnan(number) or 0 < number <= most):
            raise InputError(f"{source} has a {name} that is no number above 0{'' if most > 1 else ' and up to 1'} in "
                             f"line {line}; give {'mm' if most > 1 else 'one'}, or leave it empty")
        found[name] = number
        found[f"{name} given"] = bool(row.get(name))
    return found


def _curve(source, name, rows):
    """The `Curve` of its rows, as `_landmark` returns them."""
    points = {role: np.array([row[role] for row in rows if row[role] is not None]).reshape(-1, 3)
              for role in ("fixed", "moving")}
    for role, line in points.items():
        if not len(line) or not np.ptp(line, axis=0).any():
            raise InputError(f"{source} has no two different {role} points of the curve {name}; draw it in both images")
    radius, weight = (next((row[key] for row in rows if row[f"{key} given"]), rows[0][key])
                      for key in ("radius", "weight"))
    return Curve(name, points["fixed"], points["moving"], radius, weight)


def _landmarks_of(points):
    if points.ndim != 2 or points.shape[1] != 6 or not len(points) or not np.isfinite(points).all():
        raise InputError(f"landmarks is an array of {points.shape}: give finite numbers (N, 6), the fixed and the "
                         "moving points in RAS mm, or a file")
    names = tuple(f"number {k}" for k in range(1, len(points) + 1))
    return Landmarks(names, points[:, :3], points[:, 3:], np.full(len(points), np.nan))


def _number(text):
    """The finite number of a cell, or None."""
    try:
        x = float(text)
    except (TypeError, ValueError):
        return None
    return x if abs(x) < 3e38 else None


def _read(source):
    try:
        # Bytes that are not UTF-8, such as names in another encoding, are written back as they were.
        with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from error


def _rows(text):
    """Each row as (line number, cells with their quotes and spaces, what ends the row)."""
    line, cells = 1, []
    for cell, end in CELL.findall(text):
        cells.append(cell)
        if end != ",":
            yield line, cells, end
            line, cells = line + 1 + sum(cell.count("\n") for cell in cells), []


def _bare(cell):
    return cell.strip().strip('"').strip()


def _parts(source, text, rows):
    """The places of the columns x, y, z, the signs that lead from the frame to RAS, and the rows of the points."""
    # A spreadsheet that has saved an .fcsv ends its comments by commas.
    comments = {key.lower(): value.strip(", \t\r") for key, value in COMMENT.findall(text)}
    if "columns" in comments:
        if comments.get("coordinatesystem") not in SIGNS:
            raise InputError(f"{source} does not say whether its points are in RAS or LPS; add the line "
                             "'# CoordinateSystem = RAS' or '# CoordinateSystem = LPS'")
        # Slicer 5 writes two more values than columns, so that more values are no fault here.
        return (_columns(source, comments["columns"].split(",")), SIGNS[comments["coordinatesystem"]],
                [row for row in rows if not row[1][0].startswith("#")])
    names = list(map(_bare, rows[0][1])) if rows else []
    columns = _columns(source, names)
    named = max(k + 1 for k, name in enumerate(names) if name)
    for line, cells, _ in rows:
        if any(map(_bare, cells[named:])):
            raise InputError(f"{source} has more values than columns in line {line}; put a value that holds a comma in "
                             "quotes")
    return columns, SIGNS["RAS"], rows[1:]


def _columns(source, names):
    """The places of the columns x, y, z, or X, Y, Z where a small letter is missing."""
    names = list(map(_bare, names))
    places = [[k for k, name in enumerate(names) if name == axis] or
              [k for k, name in enumerate(names) if name == axis.upper()] for axis in "xyz"]
    if any(len(found) != 1 for found in places):
        raise InputError(f"{source} is not a table of points; give a CSV with a header and numbers in its columns "
                         "x, y, z, or an .fcsv of 3D Slicer")
    return [k for k, in places]


def _point(source, line, cells, columns):
    try:
        point = [float(_bare(cells[k])) for k in columns]
    except (IndexError, ValueError):
        point = [np.nan] * 3
    if not np.abs(point).max() < 3e38:  # beyond, the way to voxels would overflow
        raise InputError(f"{source} has no finite numbers x, y, z in line {line}; correct or delete the line")
    return point
