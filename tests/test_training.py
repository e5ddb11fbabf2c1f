import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from configs import malf
from configs.smoke import get_config
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import alone_in
from drivenmorph_jax.network.inference import load_checkpoint, make_predict
from drivenmorph_jax.runtime import logs, sharding
from drivenmorph_jax.runtime.checkpoint import _newest, manager, read_about
from drivenmorph_jax.runtime.provenance import git_commit
from drivenmorph_jax.training import loop, step
from drivenmorph_jax.training.loop import train_and_evaluate
from drivenmorph_jax.training.step import chosen_labels, compiled_step, make_augment, make_optimizer

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).resolve().parents[1]


# One level with both attentions, which compiles sooner than the two of `configs/smoke.py`.
ONE_LEVEL = {"channels": (4,), "strides": (2,), "updates": (1,), "cross_radius": (1,), "self_radius": (0,),
             "self_window": (4,)}


def one_level(**changes):
    """The smoke run of a network of one level."""
    config = get_config()
    config.model.update(ONE_LEVEL | changes)
    return config


def small_folder(folder):
    """A data set of five images of noise, which are read sooner than the embedded cohort is made."""
    folder.mkdir()
    for k, image in enumerate(gaussian_filter(np.random.default_rng(0).random((5, 16, 20, 16)), (0, 2, 2, 2))):
        image = np.int16(1e4 * (image - image.min()))
        nib.save(nib.Nifti1Image(image, np.diag([10, 10, 10, 1])), folder / f"{k}_t1.nii.gz")
    (folder / "splits.json").write_text(json.dumps({"train": ["0", "1", "2"], "val": ["3", "4"], "test": []}))
    return folder


def small_run(folder, **settings):
    """A run of a network of one level without attention, which compiles sooner, on `small_folder`."""
    config = malf.get_config()
    config.model.update(ONE_LEVEL | {"cross_radius": (0,), "self_window": (0,)})
    config.data.update(root=str(folder), downsample=1, flip=False, intensity=0.0, bias=0.0, noise=0.0)
    config.update(settings)
    return config


def latest_bits(workdir):
    """Every array in the newest `latest` checkpoint, and the state of its data."""
    import orbax.checkpoint as ocp
    path = _newest(Path(workdir) / "latest")
    arrays = [ocp.StandardCheckpointer().restore(path / item) for item in ("params", "opt_state")]
    data = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "data")
    return [np.asarray(x) for x in jax.tree.leaves(arrays)], data


def test_a_run_learns_and_leaves_what_it_promises(smoke):
    workdir, summary = smoke
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert {"similarity", "smoothness", "level", "force", "gradient_norm", "update_norm"} <= set(rows[0])
    assert "val_dice" in rows[2] and "val_dice" in rows[5] and "val_dice" not in rows[1]
    assert list((workdir / "tensorboard").glob("events*"))
    about = read_about(workdir)
    assert about["config"]["steps"] == 6 and {"environment", "spacing", "score"} <= set(about)
    assert about["environment"]["commit"] == git_commit()
    assert summary["dice"]["mean"] > summary["dice_initial"]["mean"] + 0.02
    assert summary["fold_pct"]["mean"] < 0.01 and summary["inverse_mm"]["mean"] < 1.0


def test_a_run_that_was_stopped_goes_on_bit_for_bit(smoke, tmp_path, monkeypatch):
    workdir, summary = smoke
    make = compiled_step

    def dying(*arguments):
        (step, config), calls = make(*arguments), iter(range(1, 7))

        def until_five(*state):
            if next(calls) == 5:
                raise KeyboardInterrupt  # step 4 is done but in no checkpoint
            return step(*state)
        return until_five, config

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compiled_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(get_config(), tmp_path)
    assert not (tmp_path / "evaluation").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a killed process may leave half a line
    again = train_and_evaluate(get_config(), tmp_path)

    (arrays, data), (wanted, wanted_data) = latest_bits(tmp_path), latest_bits(workdir)
    assert data == wanted_data
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    without_time = [[{k: v for k, v in row.items() if k != "seconds"} for row in logs.read(folder)]
                    for folder in (tmp_path, workdir)]
    assert without_time[0] == without_time[1]
    assert again["dice"] == summary["dice"]


