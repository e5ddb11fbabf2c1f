"""Files and folders: complete files or none, a lock on a folder, JSON, and the name of an image."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import zlib
from pathlib import Path

from drivenmorph_jax.errors import InputError

NEW = ".new"  # where files lie until all of them are written
SUMMARY = "summary.json"  # it lists the files of a result, and is the last of them that is written
IMAGE_ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".img.gz", ".img", ".hdr.gz", ".hdr")


@contextlib.contextmanager
def replacing(path):
    """A context with a temporary path in the folder of `path` and with the same ending.

    The temporary file is renamed to `path` only when the block succeeds, so `path` is never half written.

    Raises InputError where the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written, since {path.parent} is no folder: make it, or check the path")
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # SimpleITK reports a failed write as RuntimeError
        raise InputError(f"{path} cannot be written; choose a writable folder with enough free space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_files(out, former=None):
    """A context with an empty folder inside the folder `out`.

    When the block succeeds, the files of an earlier result, whose names are `former`, are deleted, and the files in the
    folder move to `out`, summary.json as the last. Otherwise nothing changes.

    Raises InputError where a file of another origin would be replaced. Where `former` is None, it is replaced.
    """
    out, new = Path(out), Path(out) / NEW
    stopped = new.exists()  # the run before was stopped, and its files may have moved
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield make_folder(new)
        names = sorted((path.name for path in new.iterdir()), key=lambda name: (name == SUMMARY, name))
        for name in names if former is not None and not stopped else ():
            if name not in (SUMMARY, *former) and (out / name).exists():
                raise InputError(f"{out / name} is no file of an earlier result and would be replaced: move it, or "
                                 "give another --out")
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for name in (SUMMARY, *former) if former is not None else ():
        (out / name).unlink(missing_ok=True)
    for name in names:
        os.replace(new / name, out / name)
    shutil.rmtree(new, ignore_errors=True)


def former_files(out, keys):
    """The names of the files that an earlier result left in the folder `out`, by its summary.json, which has `keys`.

    Raises InputError where that summary lacks them, or does not list the files: they could not be told from the next
    ones.
    """
    try:
        found = json.loads((Path(out) / SUMMARY).read_text())
        [found[key] for key in keys]
        return [name for name in found["files"] if (Path(out) / name).resolve().is_relative_to(Path(out).resolve())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{Path(out) / SUMMARY} is of another program, or does not say which files belong to it: "
                         "empty the folder or give another --out") from error


def check_apart(inputs, outputs):
    """Raises InputError where one of the files `inputs` is one of `outputs`, and would be replaced."""
    taken = {os.path.realpath(path) for path in outputs}
    for path in inputs:
        if os.path.realpath(path) in taken:
            raise InputError(f"{path} would be replaced by the result: give another --out")


@contextlib.contextmanager
def alone_in(folder, shared=False, wait=False):
    """A context that locks the folder for this process.

    Args:
      folder: an existing folder. The lock is the file .lock in it.
      shared: lock it together with others that share it.
      wait: wait until the folder is free.

    Raises InputError where another process has locked it, unless `wait`.
    """
    with (Path(folder) / ".lock").open("w") as file:  # the system unlocks it however the process ends
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise InputError(f"{folder} is in use by another run: wait for it, stop it, or take another "
                             "folder") from error
        yield


def read_rows(path):
    """The rows of a file of JSON lines, in order. A missing file has no rows.

    A last line without its end is left out, because a process that is killed can leave half a line.
    """
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]


def rows_text(rows):
    """The text of rows as JSON lines."""
    return "".join(json_text(row) + "\n" for row in rows)


def json_text(x, indent=None):
    """x as JSON. Numbers that are not finite become null, because JSON has no NaN and strict readers refuse it."""
    return json.dumps(finite(x), indent=indent, allow_nan=False)


def write_json(path, x):
    """Write x as JSON, by `json_text`, complete or not at all. Raises InputError where the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(x, indent=2) + "\n")


def finite(x):
    """x with None for every number in it that is not finite; tuples become lists, as in JSON."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def check_folder(path):
    """Raises InputError where `make_folder` would fail. It is a check before long work, and creates no folder."""
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be made a folder ({there} is a file or not writable): give another one")


def make_folder(path):
    """Make the folder `path` if it is missing, and return it as a Path. Raises InputError where it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made a folder ({error.strerror}): give another one") from error
    return Path(path)


def checksum(path):
    """The CRC-32 of a file, which tells whether it was changed; None where it cannot be read."""
    found = 0
    try:
        with open(path, "rb") as file:
            while part := file.read(2**24):
                found = zlib.crc32(part, found)
    except OSError:
        return None
    return found


def names_apart(paths, out, name):
    """The names of files, by the function `name`, for the results in `out`.

    Raises InputError where two have one name, on a disk that does not tell upper from lower case as well.
    """
    names = [name(path) for path in paths]
    if len({one.casefold() for one in names}) < len(names):
        raise InputError(f"{', '.join(map(str, paths))}: two images have one name, and would overwrite each other in "
                         f"{out}; give them in two calls with another --out")
    return names


def stem(path):
    """The name of an image file without its ending: site1.001 of site1.001.nii.gz."""
    name = Path(path).name
    return name[:len(name) - len(next(filter(name.lower().endswith, IMAGE_ENDINGS), ""))]
