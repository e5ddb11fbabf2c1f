from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import FrozenConfigDict
from scipy.ndimage import gaussian_filter

from configs.smoke import get_config
from drivenmorph_jax.backends import programs
from drivenmorph_jax.demons.forces import squash
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.jacobian import jacobian_determinant
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.network.difference import DifferenceStream
from drivenmorph_jax.network.model import LOG_STEPS, STEPS, DrivenMorph
from drivenmorph_jax.network.outputs import driving_force
from drivenmorph_jax.network.settings import checked

SHAPE = (1, 24, 16, 24, 1)
BOUND = 1.0  # voxels of a level's field: L = 2 voxels of its features, on a grid twice as fine
# For what needs no more than that: two levels take long to compile.
ONE_LEVEL = {"strides": (2,), "channels": (4,), "updates": (2,), "cross_radius": (1,), "self_radius": (0,),
             "self_window": (3,)}
NO_ATTENTION = ONE_LEVEL | {"cross_radius": (0,), "self_window": (0,)}


def settings(**changes):
    """Two levels, with every part in use somewhere."""
    config = get_config().model
    config.update(channels=(4, 8), strides=(1, 4), updates=(2, 1), cross_radius=(0, 1), self_radius=(1, 0),
                  self_window=(0, 3))
    config.update(changes)
    return FrozenConfigDict(config)


def images(seed=0):
    rng = np.random.default_rng(seed)
    pair = gaussian_filter(rng.random((2, *SHAPE)), (0, 0, 1.5, 1.5, 1.5, 0))
    pair = (pair - pair.min()) / np.ptp(pair)
    return jnp.asarray(pair[0], jnp.float32), jnp.asarray(pair[1], jnp.float32)