def test_sigterm_saves_the_step_and_ends_and_the_next_run_goes_on(smoke, tmp_path, monkeypatch, capsys):
    real, calls = sharding.global_batch, []

    def interrupted(batch, mesh):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "global_batch", interrupted)
        assert train_and_evaluate(get_config(), tmp_path) is None
    assert "stopped at step 2, which is saved" in capsys.readouterr().out
    assert len(calls) == 2 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    while_scoring = []
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: while_scoring.append(signal.getsignal(signal.SIGTERM)))
    train_and_evaluate(get_config(), tmp_path)
    assert while_scoring == [signal.SIG_DFL]  # nobody would look at the event there
    for a, b in zip(latest_bits(tmp_path)[0], latest_bits(smoke[0])[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_needs_more_memory_than_there_is_is_refused(tmp_path, monkeypatch):
    class Device:
        process_index = 0

        def memory_stats(self):
            return {"bytes_limit": 2**20}
    monkeypatch.setattr(step, "jax", SimpleNamespace(**vars(jax) | {"local_devices": lambda: [Device()]}))
    with pytest.raises(InputError, match="a step on images of 32x40x32 takes .* GiB .*, more than 0.0: set"):
        train_and_evaluate(get_config(), tmp_path)


def test_with_less_memory_a_step_is_rematerialised_then_in_bfloat16(tmp_path, monkeypatch, capsys):
    config = one_level(cross_radius=(0,), self_window=(0,))  # no attention: it compiles sooner
    compiled = sharding.compiled_and_memory
    config.steps, needed = 1, iter((3e9, 2e9, 1e9))

    def third(lowered, limit):  # the other two are lowered and not compiled, since nobody runs them
        memory = next(needed)
        return compiled(lowered, limit)[0] if memory == 1e9 else None, memory

    monkeypatch.setattr(loop, "evaluate", lambda config, *_, **__: config)
    monkeypatch.setattr(sharding, "compiled_and_memory", third)
    found = train_and_evaluate(config, tmp_path, memory=1.5e9)
    assert found.model.remat and found.model.dtype == "bfloat16" and not config.model.remat
    assert "of 32x40x32, remat True, dtype bfloat16 takes 0.9 GiB" in capsys.readouterr().out
    assert read_about(tmp_path)["config"]["model"]["dtype"] == "bfloat16"


def test_a_crop_that_is_larger_than_the_images_is_one_sentence(tmp_path):
    config = get_config()
    config.data.crop = (0, 64, 0)
    with pytest.raises(InputError, match="crop is .* larger than the images of"):
        train_and_evaluate(config, tmp_path)


def test_a_window_without_a_middle_voxel_is_one_sentence(tmp_path):
    config = get_config()
    config.loss.window = 8
    with pytest.raises(InputError, match="loss.window is 8: set it to an odd number"):
        train_and_evaluate(config, tmp_path)


def test_labels_for_the_dice_of_a_step_are_drawn_from_those_of_both_images():
    fixed, moving = np.zeros((2, 2, 4, 4, 4), np.int32)
    fixed[:, 0, 0], moving[:, 0, 0] = [1, 2, 3, 4], [5, 4, 3, 2]
    batch = {"fixed_labels": fixed, "moving_labels": moving, "key": np.uint32([[1, 2], [3, 4]])}
    batch |= {role: np.zeros((2, 4, 4, 4, 1), np.float32) for role in ("fixed", "moving")}
    config, mesh = get_config(), sharding.device_mesh(1, jax.local_devices()[:1])
    whole = make_augment(config, mesh, range(1, 7))(batch)["fixed_labels"]
    assert whole.shape[-1] == 6  # all labels
    np.testing.assert_array_equal(whole.argmax(-1) + whole.max(-1), fixed)

    seen, config.loss.dice_labels = set(), 2
    for seed in range(20):
        labels = [chosen_labels(np.uint32([seed, pair]), fixed[pair], moving[pair], range(1, 7), 2) for pair in (0, 1)]
        channels = np.reshape(labels, (2, 1, 1, 1, 2))
        found = make_augment(config, mesh, range(1, 7))(batch | {"key": np.uint32([[seed, 0], [seed, 1]])})
        for role, own in (("fixed", fixed), ("moving", moving)):
            np.testing.assert_array_equal(found[f"{role}_labels"], own[..., None] == channels)
        seen.update(*np.asarray(labels).tolist())
    assert seen == {2, 3, 4}
    filled = chosen_labels(np.uint32([0, 0]), fixed[0], moving[0], range(1, 7), 4)
    assert seen < set(filled.tolist()) <= set(range(1, 7))


def idle(_, config, *rest):
    """A `compiled_step` for what needs no step: it leaves the parameters as they are."""
    return lambda params, state, batch: (params, state, {"loss": 1.0, "gradient_norm": 1.0}), config


def test_a_first_score_that_is_no_number_still_leaves_a_best_checkpoint(tmp_path, monkeypatch):
    config = one_level()
    config.steps = 1
    monkeypatch.setattr(loop, "compiled_step", idle)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: "scored")
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_lncc": float("nan")})
    assert train_and_evaluate(config, tmp_path) == "scored"
    assert read_about(tmp_path / "best")["step"] == 1


def test_a_step_that_the_compiler_refuses_is_one_sentence(tmp_path, monkeypatch):
    tried = []

    def refuse():
        tried.append(0)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
                                         "HLO temporaries (20.31G) exceeds available HBM (15.75G).")
    lowered = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=refuse))
    monkeypatch.setattr(step, "make_train_step", lambda *_: lowered)
    with pytest.raises(InputError, match="bfloat16 takes 20.3 GiB of each device, more than 15.0: set a --config.data"):
        train_and_evaluate(one_level(), tmp_path, memory=15 * 2**30)
    assert len(tried) == 3


