"""The pairs of a cohort: from a table, or a BIDS folder and a template.

Pairs are {name: {role: absolute path}} with the roles of `ROLES`. The name of a pair is that of its folder.
"""

import csv
import os
import re
from pathlib import Path

from drivenmorph_jax.data.bids import bids
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import stem

ROLES = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_mask", "moving_mask", "landmarks",
         "extra_fixed", "extra_moving")
TABLE, PAGE = "cohort.csv", "report.html"  # what a cohort writes beside the folders of its pairs
LONGEST = 200  # bytes of a name
PLAIN = re.compile(r"(?!\.)[^/\\\x00-\x1f]+")


def pairs_of_table(path):
    """The pairs of a CSV file with the columns fixed and moving, and any of name and the other `ROLES`.

    Paths are relative to the folder of the file. A pair without a name is called MOVING_to_FIXED, after its files.

    Raises InputError where the table cannot be read, has no pair or not these columns, where a file is missing, or
    where the names of two pairs are one.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}): give a CSV file in UTF-8") from error
    for name in ("fixed", "moving"):
        if columns.count(name) != 1:
            raise InputError(f"{path} has {columns.count(name)} columns named {name}: its first line names the columns "
                             f"fixed, moving and, where you like, name, {', '.join(ROLES[2:])}, separated by commas")
    if unused := [name for name in columns if name not in (*ROLES, "name")]:
        print(f"{path}: columns that are not used: {', '.join(map(repr, unused))}")
    found = []
    for line, row in rows:
        if None in row:
            raise InputError(f"{path}, line {line}, has more cells than columns: put paths with commas in quotes")
        cells = {name: (cell or "").strip() for name, cell in row.items()}
        files = {role: os.path.abspath(path.parent / cells[role]) for role in ROLES if cells.get(role)}
        if not {"fixed", "moving"} <= set(files):
            raise InputError(f"{path}, line {line}, names no fixed or no moving image: fill in both, or delete the "
                             "line")
        for role, file in files.items():
            if not os.path.exists(file):
                raise InputError(f"{path}, line {line}: {role} {file} does not exist; paths are relative to the folder "
                                 "of the table")
        name = cells.get("name") or f"{stem(files['moving'])}_to_{stem(files['fixed'])}"
        found.append((name, files, f"{path}, line {line}"))
    if not found:
        raise InputError(f"{path} has no pair: give a line for each, with the files of its fixed and moving image")
    return _named(found)


def pairs_of_bids(folder, template):
    """A pair for each T1w image of a BIDS folder, which moves to the image `template`.

    Images and their label maps are those that `drivenmorph prepare bids` takes; see `data.bids`. A pair is called by
    the entities of its image, such as sub-01_ses-1.

    Raises InputError where the folder or the template is missing, or where the folder has no T1w image.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds the data set")
    if not os.path.exists(template):
        raise InputError(f"{template} does not exist: give the image that all images are registered to")
    found = []
    for name, (image, labels, _) in bids(Path(folder)).items():
        files = {"fixed": template, "moving": image} | ({} if labels is None else {"moving_labels": labels})
        found.append((name, {role: os.path.abspath(file) for role, file in files.items()}, folder))
    if not found:
        raise InputError(f"{folder} has no T1w image: give a BIDS folder with sub-*/[ses-*/]anat/*_T1w.nii.gz")
    return _named(found)


def _named(rows):
    """{name: files} of rows (name, files, the place that an error names).

    Raises InputError where a pair cannot have its name.
    """
    found, taken = {}, set()
    for name, files, place in rows:
        if not PLAIN.fullmatch(name) or len(name.encode()) > LONGEST or name.casefold() in (TABLE, PAGE):
            raise InputError(f"{place}: no folder can be called {name!r}, as that of this pair is: give a name of at "
                             f"most {LONGEST} letters, without slashes or a dot in front, and not {TABLE} or {PAGE}")
        if name.casefold() in taken:
            raise InputError(f"{place}: another pair is called {name!r}, too (case does not count): give each a name "
                             "of its own in the column name")
        taken.add(name.casefold())
        found[name] = files
    return found
