"""Label fusion: the votes of registered atlases at each voxel of a scan.

Atlas i has the label S_i(x) at voxel x and the weight w_i(x), with sum_i w_i(x) = 1. A label l gets the votes

  V_l(x) = K * sum_i w_i(x) [S_i(x) = l]

with a Gaussian K of `SMOOTH` voxels, and the label with most votes wins. Its votes are the confidence. The weights come
from patches: of the scan, t, and of each atlas, a_i, with mean 0 and norm 1 each.

  majority   w_i = 1 / N
  local      w_i ~ 1 / |a_i - t|^2
  joint      w = M^-1 1 / (1^T M^-1 1),   M_ij = (sum_y |a_i(y) - t(y)| |a_j(y) - t(y)|)^BETA + ALPHA [i = j]

The joint weights minimise the expected error of the votes, where M_ij measures how likely the atlases i and j err
together: atlases that make the same error share the weight of one.

Weights are computed for blocks of `BLOCK`^3 voxels, whose patch reaches `REACH` voxels beyond the block. Those of
3^3 blocks are averaged, since a patch speaks for all of its voxels, and interpolated linearly.

Reference: Wang et al., Multi-atlas segmentation with joint label fusion, IEEE TPAMI 2013; local weights as in
Artaechevarria et al., Combination strategies in multi-atlas image segmentation, IEEE TMI 2009.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from scipy import ndimage

from drivenmorph_jax.fields.grid import resize
from drivenmorph_jax.fields.smooth import box_mean

BLOCK, REACH = 2, 1  # voxels
BETA, ALPHA = 2, 0.1  # as in the paper
SMOOTH = 0.5  # voxels, standard deviation
CHUNK = 4096  # blocks that are computed together
FLAT = 1e-6  # of a patch without contrast: its squared norm


def fused(scan, images, labels, grid, volume, fusion="joint"):
    """The label of each voxel of a scan, and its confidence.

    Args:
      scan: (D, H, W), the scan on the working grid. The sides are even.
      images, labels: (N, D, H, W), the registered atlases there; labels are whole numbers from 0 on, 0 is background.
      grid: (4, 4), the affine of the working grid, voxel to RAS mm.
      volume: the Volume of the scan. The votes are interpolated linearly on its grid.
      fusion: a name of `FUSIONS`.

    Returns:
      (labels, confidence), (X, Y, Z) on the grid of `volume`; the confidence is float32 from 0 to 1.
    """
    return winners(FUSIONS[fusion](scan, images, labels), labels, grid, volume)


def equal_weights(scan, images, labels):
    """The weights of a majority vote, (N, D, H, W). The arguments are those of `fused`."""
    return np.broadcast_to(np.float32(1 / len(labels)), labels.shape)


def local_weights(scan, images, labels):
    """Weights by local similarity, (N, D, H, W). The arguments are those of `fused`."""
    return _of_blocks(_local, scan, images, labels)


def joint_weights(scan, images, labels):
    """The weights of joint label fusion, (N, D, H, W). The arguments are those of `fused`."""
    return _of_blocks(_joint, scan, images, labels)


FUSIONS = {"joint": joint_weights, "local": local_weights, "majority": equal_weights}


def winners(weights, labels, grid, volume):
    """The labels that have most votes, and these votes. Arguments and returned arrays are those of `fused`.

    Of labels with equally many votes, the smallest wins.
    """
    to_grid = np.linalg.inv(grid) @ volume.affine  # from voxels of the scan to those of the working grid
    shape = volume.data.shape
    found, most = np.zeros(shape, labels.dtype), np.zeros(shape, np.float32)
    most += 1 - _sampled(1 - _votes(weights, labels, 0), to_grid, [slice(0, n) for n in shape])
    count = int(labels.max())
    boxes = [ndimage.find_objects(x.astype(np.int32), count) for x in labels]
    for label, of_atlases in enumerate(zip(*boxes, strict=True), start=1):
        there = [box for box in of_atlases if box is not None]
        if not there:
            continue
        # At each end, the voxels to which the Gaussian and the linear interpolation reach.
        box = tuple(slice(max(min(s.start for s in along) - 3, 0), max(s.stop for s in along) + 3)
                    for along in zip(*there, strict=True))
        part = _part(box, to_grid, shape)
        shifted = to_grid.copy()
        shifted[:3, 3] -= [s.start for s in box]
        votes = _sampled(_votes(weights[:, *box], labels[:, *box], label), shifted, part)
        better = votes > most[part] + 1e-6
        found[part][better] = label
        most[part][better] = votes[better]
    return found, np.clip(most, 0, 1)


def _votes(weights, labels, label):
    votes = sum(w * (x == label) for w, x in zip(weights, labels, strict=True))
    return ndimage.gaussian_filter(votes, SMOOTH, mode="nearest")


def _part(box, to_grid, shape):
    """The slices of the scan's grid that hold a box of the working grid."""
    ends = np.array(np.meshgrid(*((s.start - 1, s.stop) for s in box), [1.0])).reshape(4, -1)
    x = (np.linalg.inv(to_grid) @ ends)[:3]
    low, high = np.floor(x.min(1)).astype(int), np.ceil(x.max(1)).astype(int) + 1
    return tuple(slice(min(max(a, 0), n), min(max(b, 0), n)) for a, b, n in zip(low, high, shape, strict=True))