def test_a_program_orders_its_operations_for_little_memory():
    code = ("import jax, jax.numpy as jnp; from drivenmorph_jax.runtime import sharding; sharding.start(); "
            "f = lambda x: sum(jnp.sort(jnp.sin(x * i))[::7].sum() * jnp.cumsum(jnp.cos(x + i))[5] for i in range(8)); "
            "print(jax.jit(f).lower(jnp.zeros(1 << 20)).compile().memory_analysis().temp_size_in_bytes >> 22)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 13, done.stderr[-500:]  # 17 otherwise: two arrays for each of the eight, and one


def test_deterministic_is_a_flag_that_xla_knows():
    done = subprocess.run([sys.executable, "-c", "import jax, os; from drivenmorph_jax.runtime import sharding; "
                           "sharding.start(deterministic=True); jax.devices(); print(os.environ['XLA_FLAGS']); "
                           "sharding.start(deterministic=True); print(os.environ['XLA_FLAGS'])"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--xla_gpu_deterministic_ops=true" in done.stdout, done.stderr[-500:]
    once, twice = done.stdout.splitlines()
    assert twice == once  # else the cache of compiled programs would not find them again


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    with alone_in(tmp_path), pytest.raises(InputError, match="in use by another run"):
        train_and_evaluate(get_config(), tmp_path)


def test_a_finished_run_is_only_scored_again(smoke, tmp_path):
    folder, summary = smoke
    workdir = shutil.copytree(folder, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    again = train_and_evaluate(get_config(), workdir)
    assert again["dice"] == summary["dice"] and (workdir / "metrics.jsonl").read_text() == before


def poisoned(monkeypatch, steps):
    """The images of these steps are not a number."""
    real, calls = sharding.global_batch, []

    def global_batch(batch, mesh):
        calls.append(0)
        if len(calls) in steps:
            batch["fixed"] = np.full_like(batch["fixed"], np.nan)
        return real(batch, mesh)

    monkeypatch.setattr(sharding, "global_batch", global_batch)


def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, monkeypatch, capsys):
    config, seen = get_config(), []
    make = compiled_step

    def watched(*arguments):
        step, config = make(*arguments)

        def once(params, state, batch):
            params, state, row = step(params, state, batch)
            seen.append(jax.device_get((params, state)))
            return params, state, row
        return once, config

    monkeypatch.setattr(loop, "compiled_step", watched)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: None)
    poisoned(monkeypatch, {2})
    train_and_evaluate(config, tmp_path)
    rows = logs.read(tmp_path)
    assert "loss" in rows[0] and "loss" in rows[2] and set(rows[1]) == {"step", "skipped"}
    assert re.match(r"loss is nan at step 2, \S+ to \S+: the step is skipped", rows[1]["skipped"])
    assert rows[1]["skipped"] in capsys.readouterr().out
    for a, b in zip(jax.tree.leaves(seen[0]), jax.tree.leaves(seen[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(x[0]) for x in seen[1:3]), strict=True))


def test_a_run_whose_steps_are_never_finite_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 3)
    poisoned(monkeypatch, range(2, 7))
    with pytest.raises(InputError, match="at step 4, .* and so were the 2 steps before"):
        train_and_evaluate(get_config(), tmp_path)
    assert [row["step"] for row in logs.read(tmp_path)] == [1, 2, 3]


def test_a_damaged_checkpoint_is_left_for_the_one_before(smoke, tmp_path, capfd, monkeypatch):
    workdir, _ = smoke
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: None)
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "latest" / "6" / "opt_state").rglob("d/*"):  # some of them are copies that nobody reads
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    train_and_evaluate(get_config(), tmp_path)
    assert "latest/6 is damaged: an older checkpoint is looked for" in capfd.readouterr().err
    for a, b in zip(latest_bits(tmp_path)[0], latest_bits(workdir)[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_another_model_is_refused(smoke, tmp_path):
    workdir, _ = smoke
    config = get_config()
    config.model.channels = (4, 16)
    with pytest.raises(InputError, match="another model"):
        train_and_evaluate(config, workdir)
    with pytest.raises(InputError, match="model"):
        load_checkpoint(workdir, ["--config.model.channels=(4, 16)"])
    image = np.zeros((1, 32, 32, 32), np.float32)
    with pytest.raises(InputError, match="another version"):  # its own settings, but parameters of other names
        make_predict(get_config())({"level": load_checkpoint(workdir)[1]}, image, image)
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_model_with_a_finer_level_begins_with_the_parameters_of_a_coarser_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compiled_step", idle)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_dice": 0.5})
    finer = {"channels": (2, 4), "strides": (1, 2), "updates": (1, 1), "cross_radius": (0, 1), "self_radius": (0, 0),
             "self_window": (0, 4)}
    for name, changes in (("coarse", {"strides": (1,)}), ("fine", finer)):
        config = one_level(**changes)
        config.steps = 1
        config.init = str(tmp_path / "coarse") if name == "fine" else None
        train_and_evaluate(config, tmp_path / name)
    old, new = (dict(jax.tree.leaves_with_path(load_checkpoint(tmp_path / name)[1])) for name in ("coarse", "fine"))
    assert len(new) > len(old) > 4
    assert all(np.array_equal(new[path], x) for path, x in old.items())


