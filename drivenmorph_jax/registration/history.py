"""The history of the corrections of a result, with undo and redo.

    history.json             the result, all steps, and how many of them are in force
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
from drivenmorph_jax.files import make_folder, write_json
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

    def add(self, correction: Correction, state: State) -> None:
        """Add a correction, which is then in force. Steps that were undone are forgotten."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.steps[self.at:] = [Step(correction, state.numbers, state.told, now, state)]
        self.at += 1

    def undo(self) -> None:
        """Go back one step, if there is one."""
        self.at = max(self.at - 1, 0)

    def redo(self) -> None:
        """Go forward again by one step that was undone, if there is one."""
        self.at = min(self.at + 1, len(self.steps))

    def write(self, folder: str | Path) -> None:
        """Write history.json and the masks to a folder. Masks that no step has any more are deleted there.

        Raises InputError where a file cannot be written.
        """
        folder, names = make_folder(folder), {}
        for step in self.steps:
            mask = step.correction.distrust
            if mask is not None:
                names[step] = f"distrust-{zlib.crc32(np.packbits(mask)):08x}.nii.gz"
                if not (folder / names[step]).exists():
                    writing.write(folder / names[step], writing.to_nibabel(mask.astype(np.uint8), self.fixed,
                                                                          dtype=np.dtype(np.uint8)))
        write_json(folder / HISTORY, {
            "result": self.result, "displacement_crc32": self.identity, "at": self.at,
            "steps": [_described(step, names.get(step)) for step in self.steps]})
        for path in folder.iterdir():
            if MASK.fullmatch(path.name) and path.name not in names.values():
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
            history.steps = [_step(row, path.parent, session.fixed) for row in rows]
            if not 0 <= history.at <= len(rows):
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is no history of corrections: give the history.json that the page or "
                             "`drivenmorph correct` wrote") from error
        if history.identity != session.identity:
            raise InputError(f"{path} is the history of another result than {session.folder}: give the folder "
                             f"{history.result}, as it was then")
        return history


def _described(step, mask):
    """A step as it stands in history.json."""
    return {"time": step.time, "landmarks": landmark_rows(step.correction.landmarks), "distrust": mask,
            "stiffness": step.correction.stiffness, "numbers": step.numbers, "told": step.told}


def landmark_rows(marks):
    """The landmarks of a correction, or None, as JSON has them: {"name", "fixed", "moving", "radius"} each."""
    return [] if marks is None else [
        {"name": name, "fixed": fixed, "moving": moving, "radius": radius} for name, fixed, moving, radius in zip(
            marks.names, marks.fixed.tolist(), marks.moving.tolist(), marks.radius.tolist(), strict=True)]


def _step(row, folder, fixed):
    """A `Step` from its row in history.json."""
    rows, mask = row["landmarks"], row["distrust"]
    marks = None
    if rows:
        fixed_points, moving = (np.array([one[role] for one in rows], float).reshape(-1, 3) for role in (
            "fixed", "moving"))
        marks = Landmarks(tuple(str(one["name"]) for one in rows), fixed_points, moving,
                          np.array([one["radius"] for one in rows], float))
    if mask is not None:
        if not MASK.fullmatch(mask):
            raise ValueError
        found = load_mask(folder / mask, fixed)
        mask = None if found is None else found.data > 0
    return Step(Correction(marks, mask, float(row["stiffness"])), dict(row["numbers"]), list(row["told"]),
                str(row["time"]))
