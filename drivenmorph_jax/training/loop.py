"""Training, read from top to bottom: data, shapes, shardings, the step, the loop, the scores."""

import time
from contextlib import closing, nullcontext

import jax
import jax.numpy as jnp
import numpy as np

from drivenmorph_jax import data
from drivenmorph_jax.backends import programs
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation.evaluate import evaluate
from drivenmorph_jax.evaluation.validation import validate
from drivenmorph_jax.files import alone_in, make_folder
from drivenmorph_jax.network.inference import grid_multiple, make_predict
from drivenmorph_jax.network.losses import SIMILARITIES
from drivenmorph_jax.network.networks import make_network, multiple
from drivenmorph_jax.runtime import checkpoint, sharding
from drivenmorph_jax.runtime.checkpoint import manager, read_about, read_into, read_params, restore
from drivenmorph_jax.runtime.logs import Logs
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.training.step import compiled_step, make_augment, make_optimizer
from drivenmorph_jax.training.stopping import terminated, trim_memory

MAX_SKIPPED = 10  # steps in a row that are not finite, before a run gives up


def train_and_evaluate(config, workdir, memory=None):
    """Train a network, or go on where the last run in `workdir` was stopped, and score it on held-out pairs.

    Args:
      config: as `configs/default.py` makes it; `init` names a checkpoint to begin with, whose levels are the coarsest
        of this model.
      workdir: gets `latest/` and `best/` checkpoints, `metrics.jsonl`, `tensorboard/` and `evaluation/`.
      memory: as in `compiled_step`.

    Returns:
      The summary of `evaluate` on the test pairs; None from any process but the first, and from a run that SIGTERM
      stopped: it saves the step that it is at and ends.

    Raises:
      InputError: a setting that does not fit the data or the devices, a checkpoint of another model, another run in
        `workdir`, no room for a checkpoint, or MAX_SKIPPED steps in a row whose loss or gradient is not finite.
    """
    workdir = make_folder(workdir)
    with alone_in(workdir) if jax.process_index() == 0 else nullcontext():
        return _train_and_evaluate(config, workdir, memory)