def test_a_checkpoint_of_a_finer_model_is_no_beginning_for_a_coarser_one(smoke, tmp_path):
    config = get_config()
    config.init = str(smoke[0])
    for name in ("strides", "channels", "updates", "cross_radius", "self_radius", "self_window"):
        config.model[name] = config.model[name][1:]
    with pytest.raises(InputError, match="cannot begin this model: it holds .* of shape"):
        train_and_evaluate(config, tmp_path)


def test_schedule_warms_up_and_falls():
    config = get_config()
    config.steps, config.warmup_steps, config.learning_rate = 100, 10, 1e-3
    optimizer, params = make_optimizer(config), {"w": np.ones(3, np.float32)}
    state, sizes = optimizer.init(params), []
    for _ in range(100):
        update, state = optimizer.update({"w": np.full(3, 1e3, np.float32)}, state, params)
        sizes.append(float(abs(update["w"]).max()))
    assert sizes[0] < 1e-9 and np.argmax(sizes) == 10 and sizes[10] == pytest.approx(1e-3, rel=1e-3)
    assert sizes[-1] < 1e-5


# Before any test runs: programs add the order for little memory on CPU, which no other device has.
FLAGS = os.environ.get("XLA_FLAGS", "")


def start(devices, code, *arguments):
    """A process of its own that runs the code with so many devices."""
    # XLA's devices on CPU share a pool of as many threads; one that waits in two sums at once takes two, until none is
    # left for those that it waits for. More threads than can ever wait, then.
    environment = {"JAX_PLATFORMS": "cpu", "NPROC": "64", "PJRT_NPROC": "64",
                   "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)


def finish(process):
    """What it printed."""
    out, error = process.communicate(timeout=900)  # compilers may have to share the cores
    assert process.returncode == 0, error[-2000:]
    return out


DEVICES = f"ONE_LEVEL = {ONE_LEVEL}" + """
import jax, numpy as np
from ml_collections import FrozenConfigDict
from scipy.ndimage import gaussian_filter
from configs.smoke import get_config
from drivenmorph_jax.network.model import DrivenMorph
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.training.step import make_optimizer, make_train_step
config = get_config()
config.model.update(ONE_LEVEL)
config.warmup_steps = 0
model, optimizer = DrivenMorph(FrozenConfigDict(config.model)), make_optimizer(config)
rng = np.random.default_rng(0)
batch = {key: gaussian_filter(rng.random((2, 64, 16, 16, 1), np.float32), (0, 1, 1, 1, 0))
         for key in ("fixed", "moving")}
gradients = []
init = jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), *(x[:, :16] for x in batch.values()))["params"])()
for data, space in ((1, 1), (2, 4)):  # pairs alone are split by the test of two processes
    mesh = sharding.device_mesh(space, jax.devices()[:data * space])
    params = jax.device_put(jax.tree.map(np.asarray, init), sharding.replicated(mesh))
    state = jax.device_put(optimizer.init(params), sharding.replicated(mesh))
    split, losses, first = sharding.global_batch(batch, mesh), [], params
    assert {s.data.shape[:2] for s in split["fixed"].addressable_shards} == {(2 // data, 64 // space)}
    step = make_train_step(model, optimizer, config, mesh).lower(params, state, split).compile()
    memory = step.memory_analysis().temp_size_in_bytes
    for _ in range(3):
        params, state, row = step(params, state, split)
        losses.append(float(row["loss"]))
        if len(losses) == 1:  # of Adam's first moment the gradient is 10 times
            gradients.append(np.concatenate([x.ravel() for x in jax.tree.leaves(jax.device_get(state[1][0].mu))]))
    np.testing.assert_allclose(gradients[-1], gradients[0], atol=3e-4 * np.linalg.norm(gradients[0]))  # a sample at the
    # border of two cells may fall to either
    assert all(x.is_deleted() for x in jax.tree.leaves(first)), "the state is not donated"
    print(memory, *losses)
"""


def test_losses_and_gradients_are_the_same_on_every_mesh_and_a_split_volume_takes_less_memory():
    table = np.loadtxt(finish(start(8, DEVICES)).splitlines())
    memory, (one, *others) = table[:, 0], table[:, 1:]
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-4)
    assert one[-1] != one[0]
    assert memory[0] > 4 * memory[1] > 0


