"""Guidance as a force: points of the fixed image and where each lies in the moving image, and pairs of structures.

`guided` continues a registration until phi maps each point x_k to its t_k, and the border of each structure of the
fixed image to that of its partner. What is to be found is a transform psi of the fixed grid with

  psi(x_k) = s_k,   s_k = phi^-1(t_k),   phi <- phi o psi

psi is built from small steps, psi <- psi o exp(v). The velocity v is the sum of a force of the images p, which is that
of Demons, and of the force of the landmarks:

  v(x) = p(x) + sum_k K(|x - x_k| / h_k) a_k,   v(x_k) = r_k min(1, L / |r_k|),   K(q) = (1 - q)^4 (4 q + 1) for q < 1

r_k = psi^-1(s_k) - x_k is what the landmark lacks. The a_k solve the small linear system of the second equation. So the
landmarks decide about v at their points, and the images about v around them. v is scaled where it would be longer than
L, and it is 0 beyond three radii of all points. K is the positive definite function of Wendland for three dimensions.

A landmark of weight w_k < 1 lets the images decide partly: v(x_k) = w_k r_k min(1, L / |r_k|) + (1 - w_k) p(x_k).

Structures drive by their signed distances A_c and B_c, in the fixed and in the warped moving image, see `border_force`.
With b = max_c K(|A_c| / h), which is 1 at the borders, the force of the images becomes

  p = (1 - b) p_images + p_borders

Points are (N, 3), in voxels. Fields are (*space, 3), in voxels of their own grid.

References: Wendland, "Piecewise polynomial, positive definite and compactly supported radial functions of minimal
degree", 1995; Joshi, Miller, "Landmark matching via large deformation diffeomorphisms", 2000.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from scipy import ndimage

from drivenmorph_jax.demons.classical import FORCES, UPDATE_STEPS, smoothed_force
from drivenmorph_jax.demons.forces import clip_length, feature_force, scale_longest
from drivenmorph_jax.demons.multistart import weighted
from drivenmorph_jax.demons.updates import compositional_update
from drivenmorph_jax.fields.grid import average_pool, identity_grid, resize_field, spatial_shape
from drivenmorph_jax.fields.inverse import inverse_at
from drivenmorph_jax.fields.smooth import gaussian_smooth
from drivenmorph_jax.fields.unfold import unfolded
from drivenmorph_jax.fields.warp import compose, warp

STRIDE = 2  # the grid of psi is this many times coarser than that of the images
REGION = 3.0  # radii; beyond, nothing moves
REACH = 2.0  # radii, h_k; more, up to REGION, where s_k is further than a radius
FARTHEST = 1.5  # radii, the largest distance from x_k to s_k that a landmark can bridge
BORDER_STEPS = 20  # steps of borders without images
LAST_STEPS, LAST_SIGMA = 5, 1.0  # of borders alone, at the end, and the Gaussian of their force in voxels
MOST = 200  # steps of the landmarks alone
CLOSE = 0.05  # voxels, where they end
DAMPING = 1e-4  # of the linear system, in which two landmarks at one place are one row twice


def kernel(q):
    """Wendland's function (1 - q)^4 (4 q + 1) of a distance q >= 0, from 1 at 0 to 0 from 1 on."""
    return jnp.maximum(1 - q, 0) ** 4 * (4 * q + 1)


def landmark_force(shape: tuple[int, ...], points: chex.Array, wanted: chex.Array, reach: chex.Array,
                   max_step: float) -> jax.Array:
    """The force of landmarks: the smooth velocity that has given values at given points.

      v(x) = sum_k K(|x - x_k| / h_k) a_k,   v(x_k) = w_k

    Args:
      shape: of the grid.
      points: x_k (N, 3), in voxels.
      wanted: w_k (N, 3), in voxels.
      reach: h_k (N,), in voxels. v is 0 where no point is nearer than its reach.
      max_step: the bound L, in voxels. A v that would be longer is scaled as a whole.

    Returns:
      v (*shape, 3) in voxels, |v| <= L.
    """
    points, wanted, reach = (jnp.asarray(x, jnp.float32) for x in (points, wanted, reach))
    weights = kernel(jnp.linalg.norm(points[:, None] - points[None], axis=-1) / reach[None])
    normal = weights.T @ weights + DAMPING * jnp.eye(len(points))
    a, grid = jnp.linalg.solve(normal, weights.T @ wanted), identity_grid(shape)

    def add(k, v):
        return v + kernel(jnp.linalg.norm(grid - points[k], axis=-1) / reach[k])[..., None] * a[k]

    return _bounded(jax.lax.fori_loop(0, len(points), add, jnp.zeros((*shape, 3))), max_step)