def _train_and_evaluate(config, workdir, memory):
    model, mesh = make_network(config.model), sharding.device_mesh(config.space)
    if config.loss.similarity not in SIMILARITIES:
        raise InputError(f"loss.similarity is {config.loss.similarity!r}: set it to one of {', '.join(SIMILARITIES)}")
    shares = mesh.shape["data"]
    if config.batch_size % shares:
        raise InputError(f"batch_size is {config.batch_size}, which {mesh.size} devices, {config.space} to a volume, "
                         f"cannot share: set --config.batch_size={shares * -(-config.batch_size // shares)}")
    dataset = data.load(config.data, multiple=grid_multiple(config))
    if len(dataset.val) < 2:
        raise InputError(f"{dataset.name} has {len(dataset.val)} subjects in its val split: put at least 2 there")
    sides = grid_multiple(config) // config.data.downsample
    if any(side % sides for side in config.data.crop):
        raise InputError(f"data.crop is {tuple(config.data.crop)}: make every side a multiple of {sides}, or 0 for the "
                         "whole image")
    with_labels = config.loss.dice > 0
    batches = data.training_batches(dataset.train, config.batch_size // jax.process_count(), config.seed,
                                    atlas=dataset.atlas, downsample=config.data.downsample, with_labels=with_labels)
    whole = [n // config.data.downsample for n in dataset.train[0].image.shape]
    if any(side > n for side, n in zip(config.data.crop, whole, strict=True)):
        raise InputError(f"data.crop is {tuple(config.data.crop)}, larger than the images of {tuple(whole)}: "
                         "set it lower")
    labels = np.setdiff1d(np.unique([s.labels for s in dataset.train]), dataset.exclude) if with_labels else None
    augment = make_augment(config, mesh, labels)

    optimizer = make_optimizer(config)
    side = 2 * multiple(config.model)
    image = jnp.zeros((1, side, side, side, 1))

    def init():
        # XLA on CPU takes a second to compile threefry, JAX's usual generator, for each of the kernels.
        params = model.init(jax.random.key(config.seed, impl="rbg"), image, image)["params"]
        return params, optimizer.init(params)

    whole = sharding.replicated(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init))
    latest, best = (manager(workdir / name) for name in ("latest", "best"))
    found, start = restore(latest, *shapes), 0
    if found:
        start, params, opt_state, state = found
        batches.set_state(state)
    else:
        params, opt_state = jax.jit(init, out_shardings=whole, compiler_options=programs.compiler_options())()
        if config.init:
            params = read_into(config.init, params)
    about = {"config": config.to_dict(), "environment": environment(), "spacing": dataset.spacing,
             "data": dataset.name, "exclude": list(dataset.exclude)}
    best_score = read_about(workdir / "best")["score"] if best.latest_step() else -np.inf

    training_pairs, compiled = dataset.pairs("train"), None
    logs = Logs(workdir, start, config.steps, jax.process_index() == 0)
    waiting, skipped = None, 0

    def record(extra=None):
        """Log the step before the one that runs now: waiting for its numbers costs no time then."""
        nonlocal waiting, skipped
        if waiting is None:
            return
        (step, pairs, row), waiting = waiting, None
        row = {key: float(value) for key, value in jax.device_get(row).items()}
        bad = [name for name in ("loss", "gradient_norm") if not np.isfinite(row[name])]
        if not bad:
            skipped = 0
            logs.write(step, row | (extra or {}))
            return
        skipped += 1
        names = ", ".join(f"{moving.id} to {fixed.id}" for fixed, moving in (training_pairs[i] for i in pairs))
        told = f"{bad[0]} is {row[bad[0]]} at step {step}, {names}"
        if skipped == MAX_SKIPPED:
            raise InputError(f"{told}, and so were the {skipped - 1} steps before: lower learning_rate or look at "
                             f"these images; {workdir / 'latest'} holds the last good checkpoint")
        logs.skip(step, f"{told}: the step is skipped", extra)

    began = time.perf_counter()

    def keep(step):
        """Save the state after this step, with which the next run goes on."""
        record()
        checkpoint.save(latest, step, about | {"step": step}, params, opt_state, batches.get_state())

    def stopped(step):
        if jax.process_index() == 0:
            print(f"\nstopped at step {step}, which is saved; the same command goes on from there")

    with terminated() as (stopping, unsaved), closing(logs), closing(latest), closing(best):
        for step in range(start + 1, config.steps + 1):
            last = step == config.steps
            validates = step % config.val_every == 0 or last
            if validates and step - 1 > (latest.latest_step() or 0):
                # A run that is stopped while it validates, which may take minutes, goes on from here.
                keep(step - 1)
            batch = next(batches)
            pairs = batch.pop("pair")
            batch = augment(sharding.global_batch(batch, mesh))
            if compiled is None:
                compiled, config = compiled_step(optimizer, config, mesh, params, opt_state, batch, memory)
                about["config"], predict = config.to_dict(), make_predict(config)
            unsaved.set()
            params, opt_state, row = compiled(params, opt_state, batch)
            row["seconds"] = time.perf_counter() - began
            record()
            waiting = step, pairs, row
            # Several processes must end at the same step: the runtime agrees on one.
            ending = stopping.is_set() if jax.process_count() == 1 else latest.reached_preemption(step)
            if validates:
                if ending and jax.process_count() == 1:
                    return stopped(step - 1)
                unsaved.clear()
                # A copy on one device: every process scores all pairs by itself.
                here = jax.tree.map(lambda x: x.addressable_data(0), params)
                scores = validate(predict, here, dataset, config.space)
                trim_memory()
                unsaved.set()
                score = scores["val_dice" if "val_dice" in scores else "val_lncc"]
                record(scores)
                if score > best_score or not best.latest_step():  # a first score may be nan
                    best_score = score
                    checkpoint.save(best, step, about | {"score": score, "step": step}, params)
            if step % config.checkpoint_every == 0 or last or ending:
                keep(step)
            if ending and not last:
                return stopped(step)

    params = read_params(workdir / "best", jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                       sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0])), shapes[0]))
    split = "test" if len(dataset.test) > 1 else "val"
    if jax.process_index() == 0:
        return evaluate(config, params, dataset, split, workdir / "evaluation", training=workdir)