def _sampled(x, matrix, part):
    """x, sampled linearly at the voxels `part` of the scan's grid; `matrix` is from its voxels to those of x."""
    start = matrix @ [*(s.start for s in part), 1.0]
    return ndimage.affine_transform(x.astype(np.float32), matrix[:3, :3], start[:3],
                                    tuple(s.stop - s.start for s in part), order=1, mode="grid-constant",
                                    prefilter=False)


def _of_blocks(weigh, scan, images, labels):
    """Weights (N, D, H, W) by weigh(scan's patch (P, V), atlases' patches (N, P, V)) -> (N, V), V blocks at once.

    Blocks in which the atlases agree at each voxel need none; there, the weights are equal.
    """
    number, *space = labels.shape
    blocks = [n // BLOCK for n in space]
    apart = (labels != labels[0]).any(0).reshape([side for n in blocks for side in (n, BLOCK)]).any((1, 3, 5))
    weights = np.full((number, *blocks), np.float32(1 / number))
    scan, images = (jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(REACH, REACH)] * 3, mode="edge") for x in (scan, images))
    steps = np.array([scan.shape[1] * scan.shape[2], scan.shape[2], 1])  # between the voxels of a flattened image
    side = np.arange(BLOCK + 2 * REACH)
    patch = (side[:, None, None] * steps[0] + side[:, None] * steps[1] + side).ravel()
    first = BLOCK * np.argwhere(apart) @ steps
    found = [_weights(scan, images, np.resize(first[k:k + CHUNK], CHUNK), patch, weigh)
             for k in range(0, len(first), CHUNK)]
    if found:
        weights[:, apart] = np.concatenate(found, 1)[:, :len(first)]
    return np.concatenate([_spread(x) for x in weights[:, None]])


@partial(jax.jit, static_argnames="weigh")
def _weights(scan, images, first, patch, weigh):
    places = patch[:, None] + first

    def normalised(image):
        x = image.ravel()[places]
        x -= x.mean(0)
        return x / jnp.sqrt((x * x).sum(0) + FLAT)

    return weigh(normalised(scan), jax.lax.map(normalised, images))


def _local(scan, images):
    near = 1 / (((images - scan) ** 2).sum(1) + FLAT)
    return near / near.sum(0)


def _joint(scan, images):
    error = abs(images - scan)
    together = jnp.einsum("ipv,jpv->vij", error, error) ** BETA + ALPHA * jnp.eye(len(images))
    weights = cho_solve(cho_factor(together), jnp.ones((*together.shape[:2], 1)))[..., 0].T
    return weights / weights.sum(0)


@jax.jit
def _spread(weights):
    """Weights of blocks (1, d, h, w), averaged over 3^3 blocks and interpolated to voxels (1, D, H, W)."""
    mean = box_mean(jnp.pad(weights[0], 1, mode="edge"), 1)[None, 1:-1, 1:-1, 1:-1]
    return resize(mean[..., None], [BLOCK * n for n in weights.shape[1:]])[..., 0]