def border_force(fixed: chex.Array, warped: chex.Array, max_step: float, reach: float) -> jax.Array:
    """The force by which the borders of structures go to the borders of their partners.

      p = b p_GN,   b = max_c w_c,   w_c = K(|A_c| / h)

    A_c and B_c are the signed distances from the borders of structure c. p_GN is the damped Gauss-Newton step of all
    structures, `forces.feature_force` of the differences A_c - B_c with the weights w_c. Near a border that is a plane,
    it is what the border lacks.

    Args:
      fixed, warped: A_c and B_c, (*space, C), in voxels.
      max_step: the bound L, in voxels.
      reach: h, in voxels. p is 0 where no border of the fixed image is nearer.

    Returns:
      p (*space, 3) in voxels, |p| <= L.
    """
    weights = kernel(jnp.abs(fixed) / reach)
    return weights.max(-1, keepdims=True) * feature_force(fixed - warped, 0.5 * (fixed + warped), max_step, weights)


def signed_distance(inside: np.ndarray) -> np.ndarray:
    """The distance of each voxel from the border of a structure, in voxels: (*space), below 0 inside.

    Args:
      inside: (*space) bool, True at some voxels and False at others.
    """
    out, within = (ndimage.distance_transform_edt(x) for x in (~inside, inside))
    return np.where(inside, 0.5 - within, out - 0.5).astype(np.float32)


