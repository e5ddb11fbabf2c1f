import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from test_warp import smooth_field

from drivenmorph_jax import demons
from drivenmorph_jax.demons.classical import PATIENCE
from drivenmorph_jax.demons.forces import lncc_force, mind, symmetric_force, thirion_force
from drivenmorph_jax.fields.grid import resize_field
from drivenmorph_jax.fields.integrate import exponential
from drivenmorph_jax.fields.inverse import coarse_inverse, inverse
from drivenmorph_jax.fields.jacobian import determinant_by_slabs, jacobian_determinant
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.unfold import unfolded, unfolded_around_folds, unfolded_everywhere
from drivenmorph_jax.fields.warp import compose, warp

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape, scale=scale).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.5])
def test_smoothing_is_scipys_inside(sigma):
    x = normal(24, 24, 24, 2)
    expected = ndimage.gaussian_filter(x, (sigma, sigma, sigma, 0), truncate=8)
    inside = (slice(8, -8),) * 3
    np.testing.assert_allclose(gaussian_smooth(x, sigma)[inside], expected[inside], atol=1e-4)


def test_smoothing_takes_weighted_means():
    x = normal(9, 10, 11, 3, scale=5)
    x /= np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(gaussian_smooth(np.ones_like(x), 2.0), 1, atol=1e-5)
    assert np.linalg.norm(gaussian_smooth(x, 0.5), axis=-1).max() <= 1 + 1e-5


def test_bracket_of_linear_fields_is_the_commutator():
    x = np.moveaxis(np.indices((6, 6, 6)), 0, -1) - 2.5
    a, b = RNG.normal(size=(2, 3, 3))
    v, u = (x @ a.T).astype(np.float32), (x @ b.T).astype(np.float32)
    # Dv u - Du v = A B x - B A x
    np.testing.assert_allclose(demons.lie_bracket(v, u), x @ (a @ b - b @ a).T, atol=1e-4)


def test_bch_approximates_the_composition_and_its_sign_is_right():
    shape, inside = (28, 28, 28), (slice(6, -6),) * 3
    v, u = smooth_field(shape, 3.0, 1), smooth_field(shape, 3.0, 2)
    true = compose(exponential(v), exponential(u))  # exp(v) o exp(u)

    def error(z):
        return np.linalg.norm(exponential(z) - true, axis=-1)[inside].mean()

    assert error(demons.bch(v, u)) < 0.5 * error(v + u)
    assert error(demons.bch(v, u)) < 0.25 * error(demons.bch(u, v))  # the other order is the other sign


def test_updates_come_with_their_inverse():
    shape = (20, 20, 20)
    u = u_inverse = np.zeros((*shape, 3), np.float32)
    for seed in range(3):
        delta = smooth_field(shape, 1.5, seed)
        u, u_inverse = demons.compositional_update(u, delta), demons.inverse_update(u_inverse, delta)
    error = np.linalg.norm(compose(u, u_inverse), axis=-1)[4:-4, 4:-4, 4:-4]
    assert np.linalg.norm(u, axis=-1).max() > 2 and error.mean() < 0.03


def pair(shape=(32, 40, 32), largest=4.0):
    """A blobby image, and it seen through a known diffeomorphism: fixed = moving o phi."""
    texture = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=shape), 2)
    x = np.moveaxis(np.indices(shape), 0, -1)
    ball = 1 / (1 + np.exp((np.linalg.norm((x - np.array(shape) / 2) / np.array(shape), axis=-1) - 0.35) * 40))
    moving = (ball * (0.6 + 0.2 * texture / texture.std())).astype(np.float32)[..., None]
    u = np.asarray(exponential(ndimage.gaussian_filter(smooth_field(shape, 1.0, 3), (2, 2, 2, 0)) * largest * 1.5))
    return np.asarray(warp(moving, u)), moving, u, ball > 0.5


SETTINGS = {"lncc": demons.LNCC, "symmetric": demons.INTENSITY,
            "thirion": demons.INTENSITY | {"force": thirion_force}}


def registered(fixed, moving, name, **settings):
    return demons.demons(fixed, moving, **SETTINGS[name] | {"iterations": (40, 30, 20)} | settings)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("update", ["compositional", "log"])
