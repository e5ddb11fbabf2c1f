"""A training that is killed again and again ends as one that was not. KILLS=30 is the long version."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_training import latest_bits, small_folder

from drivenmorph_jax.runtime import checkpoint, logs

ROOT, KILLS, EVERY = Path(__file__).resolve().parents[1], int(os.environ.get("KILLS", 2)), 3
STEPS = 10 + 6 * KILLS

RUN = """
import sys
sys.path.append("tests")
from test_training import small_run
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.training import loop
sharding.start()
folder, workdir, steps, every = sys.argv[1:]
loop.evaluate = lambda *_, **__: None
loop.validate = lambda *_: {"val_lncc": 0.5}
loop.train_and_evaluate(small_run(folder, steps=int(steps), checkpoint_every=int(every), val_every=10), workdir)
"""


def start(images, workdir, code=RUN, out=subprocess.DEVNULL):
    return subprocess.Popen([sys.executable, "-c", code, images, workdir, str(STEPS), str(EVERY)], cwd=ROOT, text=True,
                            stdout=out, stderr=subprocess.PIPE,
                            env=os.environ | {"JAX_PLATFORMS": "cpu"})


def end(process):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-2000:]


def last_step(workdir):
    rows = logs.read(workdir)
    return rows[-1]["step"] if rows else 0


def saved_step(workdir):
    with checkpoint.manager(workdir / "latest") as manager:
        return manager.latest_step() or 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Workdir of a training that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    end(start(images, workdir))
    return workdir


def test_a_training_that_is_killed_at_random_moments_ends_as_one_that_was_not(images, whole, tmp_path):
    rng, killed, repeated = random.Random(KILLS), [], []
    while len(killed) < KILLS:
        before = last_step(tmp_path / "killed")
        process = start(images, tmp_path / "killed")
        while last_step(tmp_path / "killed") in (0, before) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))  # a checkpoint is being written for most of the time
        if process.poll() is not None:  # it ended first
            end(process)
            break
        done = last_step(tmp_path / "killed")
        killed.append((signal.SIGKILL, signal.SIGTERM)[len(killed) % 2])
        sent = time.monotonic()
        process.send_signal(killed[-1])
        process.communicate(timeout=30)
        if killed[-1] == signal.SIGTERM:
            assert process.returncode == 0 and time.monotonic() - sent < 30
            assert saved_step(tmp_path / "killed") >= done
        else:
            repeated.append(done - saved_step(tmp_path / "killed"))
    print(f"killed {len(killed)} times; steps done again {repeated}")
    assert killed and max(repeated) <= EVERY
    end(start(images, tmp_path / "killed"))
    (arrays, data), (wanted, wanted_data) = latest_bits(tmp_path / "killed"), latest_bits(whole)
    assert saved_step(tmp_path / "killed") == saved_step(whole) == STEPS and data == wanted_data
    for a, b in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [[{key: value for key, value in row.items() if key != "seconds"} for row in logs.read(workdir)]
            for workdir in (tmp_path / "killed", whole)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS


@pytest.mark.parametrize("name", ["compiled_step", "validate"])
def test_a_training_that_is_stopped_while_it_compiles_or_validates_ends_at_once(images, whole, tmp_path, name):
    # Minutes in C, as the compiler's are: Python's handlers wait for their end, and no signal cuts them short.
    busy = ("import hashlib\n"
            f"loop.{name} = lambda *_: (print('busy', flush=True), hashlib.pbkdf2_hmac('md5', b'', b'', 10**9))\n")
    code = RUN.replace("loop.train_and_evaluate", busy + "loop.train_and_evaluate")
    process = start(images, tmp_path / "killed", code, subprocess.PIPE)
    while "busy" not in process.stdout.readline():
        assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert "nothing more to save" in process.communicate(timeout=30)[0]
    assert process.returncode == 0 and time.monotonic() - sent < 20
    assert saved_step(tmp_path / "killed") == last_step(tmp_path / "killed") == (9 if name == "validate" else 0)
    if name == "validate":
        end(start(images, tmp_path / "killed"))
        (arrays, data), (wanted, wanted_data) = latest_bits(tmp_path / "killed"), latest_bits(whole)
        assert data == wanted_data and all(map(np.array_equal, arrays, wanted))
