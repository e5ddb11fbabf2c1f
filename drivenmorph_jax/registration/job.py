"""One pair of a cohort: its files, its settings, and what its folder says about it.

    OUT/NAME/               what `register` writes; summary.json has what the result was made from
    OUT/.cohort/NAME/       the lock of the pair and, where the registration failed, failure.json

The folders are all that is known about a pair, so any number of processes can work on one cohort.
"""

import contextlib
import json
import os
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import jax

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import NEW, SUMMARY, alone_in, make_folder, write_json
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request
from drivenmorph_jax.registration.register import begun, finished
from drivenmorph_jax.registration.result import check_out
from drivenmorph_jax.runtime.shipped import VERSION

DONE, FAILED, MISSING = "done", "failed", "missing"
NOTES, FAILURE = ".cohort", "failure.json"
# Working grids whose programs a process keeps. Those of one grid take 2,000 memory mappings and 200 MB; Linux gives a
# process 65,530 mappings, and the compiler aborts where there are no more.
MOST_GRIDS = 8
_grids = set()


@dataclass(frozen=True)
class Job:
    """A pair to register. It can be sent to another process."""

    name: str
    out: str  # the folder of the cohort
    files: dict  # {role: absolute path}, as in `registration.pairs`
    settings: dict  # of `register`
    formats: tuple
    made_from: dict  # what the result depends on; where it is another, the pair is registered anew

    @property
    def folder(self):
        """Where the result is written."""
        return Path(self.out) / self.name

    @property
    def notes(self):
        """The folder of the lock and of a failure."""
        return Path(self.out) / NOTES / self.name

    def state(self):
        """{"status": DONE, "summary": that of the result}, {"status": FAILED, "error": a sentence}, or MISSING."""
        if found := made(self.folder / SUMMARY, self.made_from):
            return {"status": DONE, "summary": found}
        if found := made(self.notes / FAILURE, self.made_from):
            return {"status": FAILED, "error": found["error"]}
        return {"status": MISSING}

    def alone(self, wait=False):
        """A context in which no other process works on this pair. Raises InputError where one does, unless `wait`."""
        return alone_in(make_folder(self.notes), wait=wait)

    def forget(self):
        """Forget an earlier failure."""
        (self.notes / FAILURE).unlink(missing_ok=True)

    def disown(self):
        """Take from the result of the pair what says that it is done. The result stays until there is another."""
        if self.state()["status"] == DONE:
            summary = json.loads((self.folder / SUMMARY).read_text())
            del summary["made_from"]
            write_json(self.folder / SUMMARY, summary)

    def begin(self, progress):
        """The pair after the first stages, see `register.begun`."""
        check_out(self.folder, self.files.values())  # refused before the work, not after
        return begun(Request(**self.files, **self.settings), progress)

    def compute(self, pair, progress):
        """The result of the pair that `begin` returned."""
        result = finished(pair, progress)
        _grids.add(tuple(result.summary["working_grid"]))
        if len(_grids) > MOST_GRIDS:
            jax.clear_caches()
            _grids.clear()
        return result

    def save(self, result):
        """Write a result."""
        result.summary["made_from"] = self.made_from
        result.save(self.folder, self.formats)

    def fail(self, error):
        """Keep the sentence of an error, and nothing else of this attempt."""
        said = {"made_from": self.made_from, "error": " ".join(str(error).split())}
        if not isinstance(error, InputError):  # nobody's sentence
            said |= {"error": f"{type(error).__name__}: {said['error']}",
                     "traceback": "".join(traceback.format_exception(error))}
        write_json(make_folder(self.notes) / FAILURE, said)
        shutil.rmtree(self.folder / NEW, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds an earlier result, or does not exist
            self.folder.rmdir()

    def run(self):
        """Register the pair, from its files to its files. An error becomes its failure."""
        progress = Progress(quiet=True)
        try:
            self.save(self.compute(self.begin(progress), progress))
        except Exception as error:
            self.fail(error)


def made(path, origin):
    """The content of a JSON file if it was made from `origin`, as its key made_from says; else None."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(path).read_text())
        if isinstance(found, dict) and found.get("made_from") == origin:
            return found


def made_from(files, settings, formats, weights):
    """What a result depends on: the version, settings, and path, size and time of change of every file.

    `weights` is their digest, which stands for the checkpoint; or None.

    Raises InputError where a file is missing.
    """
    try:
        found = {role: [str(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns] for role, path in files.items()}
    except OSError as error:
        raise InputError(f"{error.filename} does not exist; check the path") from error
    settings = {name: value for name, value in settings.items() if name != "checkpoint"}
    return {"version": VERSION, "settings": settings, "formats": list(formats), "weights": weights, "files": found}