def test_demons_finds_a_known_deformation(name, update):
    fixed, moving, true, brain = pair()
    found = registered(fixed, moving, name, update=update)
    u = np.asarray(found.u)
    before, after = ((x - true)[brain] for x in (0 * u, u))
    assert np.linalg.norm(after, axis=-1).mean() < 0.5 * np.linalg.norm(before, axis=-1).mean()
    energy = jax.jit(lambda u: SETTINGS[name]["force"](fixed, warp(moving, u), max_step=1.0)[1])
    start, end, best = (float(energy(x)) for x in (0 * u, u, true))
    assert end < best + 0.1 * (start - best)
    assert np.asarray(jacobian_determinant(u))[brain].min() > 0
    assert (found.velocity is None) == (update == "compositional")
    # At the coarsest level windows of local correlation are wider than the image.
    for energies in found.energies[1:]:
        energies = energies[np.isfinite(energies)]
        assert energies[-1] < energies[0]


def test_demons_in_two_dimensions_is_that_of_a_stack_of_equal_slices():
    fixed, moving, true, brain = (x[:, :, 20] for x in pair((40, 48, 40)))
    moving = np.asarray(moving)
    fixed = np.asarray(warp(moving, true[..., :2]))
    u = registered(fixed, moving, "symmetric", iterations=(40, 30)).u
    assert u.shape == (40, 48, 2)
    assert ((warp(moving, u) - fixed) ** 2).mean() < 0.1 * ((moving - fixed) ** 2).mean()
    # Slices along an axis on which nothing changes: the components within the slice are those of the slice.
    thick = registered(*(np.repeat(x[None], 8, 0) for x in (fixed, moving)), "symmetric", iterations=(40, 30)).u
    np.testing.assert_allclose(thick[4, ..., 1:], u, atol=2e-2)
    np.testing.assert_allclose(thick[..., 0], 0, atol=1e-4)


@pytest.mark.parametrize("name", ["lncc", "symmetric"])
def test_swapped_images_give_the_inverse_in_the_log_domain(name):
    fixed, moving, _, _ = pair()
    there = registered(fixed, moving, name, update="log")
    back = registered(moving, fixed, name, update="log")
    np.testing.assert_allclose(back.velocity, -there.velocity, atol=0.02)
    error = np.linalg.norm(compose(there.u, back.u), axis=-1)
    assert np.linalg.norm(there.u, axis=-1).mean() > 0.3 and error.mean() < 0.05


def test_a_level_ends_when_the_energy_stands_still():
    fixed, moving, _, _ = pair()
    ended = registered(fixed, moving, "symmetric", iterations=(200,), tolerance=1e-2)
    full = registered(fixed, moving, "symmetric", iterations=(200,), tolerance=0)
    count = int(np.isfinite(ended.energies[0]).sum())
    assert 2 * PATIENCE <= count < 200 and np.isfinite(full.energies[0]).all()
    np.testing.assert_allclose(ended.energies[0][:count], full.energies[0][:count], rtol=1e-3)
    last, before = (ended.energies[0][count - k * 5:count - k * 5 + 5].mean() for k in (1, 2))
    assert before - last <= 1e-2 * before


def test_demons_goes_on_from_an_initial_field():
    fixed, moving, true, _ = pair()
    u = registered(fixed, moving, "symmetric", iterations=(5,), initial=jnp.asarray(true)).u
    assert ((warp(moving, u) - fixed) ** 2).mean() < 0.05 * ((moving - fixed) ** 2).mean()


def test_a_level_of_no_iterations_is_left_out():
    fixed, moving, *_ = pair()
    found = registered(fixed, moving, "symmetric", iterations=(5, 0))
    assert [len(energies) for energies in found.energies] == [5, 0]
    assert found.u.shape == (*fixed.shape[:-1], 3) and np.any(found.u)


def test_local_correlation_from_several_starts_finds_a_known_deformation():
    fixed, moving, true, brain = pair((40, 48, 40))
    u = demons.registered(fixed, moving)
    assert np.linalg.norm((u - true)[brain], axis=-1).mean() < 0.4 * np.linalg.norm(true[brain], axis=-1).mean()
    assert np.asarray(jacobian_determinant(u))[brain].min() > 0
    everywhere = np.ones_like(fixed)
    np.testing.assert_allclose(demons.registered(fixed, moving, weights=(everywhere, everywhere)), u, atol=1e-3)