PREDICT = f"ONE_LEVEL = {ONE_LEVEL}" + """
import sys
import jax, numpy as np
sys.path.append("tests")
from test_training import small_run
from drivenmorph_jax import data
from drivenmorph_jax.network.inference import grid_multiple, make_predict, predictions
from drivenmorph_jax.network.networks import make_network
config = small_run(sys.argv[1], space=2)
config.model.update(ONE_LEVEL)
pairs = data.ordered_pairs(data.load(config.data, ("val",), grid_multiple(config)).val)
image = np.zeros((1, 16, 16, 16, 1), np.float32)
model, predict = make_network(config.model), make_predict(config, 3)
params = jax.jit(lambda: model.init(jax.random.key(0, impl="rbg"), image, image)["params"])()
one, two = ([fields[0] for fields, _ in predictions(predict, params, pairs, space)] for space in (1, 2))
assert len(one) == len(two) == 2 and abs(one[0]).max() > 1
for a, b in zip(one, two):
    np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)
"""


def test_a_volume_on_two_devices_is_registered_as_on_one(tmp_path):
    finish(start(2, PREDICT, small_folder(tmp_path / "images")))


SHARED = {"batch_size": 8, "warmup_steps": 1000, "learning_rate": 1.0}  # the same rate at a step, wherever a run ends
PROCESS = f"SHARED = {SHARED}" + """
import sys
sys.path.append("tests")
from test_training import small_run
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.training import loop
folder, workdir, steps, coordinator, processes, process = sys.argv[1:]
if coordinator:
    sharding.start(True, coordinator_address=coordinator, num_processes=int(processes), process_id=int(process))
loop.evaluate = lambda *_, **__: None
loop.validate = lambda *_: {"val_lncc": 0.5}
loop.train_and_evaluate(small_run(folder, steps=int(steps), **SHARED), workdir)
"""


