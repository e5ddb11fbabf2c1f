"""Checkpoints, by Orbax: `latest` to go on from, `best` (on the validation pairs) to use.

A checkpoint holds `params`; `about`: the configuration, the git commit and what a user of the parameters must know;
and in `latest` also `opt_state` and `data`, the state of the input pipeline.
"""

import logging
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from drivenmorph_jax.errors import InputError

SHIPPED = Path(__file__).resolve().parents[1] / "weights" / "brain-t1"

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every step that it takes


def manager(folder):
    """Writer of checkpoints in `folder`, asynchronous; the last one stays until the next one is whole."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(manager, step, about, params, opt_state=None, data=None):
    """Write one checkpoint; returns before it is on disk. `about` and `data` are made of what JSON knows."""
    items = {"params": ocp.args.StandardSave(params), "about": ocp.args.JsonSave(about)}
    if opt_state is not None:
        items |= {"opt_state": ocp.args.StandardSave(opt_state), "data": ocp.args.JsonSave(data)}
    manager.save(step, args=ocp.args.Composite(**items))


def restore(manager, params, opt_state):
    """(params, opt_state, data) of the latest checkpoint; the first two given as ShapeDtypeStructs with shardings.

    Raises InputError where the checkpoint belongs to another model or is damaged.
    """
    _check(manager.directory, manager.directory / str(manager.latest_step()), params)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(params), data=ocp.args.JsonRestore(),
                              opt_state=ocp.args.StandardRestore(opt_state))
    try:
        found = manager.restore(manager.latest_step(), args=args)
    except Exception as error:  # Orbax raises nearly anything
        raise InputError(f"{manager.directory} holds a checkpoint of another model, or a damaged one: "
                         "use another --workdir, or the settings that it was made with") from error
    return found.params, found.opt_state, found.data


def read_about(folder):
    """`about` of the checkpoint in a training's folder, or in its `best` or `latest`.

    Raises InputError where there is none.
    """
    path = _newest(folder)
    try:
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "about")
    except Exception as error:
        raise InputError(f"{folder} is not a checkpoint of drivenmorph_jax (no readable {path / 'about'}): "
                         "give the --workdir of a training") from error


def read_params(folder, params):
    """The parameters, in the shapes and shardings of the ShapeDtypeStructs `params`; `folder` as in `read_about`.

    Raises InputError where they belong to another model or are damaged.
    """
    path = _newest(folder)
    _check(folder, path, params)
    try:
        return ocp.StandardCheckpointer().restore(path / "params", params)
    except Exception as error:
        raise InputError(f"{folder} holds a damaged checkpoint: use another, or train again") from error


def read_into(folder, params):
    """`params` with those that the checkpoint holds in their place: a model may have levels that it has not.

    Raises InputError where the checkpoint holds parameters that `params` lacks or has in another shape.
    """
    path, found = _newest(folder), flatten_dict(params)
    stored = flatten_dict(_stored(folder, path))
    for name, x in stored.items():
        if name not in found or found[name].shape != x.shape:
            wanted = found[name].shape if name in found else "none"
            raise InputError(f"{folder} cannot begin this model: it holds {'/'.join(name)} of shape {tuple(x.shape)}, "
                             f"the model {wanted}; give one whose levels are the coarsest of this model")
    return unflatten_dict(found | flatten_dict(read_params(
        folder, unflatten_dict({name: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype,
                                                           sharding=found[name].sharding) for name in stored}))))


def git_commit():
    """The commit of the source tree, "-dirty" added where files differ from it; None where it is no git tree."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment():
    """What a result depends on besides its inputs: commit, versions, devices."""
    return {"commit": git_commit(), "python": platform.python_version(), "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(), **{name: version(name) for name in ("jax", "flax", "numpy", "SimpleITK")}}


def _newest(folder):
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give the --workdir of a training")
    for place in (folder / "best", folder / "latest", folder):
        steps = [int(path.name) for path in place.glob("*") if path.name.isdigit()] if place.is_dir() else []
        if steps:
            return place / str(max(steps))
    if (folder / "params").is_dir():
        return folder
    raise InputError(f"{folder} holds no checkpoint: give the --workdir of a training, or its best or latest")


def _stored(folder, path):
    """Shapes and types of the parameters on disk."""
    try:
        return ocp.StandardCheckpointHandler().metadata(Path(path) / "params").tree
    except Exception as error:
        raise InputError(f"{folder} holds a damaged checkpoint: use another, or train again") from error


def _check(folder, path, wanted):
    """Compare shapes before anything is read: Orbax restores a part of a tree without a word, and of another shape it
    complains once more, with a traceback, when the program ends."""
    stored = _stored(folder, path)
    same = jax.tree.structure(stored) == jax.tree.structure(wanted) and all(
        a.shape == b.shape for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(wanted), strict=True))
    if not same:
        raise InputError(f"{folder} belongs to another model: use it with the settings that it was trained with")
