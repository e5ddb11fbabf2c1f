"""What a person decides about the pairs of a cohort: the columns decision and note of cohort.csv.

A pair that is to be done again is `REDO`. The next run of the cohort registers it again and takes this word away.
"""

import csv
from pathlib import Path

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import alone_in, make_folder, replacing
from drivenmorph_jax.registration.job import NOTES
from drivenmorph_jax.registration.pairs import TABLE

ACCEPT, REDO = "accept", "redo"
COLUMNS = "decision", "note"


def alone(out):
    """A context in which no other process writes the table of the cohort in the folder `out`."""
    return alone_in(make_folder(Path(out) / NOTES), wait=True)


def read_table(out):
    """The rows of the table of a cohort, {column: text} each.

    Raises InputError where the folder has no table, or where it cannot be read.
    """
    path = Path(out) / TABLE
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{column: cell or "" for column, cell in row.items() if column} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give the --out of cohort, after a run of it has ended") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}): run cohort again") from error
    if not rows or not {"name", "status"} <= set(rows[0]):
        raise InputError(f"{path} is not the table of a cohort: run cohort again")
    return rows


def write_table(out, columns, rows):
    """Write the table of a cohort, complete or not at all. Raises InputError where it cannot be written."""
    with replacing(Path(out) / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def decisions(out):
    """{name: {"decision": text, "note": text}} of the pairs of a cohort, by its table; {} where it has none."""
    if not (Path(out) / TABLE).is_file():
        return {}
    return {row["name"]: {column: row.get(column, "") for column in COLUMNS} for row in read_table(out)}


def decide(out, name, decision, note):
    """Write the decision on a pair, `ACCEPT`, `REDO` or "", and the note on it, to the table of its cohort.

    Raises InputError where the table has no such pair, or where it cannot be written.
    """
    with alone(out):
        rows = read_table(out)
        found = [row for row in rows if row["name"] == name]
        if not found:
            raise InputError(f"{Path(out) / TABLE} has no pair called {name}: load the page again")
        found[0] |= {"decision": decision, "note": note}
        write_table(out, list(dict.fromkeys((*rows[0], *COLUMNS))), rows)