def test_two_processes_train_as_one_end_together_and_their_checkpoint_goes_on_on_1_and_on_8_devices(
        tmp_path, monkeypatch):
    folder = small_folder(tmp_path / "images")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [start(2, PROCESS, folder, tmp_path / "two", 1000, address, 2, process) for process in (0, 1)]
    while len(logs.read(tmp_path / "two")) < 2 and all(process.poll() is None for process in pair):
        time.sleep(0.1)
    pair[1].terminate()
    for process in pair:
        finish(process)
    with manager(tmp_path / "two" / "latest") as latest:
        stopped = latest.latest_step()
    assert 2 <= stopped < 1000
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    finish(start(8, PROCESS, folder, tmp_path / "two", stopped + 1, "", 1, 0))
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(loop, "validate", lambda *_: {"val_lncc": 0.5})
    for name in ("one", "alone"):  # the second from its beginning
        train_and_evaluate(small_run(folder, steps=stopped + 1, **SHARED), tmp_path / name)
    two, one, alone = ([row["loss"] for row in logs.read(tmp_path / name)] for name in ("two", "one", "alone"))
    assert len(alone) == stopped + 1
    np.testing.assert_allclose(two, alone, rtol=1e-5)
    np.testing.assert_allclose(one, alone, rtol=1e-5)


def test_a_volume_is_not_split_over_processes():
    class Device:
        def __init__(self, process):
            self.process_index = process
    with pytest.raises(InputError, match="space is 4, which does not divide the 2 devices of a process"):
        sharding.device_mesh(4, [Device(1), Device(0), Device(1), Device(0)])


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch, tmp_path):
    class Mesh:
        size, shape = 3, {"data": 3}
    monkeypatch.setattr(sharding, "device_mesh", lambda space: Mesh)
    with pytest.raises(InputError, match="batch_size=3"):
        train_and_evaluate(get_config(), tmp_path)
