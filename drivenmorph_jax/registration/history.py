"""The history of the corrections of a result, with undo and redo.

    history.json             the result, all steps, how many of them are in force, and the draft of the next one
    distrust-CRC32.nii.gz    a mask of a step, named after its content

A mask file never changes. So the history on disk is always that of one moment: that of history.json.
"""

import json
import re
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import json_text, make_folder, write_json
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.reading import load_mask
from drivenmorph_jax.images.volume import Volume
from drivenmorph_jax.registration.correct import Correction, Session, State
from drivenmorph_jax.transforms.points import Landmarks

HISTORY = "history.json"
MASK = re.compile(r"distrust-[0-9a-f]{8}\.nii\.gz")


@dataclass(frozen=True, eq=False)
class Step:
    """A correction, and what came of it."""

    correction: Correction
    numbers: dict  # those of its `State`
    told: list
    labels_told: list
    time: str  # ISO 8601, with the time zone
    state: State | None = None  # None after the history was read from a file


@dataclass(eq=False)
class History:
    """The corrections of a result. The first `at` of `steps` were not undone, and the last of these is in force."""

    result: str  # the folder of the result
    identity: int  # of the result, `Session.identity`
    fixed: Volume  # the fixed image, on whose grid the masks lie
    steps: list[Step] = field(default_factory=list)
    at: int = 0
    draft: Correction | None = None  # what is asked for next and not computed yet; None where it is what is in force
    _dropped: tuple[int, Correction] | None = None  # a draft that was undone, and `at` then

    @classmethod
    def of(cls, session: Session) -> "History":
        """The empty history of a result."""
        return cls(str(session.folder), session.identity, session.fixed)

    @property
    def current(self) -> Step | None:
        """The step that is in force; None where it is the result as it was found."""
        return self.steps[self.at - 1] if self.at else None

    @property
    def correction(self) -> Correction | None:
        """The correction that is in force, or None."""
        return self.current and self.current.correction

    def ask(self, correction: Correction) -> None:
        """Make a correction the draft. One that asks for what is in force already is none."""
        self._dropped, self.draft = None, None if same(correction, self.correction or Correction()) else correction

    def add(self, correction: Correction, state: State) -> None:
        """Add a correction, which is then in force. Steps that were undone are forgotten."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.steps[self.at:] = [Step(correction, state.numbers, state.told, state.labels_told, now, state)]
        self.draft, self.at = None, self.at + 1

    @property
    def undoable(self) -> bool:
        """Whether there is something to undo."""
        return self.at > 0 or self.draft is not None

    @property
    def redoable(self) -> bool:
        """Whether there is something to redo."""
        return self.draft is None and (self.at < len(self.steps) or self._again)

    @property
    def _again(self):
        return self._dropped is not None and self._dropped[0] == self.at

    def undo(self) -> None:
        """Drop the draft; where there is none, go back one step, if there is one."""
        if self.draft is not None:
            self._dropped, self.draft = (self.at, self.draft), None
        else:
            self.at = max(self.at - 1, 0)

    def redo(self) -> None:
        """Take the draft that was undone again; else go forward by one step that was undone, if there is one."""
        if self.redoable and self._again:
            self.draft, self._dropped = self._dropped[1], None
        elif self.redoable:
            self.at += 1

    def write(self, folder: str | Path) -> None:
        """Write history.json and the masks to a folder. Masks that no step has any more are deleted there.

        Raises InputError where a file cannot be written.
        """
        folder, names = make_folder(folder), set()
        for one in [*(step.correction for step in self.steps), *([self.draft] if self.draft else [])]:
            if (name := _mask_name(one)) is not None and name not in names:
                names.add(name)
                if not (folder / name).exists():
                    writing.write(folder / name, writing.to_nibabel(one.distrust.astype(np.uint8), self.fixed,
                                                                    dtype=np.dtype(np.uint8)))
        write_json(folder / HISTORY, {
            "result": self.result, "displacement_crc32": self.identity, "at": self.at,
            "draft": self.draft and asked(self.draft), "steps": [
                {"time": step.time, **asked(step.correction), "numbers": step.numbers, "told": step.told,
                 "labels_told": step.labels_told} for step in self.steps]})
        for path in folder.iterdir():
            if MASK.fullmatch(path.name) and path.name not in names:
                path.unlink()

    @classmethod
    def read(cls, path: str | Path, session: Session) -> "History":
        """Read the history of a result from its history.json.

        Raises InputError where the file cannot be read, or is the history of another result.
        """
        path = Path(path)
        try:
            found = json.loads(path.read_text())
            history = cls(str(found["result"]), int(found["displacement_crc32"]), session.fixed)
            rows, history.at = list(found["steps"]), int(found["at"])
            history.steps = [Step(_correction(row, path.parent, session.fixed), dict(row["numbers"]), list(row["told"]),
                                  list(row.get("labels_told", ())), str(row["time"])) for row in rows]
            if found.get("draft") is not None:
                history.draft = _correction(found["draft"], path.parent, session.fixed)
            if not 0 <= history.at <= len(rows):
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is no history of corrections: give the history.json that the page or "
                             "`drivenmorph correct` wrote") from error
        if history.identity != session.identity:
            raise InputError(f"{path} is the history of another result than {session.folder}: give the folder "
                             f"{history.result}, as it was then")
        return history


def same(one: Correction, other: Correction) -> bool:
    """Whether two corrections ask for the same."""
    return json_text(asked(one)) == json_text(asked(other))


def asked(correction):
    """What a correction asks for, as it stands in history.json."""
    return {"landmarks": landmark_rows(correction.landmarks), "distrust": _mask_name(correction),
            "stiffness": correction.stiffness, "label_pairs": correction.label_pairs}


def _mask_name(correction):
    """The name of the file of a correction's mask, or None."""
    mask = correction.distrust
    return None if mask is None else f"distrust-{zlib.crc32(np.packbits(mask)):08x}.nii.gz"


def landmark_rows(marks):
    """The `Landmarks` of a correction, or None, as JSON has them: {"name", "fixed", "moving", "radius", "weight"} of
    each."""
    if marks is None:
        return []
    weight = np.ones(len(marks.names)) if marks.weight is None else marks.weight
    return [dict(zip(("name", "fixed", "moving", "radius", "weight"), one, strict=True)) for one in zip(
        marks.names, *(x.tolist() for x in (marks.fixed, marks.moving, marks.radius, weight)), strict=True)]


def _correction(row, folder, fixed):
    """A `Correction` from what history.json has of it."""
    rows, mask, marks = row["landmarks"], row["distrust"], None
    if rows:
        points = (np.array([one[role] for one in rows], float).reshape(-1, 3) for role in ("fixed", "moving"))
        marks = Landmarks(tuple(str(one["name"]) for one in rows), *points,
                          *(np.array([one.get(name, otherwise) for one in rows], float)
                            for name, otherwise in (("radius", None), ("weight", 1))))
    if mask is not None:
        if not MASK.fullmatch(mask):
            raise ValueError
        found = load_mask(folder / mask, fixed)
        mask = None if found is None else found.data > 0
    pairs = tuple((int(a), int(b)) for a, b in row.get("label_pairs", ()))
    return Correction(marks, mask, float(row["stiffness"]), pairs)
