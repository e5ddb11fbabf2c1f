"""Checkpoints, written by Orbax: `latest`, from which a run continues, and `best` by the validation pairs, for use.

A checkpoint holds `params` and `about`: the configuration, the git commit and what a user of the parameters must know.
In `latest` it also holds `opt_state` and `data`, the state of the input pipeline.
"""

import copy
import hashlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.runtime.shipped import shipped

SHIPPED = shipped("weights", "brain-t1")


class Damaged(InputError):
    """A checkpoint that cannot be read, or whose values differ from those that were written."""


def manager(folder):
    """Writer of checkpoints in `folder`. It keeps the last two, in case the newer one is damaged."""
    # Not asynchronous: a run that is killed repeats at most one interval, and a full disk is reported at once. Writing
    # parameters and the state of the optimizer takes less than a second.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager, step, about, params, opt_state=None, data=None):
    """Write one checkpoint, and return when it is on disk. `about` and `data` must be valid JSON.

    Raises InputError where it cannot be written.
    """
    items = {"params": params, "about": about}
    if opt_state is not None:
        items |= {"opt_state": opt_state, "data": data}
    about = about | {"checksums": {name: digest(item) for name, item in items.items()}}
    arguments = {name: ocp.args.StandardSave(item) if name in ("params", "opt_state") else ocp.args.JsonSave(item)
                 for name, item in (items | {"about": about}).items()}
    try:
        with _json_once():
            manager.save(step, args=ocp.args.Composite(**arguments))
    except Exception as error:  # Orbax raises many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{manager.directory} cannot be written ({reason[:200]}): free some space; the same "
                         "command continues from the last checkpoint that is whole") from error


@contextmanager
def _json_once():
    """Within the block, saving a checkpoint leaks no memory.

    TensorStore (0.1.76 to 0.1.86) never frees the text of JSON that it turns into Python objects. For every array,
    Orbax asks it for the normal form of one path, and for statistics that Orbax only logs: 60 KB and more a save.
    Within the block Orbax gets the first answer again, and no statistics.
    """
    to_json, known = tensorstore.KvStore.Spec.to_json, {}

    def once(spec, *args, **kwargs):
        key = repr((spec, args, kwargs))
        if key not in known:
            known[key] = to_json(spec, *args, **kwargs)
        return copy.deepcopy(known[key])

    with (_replaced(tensorstore.KvStore.Spec, "to_json", once),
          _replaced(tensorstore, "experimental_collect_matching_metrics", lambda *_: [])):
        yield


@contextmanager
def _replaced(owner, name, value):
    before = vars(owner)[name]  # by `getattr`, the method of a compiled class would come without what binds it
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def digest(item):
    """SHA-256 of the values of a tree of arrays, or of an object that JSON can hold, as text."""
    found = hashlib.sha256()
    for path, x in jax.tree.leaves_with_path(item):
        if isinstance(x, jax.Array):
            x = np.asarray(x.addressable_data(0))  # replicated: every device has all of it
        found.update(jax.tree_util.keystr(path).encode())
        found.update(x.tobytes() if isinstance(x, np.ndarray) else json.dumps(x).encode())
    return found.hexdigest()


def _verify(path, name, item, checksums):
    """Raises Damaged where the item differs from the one that was written. Old checkpoints have no checksums."""
    if checksums and checksums.get(name) != digest(item):
        raise _damaged(path)


def restore(manager, params, opt_state):
    """(step, params, opt_state, data) of the newest checkpoint that is whole, or None where there is no checkpoint.

    `params` and `opt_state` are given as ShapeDtypeStructs with shardings. A damaged checkpoint is reported. It is
    removed once an older one is restored.

    Raises InputError where the checkpoint belongs to another model or holds a link, and Damaged where all checkpoints
    are damaged.
    """
    damaged = None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _restore_step(manager, step, params, opt_state)
        except Damaged as error:
            print(f"{manager.directory / str(step)} is damaged: an older checkpoint is looked for", file=sys.stderr)
            damaged = error
            continue
        for later in [s for s in manager.all_steps() if s > step]:
            manager.delete(later)
        return step, found.params, found.opt_state, found.data
    if damaged is not None:
        raise damaged
    return None