def guided(fixed: chex.Array, moving: chex.Array, u: chex.Array, points: chex.Array, targets: chex.Array,
           radius: chex.Array, *, iterations: int = 20, force: str = "lncc", max_step: float = 1.0,
           weights: tuple[chex.Array, chex.Array] | None = None, trust: chex.Array | None = None,
           borders: tuple[chex.Array, chex.Array] | None = None, border_radius: float = 5.0,
           around: chex.Array | None = None) -> jax.Array:
    """Continue a registration from the displacement u, so that phi maps points x_k to their targets t_k, and borders of
    structures to borders.

    First the landmarks alone move, then `iterations` times all together, at last the borders alone and the landmarks
    alone. u stays as it is at all voxels that are further than `REGION` radii from every point and border, unless it
    has folds there.

    Args:
      fixed, moving: (*space, C), with values of about 0 to 1. The sides are even.
      u: (*space, 3) displacement to start from, in voxels.
      points, targets: x_k and t_k (N, 3), in voxels of the grid of the images.
      radius: (N,) in voxels. The pull of a landmark has fallen to a fifth at one radius, and ends at two. Images drive
        the registration up to three. `out_of_reach` says for which landmarks the radius is too small.
      iterations: number of steps that images drive as well; 0: the landmarks alone, and `BORDER_STEPS` of borders.
      force: of the images, a name of `FORCES`.
      max_step: the bound L of a step, in voxels.
      weights: as in `refine`.
      trust: (N,), the weight w_k of each landmark, in (0, 1]; 1 if left out. With less, it first goes w_k of its way,
        and the last steps leave it where it then is.
      borders: signed distances (*space, C), in voxels, from the borders of C structures of the fixed image, and of
        their partners in the moving image; see `signed_distance`.
      border_radius: in voxels. The force of a border ends at two radii; images drive the registration up to three.
      around: (*space, 1), above 0 where images drive as well, beside what lies around the points; at 1 by all their
        force.

    Returns:
      The displacement (*space, 3), in voxels, after `unfolded`.
    """
    space, (features, settings) = spatial_shape(u), FORCES[force]
    (f, m), driven = weighted((features(fixed), features(moving)), weights, settings["force"])
    points, targets, radius = (jnp.asarray(x, jnp.float32) for x in (points, targets, radius))
    trust = jnp.ones(len(points)) if trust is None else jnp.asarray(trust, jnp.float32)
    between = _in_fixed(u, points, targets)
    region = REGION * radius - STRIDE  # psi is sampled linearly, which widens it by one of its voxels
    reach = jnp.minimum(jnp.maximum(2 * jnp.linalg.norm(between - points, axis=-1), REACH * radius), region)
    near, far, reached = (points + 0.5) / STRIDE - 0.5, (between + 0.5) / STRIDE - 0.5, reach / STRIDE
    psi, step = jnp.zeros((*(n // STRIDE for n in space), 3)), max_step / STRIDE
    psi = _by_landmarks(psi, near, near + trust[:, None] * (far - near), reached, step)
    if iterations or borders is not None:
        weight, lines = driven_by_images(psi.shape[:-1], near, region / STRIDE), None
        if around is not None:
            weight = jnp.maximum(weight, average_pool(around, STRIDE))
        if borders is not None:
            lines = borders[0], _warped(borders[1], u)
            weight = jnp.maximum(weight, _around_borders(borders[0], REGION * border_radius - STRIDE))
        psi = _by_both(f, _warped(m, u), psi, near, far, reached, weight, trust, lines, REACH * border_radius,
                       iterations=iterations or BORDER_STEPS, driven=driven if iterations else None, max_step=max_step,
                       scale=settings["scale"], sigma_fluid=settings["sigma_fluid"],
                       sigma_diffusion=settings["sigma_diffusion"])
    psi = _by_landmarks(psi, near, softly(psi, near, far, trust), reached, step)
    u = unfolded(_composed(u, psi))
    if borders is not None:
        u = unfolded(_by_borders(u, *borders, REACH * border_radius, max_step))
    return unfolded(_by_landmarks(u, points, softly(u, points, targets, trust), reach, max_step))


@partial(jax.jit, static_argnames="shape")
def driven_by_images(shape: tuple[int, ...], points: chex.Array, region: chex.Array) -> jax.Array:
    """How much images drive each voxel: (*shape, 1), the largest of min(1, 2 K(|x - x_k| / g_k)) over the points.

    Args:
      shape: of the grid.
      points: x_k (N, 3), in voxels.
      region: g_k (N,), in voxels.
    """
    grid = identity_grid(shape)

    def widened(k, weight):
        return jnp.maximum(weight, jnp.minimum(1, 2 * kernel(jnp.linalg.norm(grid - points[k], axis=-1) / region[k])))

    weight = jnp.zeros(shape)
    return (jax.lax.fori_loop(0, len(points), widened, weight) if len(points) else weight)[..., None]


def out_of_reach(u: chex.Array, points: chex.Array, targets: chex.Array, radius: chex.Array) -> np.ndarray:
    """Which landmarks `guided` cannot bring to their targets, because |s_k - x_k| > `FARTHEST` radii: (N,) bool."""
    points, targets = (jnp.asarray(x, jnp.float32) for x in (points, targets))
    return np.asarray(jnp.linalg.norm(_in_fixed(u, points, targets) - points, axis=-1)) > FARTHEST * np.asarray(radius)


def remaining(u: chex.Array, points: chex.Array, targets: chex.Array) -> jax.Array:
    """The distance |phi(x_k) - t_k| of each landmark, (N,), in voxels. The arguments are those of `guided`."""
    points, targets = (jnp.asarray(x, jnp.float32) for x in (points, targets))
    return jnp.linalg.norm(points + _sampled(u, points) - targets, axis=-1)


def contradictory(points, targets, doubt, slack):
    """The landmarks that contradict others, as {index: index of the one it contradicts}. Without them, none does.

    Two landmarks contradict each other where their displacements differ by more than their distance:

      |(t_j - x_j) - (t_k - x_k)| > |x_j - x_k| + slack

    A transform that maps both would fold between them, or stretch more than twofold. Of these, the one that contradicts
    most others is left out, until none does; of several, the one with the largest doubt.

    Args:
      points, targets: x_k and t_k (N, 3), in voxels of one grid.
      doubt: (N,), such as `remaining` of a registration without landmarks.
      slack: in voxels, how precisely points can be placed.
    """
    points, shift = np.asarray(points, float), np.asarray(targets, float) - points
    apart, between = (np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (shift, points))
    against, found = apart > between + slack, {}
    while against.any():
        number = against.sum(1)
        out = max(np.flatnonzero(number == number.max()), key=lambda k: doubt[k])
        found[int(out)] = int(max(np.flatnonzero(against[out]), key=lambda k: apart[out, k]))
        against[out] = against[:, out] = False
    return found


def _bounded(v, max_step):
    """v, scaled as a whole where its longest vector is longer than `max_step`."""
    return v * jnp.minimum(1, max_step / jnp.maximum(jnp.sqrt((v * v).sum(-1).max()), 1e-12))


def _sampled(field, points):
    return jnp.stack([map_coordinates(field[..., axis], list(points.T), order=1, mode="nearest")
                      for axis in range(field.shape[-1])], -1)


@jax.jit
def _in_fixed(u, points, targets):
    """s_k = phi^-1(t_k); where it cannot be found, x_k + t_k - phi(x_k)."""
    found, converged = inverse_at(u, targets, points, 100)
    return jnp.where(converged[:, None], found, targets - _sampled(u, points))


@jax.jit
def softly(u: chex.Array, points: chex.Array, targets: chex.Array, trust: chex.Array) -> jax.Array:
    """The targets (N, 3); of landmarks of a weight below 1, the places that they have now. The arguments are those of
    `guided`."""
    return jnp.where(trust[:, None] < 1, points + _sampled(u, points), targets)


@partial(jax.jit, static_argnames="max_step")
def _by_landmarks(u, points, targets, reach, max_step):
    """phi = id + u after steps of the landmarks alone, until all are closer than `CLOSE` or `MOST` steps are done."""
    if not len(points):
        return u

    def step(state):
        i, u, near = state
        lack, near = _lacking(u, points, targets, near)
        v = landmark_force(spatial_shape(u), points, clip_length(lack, max_step), reach, max_step)
        return i + 1, compositional_update(u, v, UPDATE_STEPS), near

    def going_on(state):
        return (state[0] < MOST) & (remaining(state[1], points, targets).max() > CLOSE)

    return jax.lax.while_loop(going_on, step, (0, u, points))[1]


@partial(jax.jit, static_argnames="max_step")
def _by_borders(u, fixed, moving, reach, max_step):
    """phi = id + u after `LAST_STEPS` steps of the borders alone, on the grid of the images."""
    def step(_, u):
        force = border_force(fixed, warp(moving, u), max_step, reach)
        return compositional_update(u, gaussian_smooth(force, LAST_SIGMA), UPDATE_STEPS)

    return jax.lax.fori_loop(0, LAST_STEPS, step, u)


def _lacking(u, points, targets, near):
    """What each landmark lacks, phi^-1(t_k) - x_k, and phi^-1(t_k), which is searched from `near`."""
    near, converged = inverse_at(u, targets, near, 50)
    return jnp.where(converged[:, None], near - points, targets - points - _sampled(u, points)), near


@jax.jit
def _around_borders(distances, region):
    """How much images drive each voxel around borders, as `driven_by_images` around points, on a grid that is `STRIDE`
    times coarser than that of the signed distances."""
    distance = jnp.abs(distances).min(-1, keepdims=True)
    return average_pool(jnp.minimum(1, 2 * kernel(distance / region)), STRIDE)


@partial(jax.jit, static_argnames=("iterations", "driven", "max_step", "scale"))
def _by_both(fixed, warped, psi, points, targets, reach, weight, trust, borders, along, *, iterations, driven, max_step,
             scale, sigma_fluid, sigma_diffusion):
    """psi after steps of landmarks, borders and images together. `warped` is the moving image after phi. psi, the
    points, the lengths and the weight of the images are those of a grid that is `STRIDE` times coarser. `borders` is
    None, or the signed distances in the fixed image and in the moving image after phi, and `along` the reach of their
    force. `driven` is None where images do not drive."""
    space, bound = spatial_shape(psi), max_step / STRIDE
    if borders is not None:
        share = average_pool(kernel(jnp.abs(borders[0]).min(-1, keepdims=True) / along), STRIDE)

    def step(_, state):
        psi, near = state
        field, p = resize_field(psi, fixed.shape[:-1]), jnp.zeros_like(psi)
        if driven is not None:
            p, _ = smoothed_force(driven, fixed, warp(warped, field), space, max_step, sigma_fluid)
            p = scale_longest(p * weight, bound) if scale else p * weight
        if borders is not None:
            force = border_force(borders[0], warp(borders[1], field), max_step, along)
            p = (1 - share) * p + gaussian_smooth(average_pool(force, STRIDE) / STRIDE, sigma_fluid)
        if len(points):
            lack, near = _lacking(psi, points, targets, near)
            wanted = trust[:, None] * (clip_length(lack, bound) - _sampled(p, points))
            p = p + landmark_force(space, points, wanted, reach, 2 * bound)
        psi = compositional_update(psi, _bounded(p, bound), UPDATE_STEPS)
        return psi + weight * (gaussian_smooth(psi, sigma_diffusion) - psi), near

    return jax.lax.fori_loop(0, iterations, step, (psi, points))[0]


_warped = jax.jit(warp)
_composed = jax.jit(lambda u, psi: compose(u, resize_field(psi, spatial_shape(u))))
