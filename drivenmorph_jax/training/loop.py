"""The training loop: a run reads data, takes steps, validates, saves checkpoints, and is scored at its end."""

import time
from contextlib import closing, nullcontext
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

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
from drivenmorph_jax.runtime.logs import Logs
from drivenmorph_jax.runtime.memory import trim_memory
from drivenmorph_jax.runtime.provenance import environment
from drivenmorph_jax.training.step import compiled_step, make_augment, make_optimizer
from drivenmorph_jax.training.stopping import terminated

MAX_SKIPPED = 10  # steps in a row whose loss or gradient is not finite, after which a run ends


def train_and_evaluate(config: ConfigDict, workdir: str | Path, memory: float | None = None) -> dict | None:
    """Train a network and score it on held-out pairs. A run in `workdir` that was stopped is continued.

    Args:
      config: as `configs/default.py` makes it; `init` names a checkpoint to start from, whose levels are the coarsest
        of this model.
      workdir: gets the checkpoints `latest/` and `best/`, `metrics.jsonl`, `tensorboard/` and `evaluation/`.
      memory: as in `compiled_step`.

    Returns:
      The summary of `evaluate` on the test pairs. None from any process but the first, and from a run that SIGTERM
      stopped: such a run saves the step that it has reached and ends.

    Raises:
      InputError: a setting that does not fit the data or the devices, a checkpoint of another model, another run in
        `workdir`, no space for a checkpoint, or MAX_SKIPPED steps in a row whose loss or gradient is not finite.
    """
    workdir = make_folder(workdir)
    with alone_in(workdir) if jax.process_index() == 0 else nullcontext():
        run = Run(config, workdir, memory)
        with terminated() as (stopping, unsaved), closing(run.logs), closing(run.latest), closing(run.best):
            finished = _steps(run, stopping, unsaved)
        return run.scores() if finished else None


def _steps(run, stopping, unsaved):
    """Take all remaining steps, with validations and checkpoints. False where the run was stopped before the last."""
    config, alone = run.config, jax.process_count() == 1
    for step in range(run.start + 1, config.steps + 1):
        last = step == config.steps
        validates = step % config.val_every == 0 or last
        if validates and step - 1 > (run.latest.latest_step() or 0):
            # Validation may take minutes. A run that is stopped meanwhile continues from this step.
            run.keep(step - 1)
        run.read_batch()
        unsaved.set()
        run.step(step)
        # Several processes must end at the same step, which the JAX runtime chooses.
        ending = stopping.is_set() if alone else run.latest.reached_preemption(step)
        if validates:
            if ending and alone:
                return _stopped(step - 1)
            unsaved.clear()
            scores = run.validate()
            unsaved.set()
            run.record(scores)
            run.keep_best(step, scores)
        if step % config.checkpoint_every == 0 or last or ending:
            run.keep(step)
        if ending and not last:
            return _stopped(step)
    return True


def _stopped(step):
    if jax.process_index() == 0:
        print(f"\nstopped at step {step}, which is saved; the same command continues from it")
    return False