def noisy(params, scale, seed=1):
    """Parameters as training might leave them: no zero initialisation hides a part."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + scale * jax.random.normal(k, x.shape)
                                     for x, k in zip(leaves, keys, strict=True)])


def initial(net):
    return _initial(net, jax.config.jax_enable_x64)


@lru_cache
def _initial(net, _):
    return jax.jit(net.init)(jax.random.key(0, impl="rbg"), *images())


@lru_cache
def jitted(net):
    """One compiled function for all tests of a network."""
    return jax.jit(net.apply)


def apply(net, params, fixed, moving):
    return jitted(net)(params, fixed, moving)


def made(scale=0.1, **changes):
    net = DrivenMorph(settings(**changes))
    fixed, moving = images()
    return net, noisy(initial(net), scale), fixed, moving


@pytest.mark.parametrize("changes", [{"update_rule": "compositional"}, {"update_rule": "log", **ONE_LEVEL}])
def test_decoupling_with_forces_held_the_images_do_not_reach_the_deformation(changes):
    net, params, fixed, moving = made(**changes)

    def hold_forces(call, args, kwargs, context):
        out = call(*args, **kwargs)
        return jax.lax.stop_gradient(out) if isinstance(context.module, DifferenceStream) else out

    def deformation(images, held):
        if not held:
            out = net.apply(params, *images)
        else:
            with nn.intercept_methods(hold_forces):
                out = net.apply(params, *images)
        return (out.u**2).sum() + (out.u_inverse**2).sum() + sum((u.velocity**2).sum() for u in out.updates)

    gradient = jax.jit(jax.grad(deformation), static_argnums=1)
    held, free = (gradient((fixed, moving), held) for held in (True, False))
    assert all(not np.any(g) for g in held), "images reach the deformation past the forces"
    assert all(np.any(g) for g in free)  # and through the forces they do


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_no_update_moves_anything_by_more_than_the_bound(scale, factor):
    net, params, fixed, moving = made(scale)
    out = apply(net, params, factor * fixed, moving)
    for update in out.updates:
        step = exponential(update.velocity, STEPS)
        for vectors in (update.force, update.velocity, step, exponential(-update.velocity, STEPS)):
            length = np.linalg.norm(vectors, axis=-1)
            assert np.isfinite(length).all() and length.max() <= BOUND * (1 + 1e-5)
    largest = max(float(jnp.linalg.norm(u.velocity, axis=-1).max()) for u in out.updates)
    assert largest > 0.2  # else the bound was not tried


@pytest.mark.parametrize("update", ["compositional", "log"])
def test_the_result_is_a_diffeomorphism_and_comes_with_its_inverse(update):
    net, params, fixed, moving = made(0.1, update_rule=update, sigma_fluid=1.0)
    out = apply(net, params, fixed, moving)
    assert float(jnp.linalg.norm(out.u, axis=-1).max()) > 2  # on a grid 16 voxels wide
    inside = (slice(None), *(slice(4, -4),) * 3)
    for u, u_inverse in ((out.u, out.u_inverse), (out.u_inverse, out.u)):
        assert float(jacobian_determinant(u)[inside].min()) > 0
        assert float(jnp.linalg.norm(compose(u, u_inverse)[inside], axis=-1).mean()) < 0.1


def test_the_log_domain_rule_makes_the_exponential_of_one_velocity():
    net, params, fixed, moving = made(0.1, update_rule="log", strides=(4,), channels=(8,), updates=(1,),
                                      cross_radius=(1,), self_radius=(0,), self_window=(3,))
    made_update, = apply(net, params, fixed, moving).updates
    v = gaussian_smooth(made_update.velocity, 0.7)  # Z(0, delta) = delta
    np.testing.assert_allclose(made_update.u, exponential(v, LOG_STEPS), atol=1e-5)
    np.testing.assert_allclose(made_update.u_inverse, exponential(-v, LOG_STEPS), atol=1e-5)


def test_the_transform_is_the_composition_of_the_exponentials_of_the_velocities():
    net, params, fixed, moving = made(0.1)
    out = apply(net, params, fixed, moving)
    u = u_inverse = jnp.zeros((*out.updates[0].u.shape[:4], 3))
    for update in out.updates:
        space = update.velocity.shape[1:4]
        u, u_inverse = resize_field(u, space), resize_field(u_inverse, space)
        u = compose(u, exponential(update.velocity, STEPS))  # phi o exp(delta)
        u_inverse = compose(exponential(-update.velocity, STEPS), u_inverse)  # exp(-delta) o phi^-1
    u, u_inverse = resize_field(u, SHAPE[1:4]), resize_field(u_inverse, SHAPE[1:4])
    np.testing.assert_allclose(out.u, u, atol=1e-4)
    np.testing.assert_allclose(out.u_inverse, u_inverse, atol=1e-4)


def test_before_training_the_network_is_demons():
    net = DrivenMorph(settings())
    fixed, moving = images()
    params = initial(net)
    out = apply(net, params, fixed, moving)
    for update in out.updates:  # the residual network starts at zero
        np.testing.assert_allclose(update.velocity, gaussian_smooth(squash(update.force, BOUND), 0.7),
                                   atol=1e-5)


def test_before_training_equal_images_stay_where_no_attention_blurs_one():
    net = DrivenMorph(settings(**NO_ATTENTION))
    fixed, moving = images()
    params = initial(net)
    assert float(jnp.abs(apply(net, params, fixed, fixed).u).max()) < 1e-5
    assert float(jnp.abs(apply(net, params, fixed, moving).u).max()) > 1


def test_both_force_terms_are_returned_and_make_the_force():
    net, params, fixed, moving = made()
    out = apply(net, params, fixed, moving)
    for update in out.updates:
        assert float(jnp.linalg.norm(update.demons_force, axis=-1).max()) > 0
    assert any(np.any(update.attention_force) for update in out.updates)
    np.testing.assert_allclose(driving_force(out), sum(resize_field(u.force, SHAPE[1:4]) for u in out.updates),
                               atol=1e-5)


def test_on_the_features_grid_the_force_is_the_squashed_sum_of_its_terms():
    stream = DifferenceStream(max_step=2.0, heads=2, cross_radius=1, self_radius=1, self_window=0)
    fixed, moving = (jnp.asarray(np.random.default_rng(k).normal(size=(1, 8, 8, 8, 4)), jnp.float32) for k in (0, 1))
    params = noisy(stream.init(jax.random.key(0, impl="rbg"), fixed, moving), 0.1)
    force, demons_force, attention_force = stream.apply(params, fixed, moving)
    np.testing.assert_allclose(force, squash(demons_force + attention_force, 2.0), atol=1e-5)
    assert np.any(attention_force)


def test_rematerialisation_changes_nothing():
    net, params, fixed, moving = made(0.1, **ONE_LEVEL)
    again = DrivenMorph(settings(remat=True, **ONE_LEVEL))

    def f(net, params):
        return (apply(net, params, fixed, moving).u ** 2).mean()

    gradient = jax.jit(jax.grad(f, argnums=1), static_argnums=0)
    for a, b in zip(*(jax.tree.leaves(gradient(n, params)) for n in (net, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_rematerialised_the_memory_of_a_gradient_does_not_grow_with_the_updates():
    def needed(**changes):
        net, (fixed, moving) = DrivenMorph(settings(**NO_ATTENTION | changes)), images()
        params = jax.eval_shape(lambda: initial(net))
        gradient = jax.jit(jax.grad(lambda params: (net.apply(params, fixed, moving).u ** 2).mean()))
        return programs.device_memory(gradient.lower(params).compile())

    eight = needed(remat=True, updates=(8,))
    assert eight < 0.4 * needed(updates=(8,))
    assert eight < 1.5 * needed(remat=True, updates=(2,))


def test_rematerialised_on_a_tpu_nothing_is_gathered_again(compile_for):
    compile_for("tpu")

    def gathers(**changes):
        net, (fixed, moving) = DrivenMorph(settings(**ONE_LEVEL | changes)), images()
        params = jax.eval_shape(lambda: initial(net))
        return str(jax.make_jaxpr(jax.grad(lambda params: (net.apply(params, fixed, moving).u ** 2).mean()))(params)
                   ).count(" gather[")

    assert gathers(remat=True) == gathers() > 0


def test_bfloat16_leaves_fields_float32_and_near():
    net, params, fixed, moving = made(0.02)
    exact = apply(net, params, fixed, moving)
    near = apply(DrivenMorph(settings(dtype="bfloat16")), params, fixed, moving)
    for leaf in jax.tree.leaves(near):
        assert leaf.dtype == jnp.float32
    assert float(jnp.abs(near.u - exact.u).mean()) < 0.1 * float(jnp.abs(exact.u).mean())


def test_pairs_of_a_batch_do_not_see_each_other():
    net, params, fixed, moving = made(0.1)
    other = images(3)
    batch = apply(net, params, jnp.concatenate([fixed, other[0]]), jnp.concatenate([moving, other[1]]))
    np.testing.assert_allclose(batch.u[:1], apply(net, params, fixed, moving).u, atol=1e-4)


@pytest.mark.parametrize(("changes", "said"), [
    ({"channels": (1, 8)}, "at least 2"), ({"channels": (4, 4, 8)}, "give each level one"),
    ({"strides": (2, 3)}, "multiple of the one before"), ({"heads": 3}, "does not divide"),
    ({"update_rule": "sum"}, "compositional"), ({"dtype": "int8"}, "bfloat16"),
    ({"field_stride": 0}, "field_stride")])
def test_settings_that_do_not_fit_are_refused_in_a_sentence(changes, said):
    with pytest.raises(InputError, match=said):
        checked(settings(**changes))
