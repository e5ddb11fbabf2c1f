import gc
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.runtime import checkpoint
from drivenmorph_jax.runtime.checkpoint import Damaged, read_about, read_into, read_params, restore

PLACES = int(os.environ.get("FUZZ", 60))


def state(seed):
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(seed), (3, 3, 8)), "bias": jnp.full(8, float(seed))}}
    return params, (jnp.int32(seed), params)


def shapes(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of the states 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoint.manager(folder) as manager:
        for step in (1, 2):
            checkpoint.save(manager, step, {"step": step, "shape": (1, 2)}, *state(step), {"next": step})
    return folder


def test_the_newest_checkpoint_comes_back_as_it_was(two):
    with checkpoint.manager(two) as manager:
        step, params, opt_state, data = restore(manager, *shapes(state(2)))
    assert step == 2 and data == {"next": 2} and read_about(two)["step"] == 2
    for a, b in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(state(2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_after_a_save_tensorstore_is_as_it_was(two, tmp_path):
    before = dict(vars(tensorstore.KvStore.Spec))
    spec = tensorstore.KvStore.Spec({"driver": "memory", "path": "a/"})
    assert spec.to_json() == {"driver": "memory", "path": "a/"}
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 1, {"step": 1}, *state(1), {"next": 1})
    assert spec.to_json() == {"driver": "memory", "path": "a/"}
    assert dict(vars(tensorstore.KvStore.Spec)) == before


@pytest.mark.parametrize("place", range(PLACES))
def test_wherever_a_checkpoint_is_damaged_no_wrong_value_is_read(two, tmp_path, place):
    rng = random.Random(place)
    folder = tmp_path / "latest"
    shutil.copytree(two, folder)
    file = rng.choice(sorted(path for path in (folder / "2").rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    kind = rng.choice(["missing", "truncated", "flipped"])
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:rng.randrange(max(len(content), 1))])
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    with checkpoint.manager(folder) as manager:
        try:
            step, params, opt_state, data = restore(manager, *shapes(state(2)))
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            return
    assert data == {"next": step}
    for a, b in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(state(step)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_all_are_damaged_that_is_said(two, tmp_path):
    folder = tmp_path / "latest"
    shutil.copytree(two, folder)
    for step in "12":
        shutil.rmtree(folder / step / "opt_state")
    with checkpoint.manager(folder) as manager, pytest.raises(Damaged, match="is a damaged checkpoint"):
        restore(manager, *shapes(state(2)))


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_checkpoint_takes_nothing_in_from_outside(two, tmp_path, kind):
    folder = tmp_path / "latest"
    shutil.copytree(two, folder)
    chunk = max((path for path in (folder / "2" / "params").rglob("*") if path.is_file()), key=os.path.getsize)
    (tmp_path / "secret").write_bytes(chunk.read_bytes())
    chunk.unlink()
    if kind == "link":
        chunk.symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(chunk)
    params, opt_state = shapes(state(2))
    with checkpoint.manager(folder) as manager:
        for read in (lambda: restore(manager, params, opt_state),
                     lambda: read_params(folder, params), lambda: read_into(folder, state(1)[0]),
                     lambda: read_about(folder)):
            with pytest.raises(InputError, match="is a link or no file"):
                read()


def test_a_full_disk_is_one_sentence_and_the_older_checkpoint_survives(tmp_path):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system of one megabyte can be made here")
    try:
        manager = checkpoint.manager(tmp_path / "latest")
        checkpoint.save(manager, 1, {"step": 1}, *state(1), {"next": 1})
        (tmp_path / "other").write_bytes(bytes(900_000))
        with pytest.raises(InputError, match="latest cannot be written .*: free some space"):
            checkpoint.save(manager, 2, {"step": 2}, {"w": jax.random.normal(jax.random.key(0), (200_000,))})
        with checkpoint.manager(tmp_path / "latest") as again:
            step, params, *_ = restore(again, *shapes(state(1)))
        assert step == 1
        np.testing.assert_array_equal(params["layer"]["bias"], np.ones(8))
        assert [path.name for path in Path(tmp_path / "latest").iterdir() if path.name.isdigit()] == ["1"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_save_keeps_no_memory(tmp_path):
    params = {f"layer{i}": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for i in range(20)}

    def blocks(saves):
        for _ in range(saves):
            checkpoint.save(manager, manager.latest_step() + 1, {}, params, params, {})
        gc.collect()
        return sys.getallocatedblocks()

    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 1, {}, params)
        before = blocks(3)
        # TensorStore alone kept 800 a save of these arrays.
        assert (blocks(10) - before) / 10 < 100