class Run:
    """One run: its data, its state (parameters, state of the optimizer, position in the data), its writers.

    `start` is the step of the checkpoint from which the run continues, 0 where there is none.
    """

    def __init__(self, config, workdir, memory):
        self.config, self.workdir, self.memory = config, workdir, memory
        self.mesh = sharding.device_mesh(config.space)
        _check(config, self.mesh)
        self.dataset, self.batches, self.augment = _data(config, self.mesh)
        self.training_pairs, self.optimizer = self.dataset.pairs("train"), make_optimizer(config)
        self.latest, self.best = (checkpoint.manager(workdir / name) for name in ("latest", "best"))
        self.shapes, self.start, self.params, self.opt_state = _state(self)
        self.about = {"config": config.to_dict(), "environment": environment(), "spacing": self.dataset.spacing,
                      "data": self.dataset.name, "exclude": list(self.dataset.exclude)}
        best = self.best.latest_step()
        self.best_score = checkpoint.read_about(workdir / "best")["score"] if best else -np.inf
        self.logs = Logs(workdir, self.start, config.steps, jax.process_index() == 0)
        self.compiled = self.waiting = None
        self.skipped, self.began = 0, time.perf_counter()

    def read_batch(self):
        """Read the next batch. For the first batch, also compile the step for its shapes."""
        batch = next(self.batches)
        self.pairs = batch.pop("pair")
        self.batch = self.augment(sharding.global_batch(batch, self.mesh))
        if self.compiled is None:
            self.compiled, self.config = compiled_step(self.optimizer, self.config, self.mesh, self.params,
                                                       self.opt_state, self.batch, self.memory)
            self.about["config"], self.predict = self.config.to_dict(), make_predict(self.config)

    def step(self, step):
        """Take one step on the batch that was read.

        It logs the numbers of the step before, so that the host need not wait for those of this step.
        """
        self.params, self.opt_state, row = self.compiled(self.params, self.opt_state, self.batch)
        row["seconds"] = time.perf_counter() - self.began
        self.record()
        self.waiting = step, self.pairs, row

    def record(self, extra=None):
        """Log the step whose numbers are not logged yet, with the numbers `extra`.

        Raises InputError after MAX_SKIPPED steps in a row whose loss or gradient is not finite.
        """
        if self.waiting is None:
            return
        (step, pairs, row), self.waiting = self.waiting, None
        row = {key: float(value) for key, value in jax.device_get(row).items()}
        bad = [name for name in ("loss", "gradient_norm") if not np.isfinite(row[name])]
        if not bad:
            self.skipped = 0
            self.logs.write(step, row | (extra or {}))
            return
        self.skipped += 1
        names = ", ".join(f"{moving.id} to {fixed.id}" for fixed, moving in (self.training_pairs[i] for i in pairs))
        told = f"{bad[0]} is {row[bad[0]]} at step {step}, {names}"
        if self.skipped == MAX_SKIPPED:
            raise InputError(f"{told}, and so were the {self.skipped - 1} steps before: lower learning_rate or look at "
                             f"these images; {self.workdir / 'latest'} holds the last good checkpoint")
        self.logs.skip(step, f"{told}: the step is skipped", extra)

    def keep(self, step):
        """Save the state after this step. The next run continues from it."""
        self.record()
        checkpoint.save(self.latest, step, self.about | {"step": step}, self.params, self.opt_state,
                        self.batches.get_state())

    def validate(self):
        """Scores of the val pairs. Every process scores all pairs, with a copy of the parameters on one device."""
        here = jax.tree.map(lambda x: x.addressable_data(0), self.params)
        scores = validate(self.predict, here, self.dataset, self.config.space)
        trim_memory()
        return scores

    def keep_best(self, step, scores):
        """Save the parameters if their score is the best so far, or the first; the first may be nan."""
        score = scores["val_dice" if "val_dice" in scores else "val_lncc"]
        if score > self.best_score or not self.best.latest_step():
            self.best_score = score
            checkpoint.save(self.best, step, self.about | {"score": score, "step": step}, self.params)

    def scores(self):
        """`evaluate` the best parameters on the test pairs; on the val pairs where there are fewer than 2 test
        subjects."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params = checkpoint.read_params(self.workdir / "best", jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self.shapes))
        split = "test" if len(self.dataset.test) > 1 else "val"
        if jax.process_index() == 0:
            return evaluate(self.config, params, self.dataset, split, self.workdir / "evaluation",
                            training=self.workdir)


def _check(config, mesh):
    """Raises InputError for settings that do not fit each other or the devices."""
    make_network(config.model)
    if config.loss.similarity not in SIMILARITIES:
        raise InputError(f"loss.similarity is {config.loss.similarity!r}: set it to one of {', '.join(SIMILARITIES)}")
    if config.loss.window < 1 or config.loss.window % 2 == 0:
        raise InputError(f"loss.window is {config.loss.window}: set it to an odd number of voxels")
    shares = mesh.shape["data"]
    if config.batch_size % shares:
        raise InputError(f"batch_size is {config.batch_size}, which {mesh.size} devices, {config.space} to a volume, "
                         f"cannot share: set --config.batch_size={shares * -(-config.batch_size // shares)}")
    sides = grid_multiple(config) // config.data.downsample
    if any(side % sides for side in config.data.crop):
        raise InputError(f"data.crop is {tuple(config.data.crop)}: make every side a multiple of {sides}, or 0 for the "
                         "whole image")


def _data(config, mesh):
    """(the data set, its training batches, the random augmentation of a batch)."""
    dataset = data.load(config.data, multiple=grid_multiple(config))
    if len(dataset.val) < 2:
        raise InputError(f"{dataset.name} has {len(dataset.val)} subjects in its val split: put at least 2 there")
    with_labels = config.loss.dice > 0
    batches = data.training_batches(dataset.train, config.batch_size // jax.process_count(), config.seed,
                                    atlas=dataset.atlas, downsample=config.data.downsample, with_labels=with_labels)
    whole = [n // config.data.downsample for n in dataset.train[0].image.shape]
    if any(side > n for side, n in zip(config.data.crop, whole, strict=True)):
        raise InputError(f"data.crop is {tuple(config.data.crop)}, larger than the images of {tuple(whole)}: "
                         "set it lower")
    labels = np.setdiff1d(np.unique([s.labels for s in dataset.train]), dataset.exclude) if with_labels else None
    return dataset, batches, make_augment(config, mesh, labels)


def _state(run):
    """(shapes of the parameters, step, parameters, state of the optimizer): of the newest checkpoint, else initial."""
    config, whole = run.config, sharding.replicated(run.mesh)
    initial = _initial(make_network(config.model), run.optimizer, 2 * multiple(config.model), whole)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                          initial.eval_shape(config.seed))
    found = checkpoint.restore(run.latest, *shapes)
    if found:
        start, params, opt_state, place = found
        run.batches.set_state(place)
        return shapes[0], start, params, opt_state
    params, opt_state = initial(config.seed)
    if config.init:
        params = checkpoint.read_into(config.init, params)
    return shapes[0], 0, params, opt_state


@lru_cache(maxsize=8)
def _initial(model, optimizer, side, whole):
    """Jitted: seed -> (initial parameters, initial state of the optimizer). One process traces and compiles it once."""
    image = jnp.zeros((1, side, side, side, 1))

    def initial(seed):
        # XLA on CPU takes a second to compile threefry, the default random generator of JAX, for each of the kernels.
        params = model.init(jax.random.key(seed, impl="rbg"), image, image)["params"]
        return params, optimizer.init(params)

    return jax.jit(initial, out_shardings=whole, compiler_options=programs.compiler_options(), static_argnums=0)
