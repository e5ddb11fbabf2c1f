"""The page of a result: what it shows, and the corrections that are asked for on it.

The history of the corrections is written to the folder of the result after each of them, and after each mark on the
page, which is a draft of the next one. So a program that was ended goes on where it was. All pages of a program show
the same.
"""

import base64
import json
import sys
import threading
import traceback
import zlib
from pathlib import Path

import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import finite, json_text
from drivenmorph_jax.registration.correct import Correction, Session, moved
from drivenmorph_jax.registration.guide import overlap
from drivenmorph_jax.registration.history import HISTORY, History, landmark_rows, same
from drivenmorph_jax.registration.read import check_labels, label_pairs, within
from drivenmorph_jax.transforms.points import Landmarks
from drivenmorph_jax.transforms.world import channels_first, map_points, sample
from drivenmorph_jax.view.layers import IMAGES, Shown
from drivenmorph_jax.view.news import News

BYTES = "application/octet-stream"
BUSY = "the program is at work: wait until it has ended"
NOTHING_NEW = "nothing was changed since the last correction: mark a landmark, paint, or change the stiffness first"
INVERSE_STEPS, CLOSE = 60, 0.5  # of the place of a landmark in the warped image; mm, how close it has to come


class ResultPage:
    """The page of the result in a folder.

    Raises InputError where the folder holds no result, or where an image of it is missing.
    """

    html = "page.html"
    pair = None  # in a cohort: its name, and the number of the next one

    def __init__(self, folder):
        self.shown = Shown(folder)
        self._files, self._making, self._asking = {}, threading.Lock(), threading.Lock()
        self._begun, self._warmed, self._computing = threading.Lock(), threading.Lock(), threading.Lock()
        self._session = self._history = None
        self._states = {}  # of the history, by their numbers
        self._state = {}  # what the pages are told of the one that is shown, when a work has ended
        self._structures = {}  # of the label maps, {label of the fixed image: a point of it}
        self._drafted = -1  # how often what is marked has changed
        self.news = News(able=False, busy=None, said="", warn=False, made=0, labels=None, **self._told(None))

    # What the page gets.

    def content(self, name):
        """(bytes, type) of a name, or None."""
        if name == "result.json":
            return json.dumps(self.shown.described() | {"pair": self.pair}).encode(), "application/json"
        if name == "places.json":
            return json.dumps(self.shown.places()).encode(), "application/json"
        layer, told = name.removesuffix(".nii"), self.news.content
        if layer == name:
            return None
        if layer == "distrust":  # empty where there is none: a page may ask for what was undone meanwhile
            mask = self._wanted.distrust
            return self.shown.drawing(np.zeros(self.shown.fixed.data.shape) if mask is None else mask), BYTES
        key = layer, told["made"]
        if (known := self._files.get(key)) is not None:  # one that is made does not wait for the next
            return known, BYTES
        with self._making:  # a file that two pages want is made once
            if key not in self._files:
                if (made := self._file(layer, told["at"])) is None:
                    return None
                self._files = {one: file for one, file in self._files.items() if one[1] == told["made"]} | {key: made}
            return self._files[key], BYTES

    def _file(self, layer, at):
        state = self._states.get(at)
        if layer == "before":
            return self.shown.file("warped", self._states.get(at - 1))
        known = layer in IMAGES or layer in self.shown.maps(state)
        return self.shown.file(layer, state) if known else None

    def page(self, number):
        """None: there is no page below this one."""

    def prepare(self):
        """Make what the page needs first."""
        for name in IMAGES:
            self.content(f"{name}.nii")

    # What is asked for on the page.

    def begin(self):
        """Open the result for corrections, and go on with its history. Called when a page is open."""
        if self._begun.acquire(blocking=False):
            self._work("read the result", self._open)

    def act(self, name, asked):
        """Do what a page asks for, and return the answer, a dictionary. Raises InputError where it cannot be done."""
        acts = {"go": self._go, "undo": self._undo, "redo": self._redo, "export": self._export}
        if name not in (*acts, "point", "label", "draft", "warm"):
            return None
        told = self.news.content
        if not told["able"]:
            raise InputError(BUSY if told["busy"] else told["said"])
        if name == "point":
            return {"moving": self._carried(asked.get("panel"), _point(asked.get("place")))}
        if name == "label":
            return {"label": self._label(_point(asked.get("place")))}
        if name == "draft":
            self._draft(asked)
        elif name == "warm":
            if self._warmed.acquire(blocking=False):
                threading.Thread(target=self._warm, daemon=True).start()
        else:
            self._work(*acts[name](asked))
        return {}

    def _work(self, words, work):
        """Do something in a thread of its own, one at a time, and tell the pages.

        Raises InputError where another work goes on.
        """
        with self._asking:
            if self.news.content["busy"]:
                raise InputError(BUSY)
            self.news.tell(busy=words, said="", warn=False)

        def run():
            try:
                said, warn = work() or "", False
            except Exception as error:
                said, warn = str(error), True
                if not isinstance(error, InputError):  # nobody's sentence
                    said = f"{type(error).__name__}: {said}"
                    traceback.print_exception(error, file=sys.stderr)
            self.news.tell(busy=None, said=said, warn=warn, **self._state)

        threading.Thread(target=run, daemon=True).start()

    def _open(self):
        said = None
        try:
            session = Session(self.shown.folder)
            if "corrected" in session.summary:
                of = session.summary["corrected"]["result"]
                raise InputError(f"It is a correction of {of}: correct that one further")
            self._history = History.of(session)
            if (self.shown.folder / HISTORY).exists():
                try:
                    self._history = History.read(self.shown.folder / HISTORY, session)
                except InputError as error:
                    said = f"{error}. What you mark next begins another history in its place"
        except InputError as error:
            raise InputError(f"The result can be looked at only. {error}") from error
        self._session = session
        maps = {"fixed": session.fixed_labels, "moving": session.labels}
        if None not in maps.values():
            self._state |= {"labels": {role: np.unique(one.data[one.data > 0]).tolist() for role, one in maps.items()}}
        self._show()
        self._state |= {"able": True}
        return said

    def _warm(self):
        """Compile what a correction needs, while the first one is thought of."""
        with self._computing:
            self._session.warm()

    def _corrected(self, correction):
        if self._computing.locked():
            self.news.tell(busy="wait for the compiler, which works once for images of a size")
        with self._computing:
            return self._session.corrected(correction, self._progress)

    @property
    def _wanted(self):
        """The correction whose marks the page shows: the draft, or else what is in force."""
        return Correction() if self._history is None else (
            self._history.draft or self._history.correction or Correction())

    def _draft(self, asked):
        """Keep what is marked on a page, and show it on the others."""
        correction = self._asked(asked)
        with self._asking:
            if self.news.content["busy"]:
                raise InputError(BUSY)
            self._history.ask(correction)
            try:
                self._write()
            finally:
                self._state |= self._told(self._history, str(asked.get("page", ""))[:99])
                self.news.tell(**self._state, said="", warn=False)

    def _go(self, asked):
        correction = self._asked(asked)
        if same(correction, self._history.correction or Correction()) and self._history.at:
            raise InputError(NOTHING_NEW)

        def work():
            state = self._corrected(correction)
            self._states = {k: one for k, one in self._states.items() if k <= self._history.at}
            self._history.add(correction, state)
            self._states[self._history.at] = state
            self._keep()

        return "correct", work

    def _undo(self, asked):
        return "undo", lambda: self._move(self._history.undo)

    def _redo(self, asked):
        return "redo", lambda: self._move(self._history.redo)

    def _move(self, step):
        step()
        self._keep()

    def _keep(self):
        """Write the history, and show where it is, also where it cannot be written."""
        try:
            self._write()
        finally:
            self._show()

    def _write(self):
        try:
            self._history.write(self.shown.folder)
        except InputError as error:
            raise InputError("What is marked and corrected lasts until the program ends only, since "
                             f"{self.shown.folder / HISTORY} cannot be written: make the folder writable, or free "
                             "space") from error

    def _show(self):
        """Show the state at which the history is, and the one before."""
        at = self._history.at
        for k in (at - 1, at):
            if k > 0 and k not in self._states:
                self._states[k] = self._corrected(self._history.steps[k - 1].correction)
        changed = at or self.news.content["at"]
        self._state |= {"made": self.news.content["made"] + bool(changed), **self._told(self._history)}

    def _export(self, asked):
        out = free(self.shown.folder.with_name(f"{self.shown.folder.resolve().name}-corrected"))

        def work():
            with self._computing:
                self._session.save(self._history, out, self._progress)
            return f"All files are in {out}" + (
                ". What was marked since the last correction is not in them" if self._history.draft else "")

        return "write the files", work

    def _progress(self, words, share):
        self.news.tell(busy=f"{words} ... {share:.0%}")

    def _told(self, history, drafter=""):
        """What the pages are told of a history, and which page has marked what is new, if it was one."""
        step = None if history is None else history.current
        at, wanted = (0, Correction()) if history is None else (history.at, self._wanted)
        state = self._states.get(at)
        told = [self.shown.summary.get(name, []) for name in ("landmarks", "guided_labels")] if step is None else (
            [step.told, step.labels_told])
        self._drafted += 1
        return finite({
            "at": at, "before": at > 0, "maps": list(self.shown.maps(state)), "drafted": self._drafted,
            "drafter": drafter,
            "undoable": history is not None and history.undoable, "redoable": history is not None and history.redoable,
            "stiffness": wanted.stiffness, "distrust": wanted.distrust is not None,
            "landmarks": self._landmarks(wanted, step, at), "label_pairs": self._pairs(wanted, step),
            "told": told[0] if step is None else [], "checks": self.shown.checks(step, *told),
            "steps": [] if history is None else [
                {"words": _words(one.correction), **one.numbers} for one in history.steps]})

    def _landmarks(self, correction, step, at):
        """The rows of the landmarks of a correction. Each has its distance in the result as it was found, the place
        where each panel shows its point, in RAS mm, or None, and, where it is in force, what came of it."""
        rows = landmark_rows(correction.landmarks)
        if not rows:
            return rows
        came = {} if step is None else {json_text(row): {name: one[name] for name in ("after_mm", "left_out")}
                                        for row, one in zip(landmark_rows(step.correction.landmarks), step.told,
                                                            strict=True)}
        fixed, moving = correction.landmarks.fixed, correction.landmarks.moving
        straight = map_points(np.linalg.inv(self.shown.linear), moving)
        places = {"fixed": fixed, "moving": straight, "warped": self._inverse(at, straight, fixed),
                  "before": self._inverse(at - 1, straight, fixed)}
        lacked = np.linalg.norm(self._moved(0, fixed) - straight, axis=-1)
        return [row | {"before_mm": float(lacked[k]), **came.get(json_text(row), {"after_mm": None}), "places": {
            panel: None if np.isnan(points[k]).any() else points[k].tolist() for panel, points in places.items()}}
            for k, row in enumerate(rows)]

    def _moved(self, at, points):
        """Points (N, 3) of the fixed world by the deformation of a state, without the affine, RAS mm."""
        displacement = self._states.get(at, self._session.first).displacement
        return map_points(np.linalg.inv(self.shown.linear), moved(displacement, self.shown.fixed, points))

    def _inverse(self, at, targets, start):
        """Where the deformation of a state, without the affine, takes targets (N, 3) from; nan where that is not found.

        It is found by the iteration of `fields.inverse.inverse`.
        """
        points = start.copy()
        for _ in range(INVERSE_STEPS):
            error = self._moved(at, points) - targets
            points -= 0.5 * error
        return np.where(np.linalg.norm(error, axis=-1, keepdims=True) < CLOSE, points, np.nan)

    def _pairs(self, correction, step):
        """The rows of the pairs of labels of a correction, with Dice before and, where it is in force, after."""
        known, rows = {} if step is None else {(one["fixed"], one["moving"]): one for one in step.labels_told}, []
        for fixed, moving in correction.label_pairs:
            if fixed not in self._structures:
                voxels = np.argwhere(self._session.fixed_labels.data == fixed)
                nearest = voxels[np.linalg.norm(voxels - voxels.mean(0), axis=-1).argmin()]
                self._structures[fixed] = map_points(self.shown.fixed.affine, nearest).tolist()
            before = known.get((fixed, moving)) or {"dice_before": overlap(
                self._session.fixed_labels.data == fixed, self._session.first.labels == moving), "left_out": None}
            rows.append({"dice_after": None} | before | {"fixed": fixed, "moving": moving,
                                                         "place": self._structures[fixed]})
        return rows

    def _label(self, place):
        """The label of the fixed image at a point. Raises InputError where it has none."""
        labels = self._session.fixed_labels
        if labels is None:
            raise InputError("the result has no label map of the fixed image: give --fixed_labels to register")
        voxel = np.rint(map_points(np.linalg.inv(labels.affine), place)).astype(int)
        inside = (voxel >= 0).all() and (voxel < labels.data.shape).all()
        if not inside or not labels.data[tuple(voxel)]:
            raise InputError("the fixed image has no label at the crosshair: go to a structure, or write its label")
        return int(labels.data[tuple(voxel)])

    def _asked(self, asked):
        """The `Correction` that a page asks for."""
        marks, drawing, stiffness, pairs = (asked.get(name) for name in ("landmarks", "distrust", "stiffness",
                                                                         "label_pairs"))
        try:
            stiffness = float(stiffness)
            names = tuple(str(one["name"]).strip() for one in marks)
            points = [np.array([_point(one[role]) for one in marks]).reshape(-1, 3) for role in ("fixed", "moving")]
            radius, weight = (np.array([otherwise if one[name] is None else float(one[name]) for one in marks])
                              for name, otherwise in (("radius", np.nan), ("weight", 1.0)))
            pairs = [f"{fixed}={moving}" for fixed, moving in pairs]
        except (TypeError, ValueError, KeyError) as error:
            raise InputError("the page sent something that is no correction: load the page again") from error
        if not 0 <= stiffness < np.inf or (radius <= 0).any() or np.isinf(radius).any():
            raise InputError("a radius is not above 0, or the stiffness is below 0: correct it")
        if not ((weight > 0) & (weight <= 1)).all():
            raise InputError("a weight is not above 0 and up to 1: correct it")
        if not all(names) or len(set(names)) < len(names):
            raise InputError("two landmarks have one name, or one has none: name each of them")
        landmarks, session = Landmarks(names, *points, radius, weight) if names else None, self._session
        if names:
            within(landmarks, {"fixed": session.fixed, "moving": session.moving})
        if pairs := label_pairs(pairs):
            check_labels(pairs, {"fixed_labels": session.fixed_labels, "moving_labels": session.labels})
        return Correction(landmarks, None if drawing is None else self.shown.mask(self._unpacked(drawing)), stiffness,
                          pairs)

    def _unpacked(self, drawing):
        """The bytes of a drawing that was compressed, of which no more are unpacked than an image in the box has."""
        most = 2**12 + np.prod([one.stop - one.start for one in self.shown.box]).item()
        try:
            return zlib.decompressobj(31).decompress(base64.b64decode(drawing, validate=True), most)
        except (TypeError, ValueError, zlib.error) as error:
            raise InputError("the page sent a drawing that cannot be read: load the page again") from error

    def _carried(self, panel, place):
        """Where the moving image has what a panel shows at a place: a point in RAS mm."""
        if panel == "moving":
            return map_points(self.shown.linear, place).tolist()
        at = self.news.content["at"] - (panel == "before")
        state = self._states.get(at, self._session.first)
        voxel = map_points(np.linalg.inv(self.shown.fixed.affine), place)
        first = np.clip(np.floor(voxel).astype(int), 0, np.array(self.shown.fixed.data.shape) - 2)
        near = state.displacement[tuple(slice(a, a + 2) for a in first)]
        return (place + sample(channels_first(near), (voxel - first)[None])[0]).tolist()


def free(path):
    """The path itself, or with a number behind it, so that nothing has this name."""
    k, found = 1, Path(path)
    while found.exists():
        k += 1
        found = path.with_name(f"{path.name}-{k}")
    return found


def _point(numbers):
    """A point (3,) from JSON. Raises InputError where it is none."""
    try:
        found = np.array(numbers, float)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (3,) or not np.abs(found).max() < 1e6:
        raise InputError("the page sent something that is no point: load the page again")
    return found


def _words(correction):
    """What a correction asks for, in a few words."""
    number = 0 if correction.landmarks is None else len(correction.landmarks.names)
    parts = [f"{number} landmark{'s' if number != 1 else ''}"] if number else []
    parts += [f"label {a} onto {b}" for a, b in correction.label_pairs]
    if correction.distrust is not None:
        parts.append("not to be trusted where painted")
    if correction.stiffness:
        parts.append(f"stiffness {correction.stiffness:g} mm")
    return ", ".join(parts)