def test_a_stiff_registration_finds_a_smooth_deformation_and_follows_no_noise():
    fixed, moving, true, brain = pair()
    u = demons.registered_stiffly(fixed, moving, 1)
    assert np.linalg.norm((u - true)[brain], axis=-1).mean() < 0.4 * np.linalg.norm(true[brain], axis=-1).mean()
    back = demons.registered_stiffly(moving, fixed, 1)
    assert np.linalg.norm(compose(u, back)[brain], axis=-1).mean() < 0.1 * np.linalg.norm(u[brain], axis=-1).mean()
    noise = np.random.default_rng(1).random((2, *fixed.shape), np.float32)
    soft, stiff = (np.log(jacobian_determinant(f(*noise))).std() for f in (demons.registered,
                                                                          demons.registered_stiffly))
    assert stiff < 0.4 * soft and stiff < 0.3
    sides = demons.registered_stiffly(fixed[:-3, :-2], moving[:-3, :-2], 2)  # of any length
    inner = brain[:-3, :-2]
    assert np.linalg.norm((sides - true[:-3, :-2])[inner], axis=-1).mean() < 0.6 * np.linalg.norm(
        true[:-3, :-2][inner], axis=-1).mean()
    everywhere = np.ones_like(fixed)
    np.testing.assert_allclose(demons.registered_stiffly(fixed, moving, 1, (everywhere, everywhere)), u, atol=1e-3)


@pytest.mark.parametrize("force", ["intensity", "mind"])
def test_one_force_by_name_is_demons_with_its_settings(force):
    fixed, moving, *_ = pair()
    features, settings = demons.FORCES[force]
    np.testing.assert_array_equal(demons.registered(fixed, moving, force),
                                  demons.demons(features(fixed), features(moving), **settings).u)


def test_refinement_improves_half_a_registration():
    fixed, moving, true, brain = pair()
    start = jnp.asarray(0.5 * true)
    u = demons.refine(fixed, moving, start, 20)
    before, after, best = (lncc_force(fixed, warp(moving, x), 1.0)[1] for x in (start, u, true))
    assert after < before - 0.02 and after < best + 0.1 * (before - best)
    assert np.linalg.norm((u - true)[brain], axis=-1).mean() < np.linalg.norm((start - true)[brain], axis=-1).mean()
    assert np.asarray(jacobian_determinant(u))[brain].min() > 0


def test_a_start_is_gone_on_from_as_it_is():
    # It was smoothed on its way to the coarser grid of the field: up to 1.5 voxels were lost of a brain's.
    u = resize_field(normal(8, 12, 10, 3), (16, 24, 20))
    flat = jnp.full((16, 24, 20, 1), 0.5)
    found = registered(flat, flat, "symmetric", iterations=(1,), sigma_diffusion=0.0, initial=u)
    np.testing.assert_allclose(found.u, u, atol=1e-4)


@pytest.mark.parametrize("force", demons.FORCES)
def test_a_converged_registration_is_not_refined(force):
    fixed, moving, true, _ = pair()
    once = demons.refine(fixed, moving, jnp.asarray(0.5 * true), 200, force=force)
    np.testing.assert_array_equal(demons.refine(fixed, moving, once, 20, force=force), once)


def test_mind_descriptors_register_an_inverted_image_as_well():
    fixed, moving, true, brain = pair()
    found = [registered(mind(fixed), mind(x), "symmetric").u for x in (moving, 1 - moving)]
    errors = [np.linalg.norm((u - true)[brain], axis=-1).mean() for u in found]
    assert errors[0] < 0.7 * np.linalg.norm(true[brain], axis=-1).mean()
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_refinement_by_mind_is_blind_to_an_inversion():
    fixed, moving, true, brain = pair()
    start = jnp.asarray(0.5 * true)
    u, inverted = (demons.refine(fixed, x, start, 20, force="mind") for x in (moving, 1 - moving))
    np.testing.assert_allclose(u, inverted, atol=0.02)
    before, after = (symmetric_force(mind(fixed), warp(mind(moving), x), 1.0)[1]
                     for x in (start, u))
    assert after < 0.9 * before and np.asarray(jacobian_determinant(u))[brain].min() > 0


