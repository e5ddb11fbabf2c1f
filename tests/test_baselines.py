import json
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.smoke import get_config as smoke
from configs.transmorph import get_config as transmorph
from configs.voxelmorph import get_config as voxelmorph
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.network.networks import make_network, multiple
from drivenmorph_jax.training.loop import train_and_evaluate

pytestmark = pytest.mark.usefixtures("no_pictures")

SHAPE = (32, 48, 32)


@lru_cache
def made(get_config):
    """(the network jitted, two images, its initial parameters), compiled once for all tests."""
    network = make_network(get_config().model)
    images = jax.random.uniform(jax.random.key(0), (2, 1, *SHAPE, 1))
    return jax.jit(network.apply), images, jax.jit(network.init)(jax.random.key(1, impl="rbg"), *images)


def with_flow(params, factor):
    """The parameters with a flow layer so many times as large: at the start a network is near the identity."""
    flow = params["params"]["flow"]
    return {"params": params["params"] | {"flow": flow | {"kernel": factor * flow["kernel"]}}}


def test_voxelmorph_has_the_published_size():
    # 301,411 numbers: VoxelMorph-2 in the tables of TransMorph's authors.
    apply, images, params = made(voxelmorph)
    assert sum(x.size for x in jax.tree.leaves(params)) == 301_411
    assert multiple(voxelmorph().model) == 16
    found = apply(params, *images)
    assert found.u.shape == found.u_inverse.shape == (1, *SHAPE, 3)
    assert found.updates[0].velocity.shape == (1, 16, 24, 16, 3)


@pytest.mark.parametrize("get_config", [voxelmorph, transmorph])
def test_a_baseline_gives_a_diffeomorphism_with_its_inverse_and_no_force(get_config):
    apply, images, params = made(get_config)
    found = apply(with_flow(params, 3000), *images)  # moves the images by voxels
    assert np.abs(found.u).max() > 0.5
    update = found.updates[0]
    error = np.asarray(compose(update.u_inverse, update.u))[0, 4:-4, 4:-4, 4:-4]
    assert np.abs(error).mean() < 0.12 * np.abs(update.u).mean()
    assert not np.any(update.force)


def test_windows_are_shifted_so_that_a_token_sees_beyond_its_own():
    apply, images, params = made(transmorph)
    params = with_flow(params, 1e4)
    far = jnp.asarray(images[1]).at[0, :4].add(0.5)
    change = apply(params, images[0], far).u - apply(params, *images).u
    assert np.abs(change[0, -4:]).max() > 1e-4


@pytest.mark.parametrize("get_config, small", [
    (voxelmorph, {"encoder": (4, 4, 4), "decoder": (4, 4, 4, 4)}), (transmorph, {"channels": (4, 8), "heads": 2})])
def test_a_baseline_is_trained_and_scored_like_drivenmorph(get_config, small, tmp_path):
    config, own = smoke(), get_config()
    config.model, config.loss.level, config.loss.force = own.model, own.loss.level, own.loss.force
    config.model.update(small)
    config.steps = 2
    summary = train_and_evaluate(config, tmp_path)
    assert summary["dice"]["mean"] > 0 and summary["force"] == {}
    assert "driving force" not in (tmp_path / "evaluation" / "report.md").read_text()
    assert not (tmp_path / "evaluation" / "forces.png").exists()
    about = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert "cosine" not in about["definitions"]


def test_an_unknown_network_is_refused():
    config = voxelmorph()
    config.model.name = "voxelmorf"
    with pytest.raises(InputError, match="model.name is 'voxelmorf': set it to one of drivenmorph, voxelmorph"):
        make_network(config.model)
