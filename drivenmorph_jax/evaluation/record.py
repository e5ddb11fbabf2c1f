"""The record of an evaluation: the pairs that it has scored, on disk, so that a stopped run can continue."""

import hashlib
import json

import jax
import numpy as np

from drivenmorph_jax.files import finite, read_rows, replacing, rows_text
from drivenmorph_jax.runtime.provenance import git_commit
from drivenmorph_jax.runtime.shipped import VERSION


class Record:
    """The pairs that a run has scored, kept in out/pairs.jsonl. `rows` is {(fixed, moving): what `scored` returned}.

    The first line holds the identity of the run. Pairs of another run are dropped, and so are those of a run that has
    ended (its summary.json exists) and a line that is incomplete.
    """

    def __init__(self, out, identity):
        self.path, summary, head = out / "pairs.jsonl", out / "summary.json", {"run": identity}
        first, *kept = read_rows(self.path) or [None]
        if first != head or summary.is_file():
            kept = []
        summary.unlink(missing_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(rows_text([head, *kept]))
        self.rows = {(row["scores"]["fixed"], row["scores"]["moving"]): row for row in kept}

    def add(self, row):
        row = finite(row)  # as a later run reads it
        with self.path.open("a") as file:
            file.write(rows_text([row]))
        self.rows[row["scores"]["fixed"], row["scores"]["moving"]] = row


def names_of(pair):
    """(id of the fixed, id of the moving subject)."""
    return tuple(subject.id for subject in pair)


def identity_of(config, params, subjects, atlas, refine_steps, l2r):
    """A digest of everything on which the scores depend."""
    subjects = subjects if atlas is None else (*subjects, atlas)
    settings = [config.to_dict(), VERSION, git_commit(), refine_steps, str(l2r), [s.id for s in subjects]]
    digest = hashlib.sha256(json.dumps(settings).encode())
    arrays = [x for s in subjects for x in (s.image, s.labels) if x is not None]
    for x in jax.tree.leaves(params) + arrays:
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()