def _restore_step(manager, step, params, opt_state):
    path = _own(Path(manager.directory) / str(step))
    checksums = _about(path)["checksums"]
    _check(path, params)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(params), data=ocp.args.JsonRestore(),
                              opt_state=ocp.args.StandardRestore(opt_state))
    try:
        found = manager.restore(step, args=args)
    except Exception as error:
        raise _damaged(path) from error
    for name in ("params", "opt_state", "data"):
        _verify(path, name, found[name], checksums)
    return found


def read_about(folder):
    """`about` of the checkpoint in the folder of a training, or in its `best` or `latest`.

    Raises InputError where there is no checkpoint, and Damaged where its values differ from those that were written.
    """
    return _about(_newest(folder))


def _about(path):
    try:
        about = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "about")
        checksums = about.pop("checksums", {})
    except Exception as error:
        raise _damaged(path) from error
    _verify(path, "about", about, checksums)
    return about | {"checksums": checksums}


def _damaged(path):
    return Damaged(f"{path} is a damaged checkpoint, or none: delete it where an older one lies beside it, or give "
                   "another")


def read_shapes(folder):
    """Shapes and types of the parameters, as ShapeDtypeStructs; `folder` as in `read_about`.

    Raises Damaged where they cannot be read.
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _stored(_newest(folder)))


def read_params(folder, params):
    """The parameters, in the shapes and shardings of the ShapeDtypeStructs `params`; `folder` as in `read_about`.

    Raises InputError where they belong to another model, and Damaged where they differ from those that were written.
    """
    path = _newest(folder)
    _check(path, params)
    try:
        found = ocp.StandardCheckpointer().restore(path / "params", params)
    except Exception as error:
        raise _damaged(path) from error
    _verify(path, "params", found, _about(path)["checksums"])
    return found


def read_into(folder, params):
    """`params`, with the parameters of the checkpoint in place. The model may have levels that it lacks.

    Raises InputError where the checkpoint holds parameters that `params` lacks or has in another shape.
    """
    path, found = _newest(folder), flatten_dict(params)
    stored = flatten_dict(_stored(path))
    for name, x in stored.items():
        if name not in found or found[name].shape != x.shape:
            wanted = found[name].shape if name in found else "none"
            raise InputError(f"{folder} cannot begin this model: it holds {'/'.join(name)} of shape {tuple(x.shape)}, "
                             f"the model {wanted}; give one whose levels are the coarsest of this model")
    return unflatten_dict(found | flatten_dict(read_params(
        folder, unflatten_dict({name: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype,
                                                           sharding=found[name].sharding) for name in stored}))))


def _newest(folder):
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give the --workdir of a training")
    for place in (folder / "best", folder / "latest", folder):
        steps = [int(path.name) for path in place.glob("*") if path.name.isdigit()] if place.is_dir() else []
        if steps:
            return _own(place / str(max(steps)))
    if (folder / "params").is_dir():
        return _own(folder)
    raise InputError(f"{folder} holds no checkpoint: give the --workdir of a training, or its best or latest")


def _own(path):
    """`path`, a checkpoint, after a check that it holds files and folders only.

    TensorStore follows links. Through a link, a checkpoint from a stranger could read other files as parameters, and
    whoever shares a model trained from them would share these files (flax issue 5487).

    Raises InputError where the checkpoint holds anything else.
    """
    for part in path.rglob("*"):
        if part.is_symlink() or not (part.is_file() or part.is_dir()):
            raise InputError(f"{part} is a link or no file, which a checkpoint must not hold: if you trust it, copy "
                             "what it leads to in its place (cp -rL)")
    return path


def _stored(path):
    """Shapes and types of the parameters on disk."""
    try:
        return ocp.StandardCheckpointHandler().metadata(Path(path) / "params").tree
    except Exception as error:
        raise _damaged(path) from error


def _check(path, wanted):
    """Raises InputError where the shapes of the parameters on disk differ from those wanted.

    The shapes are compared before anything is read: Orbax restores a part of a tree without an error, and for another
    shape it reports its error once more, with a traceback, when the program ends.
    """
    stored = _stored(path)
    same = jax.tree.structure(stored) == jax.tree.structure(wanted) and all(
        a.shape == b.shape for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(wanted), strict=True))
    if not same:
        raise InputError(f"{path} belongs to another model: use it with the settings that it was trained with")