def test_demons_under_vmap_and_grad():
    fixed, moving, _, _ = pair((16, 16, 16))
    batch = jnp.stack([fixed, moving]), jnp.stack([moving, fixed])
    settings = demons.INTENSITY | {"iterations": (6, 4)}
    both = jax.jit(jax.vmap(lambda f, m: demons.demons(f, m, **settings).u))(*batch)
    for k in range(2):
        np.testing.assert_allclose(both[k], demons.demons(batch[0][k], batch[1][k], **settings).u, atol=1e-4)

    @jax.jit
    def error(sigma):
        u = demons.demons(fixed, moving, **settings | {"sigma_diffusion": sigma}, tolerance=0).u
        return ((warp(moving, u) - fixed) ** 2).mean()

    slope = (error(0.62) - error(0.58)) / 0.04
    assert jax.jit(jax.grad(error))(0.6) == pytest.approx(float(slope), rel=0.05)


def test_what_does_not_fit_together_is_refused():
    image = np.zeros((12, 16, 16, 1), np.float32)
    with pytest.raises(ValueError, match="multiples of 8"):
        demons.demons(image, image)
    with pytest.raises(ValueError, match="'compositional' or 'log'"):
        demons.demons(image[:8], image[:8], update="additive")
    with pytest.raises(ValueError, match="raise stride, or for lncc_force lower block"):
        demons.demons(image[:8], image[:8], stride=1)


def test_the_inverse_is_found_where_the_transform_stretches():
    # du/dx up to 1.5: the undamped iteration diverges here.
    x = np.arange(48, dtype=np.float32)
    u = np.zeros((48, 8, 8, 3), np.float32)
    u[..., 0] = (6 * np.exp(-(((x - 24) / 6) ** 2)) * (x - 24) / 4)[:, None, None]
    assert np.gradient(u[:, 0, 0, 0]).max() > 1.2 and np.gradient(u[:, 0, 0, 0]).min() > -0.9
    w = inverse(u)
    assert np.abs(compose(u, w))[4:-4].max() < 0.05
    fine = resize_field(jnp.asarray(u), (96, 16, 16))
    assert np.abs(compose(fine, coarse_inverse(fine)))[8:-8].mean() < 0.1


def test_the_inverse_of_a_rough_field_returns_between_voxels_too():
    u = 8 * gaussian_smooth(jax.random.normal(jax.random.key(0), (32, 32, 32, 3)), 2.0)
    assert 0.7 < jnp.linalg.norm(u, axis=-1).mean() and jacobian_determinant(u).min() > 0.05
    w = coarse_inverse(u)
    at_voxels = inverse(u, 60)
    for back, most in ((compose(w, u), 0.03), (compose(u, w), 0.045)):
        assert jnp.linalg.norm(back[4:-4, 4:-4, 4:-4], axis=-1).mean() < most
    assert jnp.linalg.norm(compose(at_voxels, u)[4:-4, 4:-4, 4:-4], axis=-1).mean() > 0.05


@pytest.mark.parametrize("space", [(24, 20), (24, 20, 28)])
def test_a_fold_is_smoothed_away_and_nothing_else_is_touched(space):
    dims = len(space)
    u = np.zeros((*space, dims), np.float32)
    u[(6, 10, 10)[:dims]] = 3.0  # phi jumps back behind its neighbours there
    assert (jacobian_determinant(u) <= 0).any()
    found = np.asarray(unfolded(u))
    assert (jacobian_determinant(found) > 0).all()
    assert np.abs(found[15:]).max() < 1e-6 and np.abs(found).max() <= 3
    np.testing.assert_array_equal(unfolded(found), found)


@pytest.mark.parametrize("space", [(70, 67), (20, 39, 34)])
def test_around_folds_as_everywhere(space):
    n = len(space)
    u = np.random.default_rng(1).normal(0, 0.4, (*space, n)).astype(np.float32)
    wanted = np.asarray(unfolded_everywhere(u))
    assert (jacobian_determinant(u) <= 0).sum() > 3 and np.abs(wanted - u).max() > 0.5
    np.testing.assert_allclose(unfolded_around_folds(u), wanted, atol=1e-5)
    to_voxel = np.eye(n) + 0.3 * np.eye(n, k=1)  # u in other units, along other axes
    got = unfolded_around_folds(u @ np.linalg.inv(to_voxel).T, to_voxel) @ to_voxel.T
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(determinant_by_slabs(u), jacobian_determinant(u), atol=1e-5)
