"""Figures of registrations and of training, as PNG files.

Arrays belong to one pair and are RAS: axis 0 runs to the Right, 1 to Anterior, 2 to Superior. Spacing is in mm.
Colour-blind readers can distinguish the colours. No global state of matplotlib is changed. Every file is written under
a temporary name and then renamed, so no reader finds an incomplete file.
"""

import io
import re
from dataclasses import replace

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from scipy import ndimage

from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.tables import write_bytes
from drivenmorph_jax.evaluation.tiles import BLUE, GREY, HALO, ORANGE, SKY, VIEWS, YELLOW, Sheet, Tile, usual_length
from drivenmorph_jax.fields.grid import resize
from drivenmorph_jax.images.volume import canonical

SQUARE = 16.0  # mm, of a checkerboard


def overview(path, fixed, moving, warped, u, force, jac, spacing, title="", labels=None, matched=None,
             heads=None, confidence=None):
    """One page for one pair: images, differences, checkerboard, grid, displacement beside driving force, Jacobian.

    The three planes pass through the centre of mass of the fixed brain. All have one scale in mm. Grid and arrows show
    the in-plane part of phi: an arrow runs from a fixed point to the moving point that it samples. Arrows are
    magnified: displacement and force each have a factor of their own, which the key gives.

    Args:
      path: the PNG to write.
      fixed, moving, warped: (D, H, W) or (D, H, W, 1) on the fixed grid, `moving` after the affine.
      u, force: (D, H, W, 3) in voxels.
      jac: det(I + grad u), (D, H, W), or with 2 voxels cropped at each side as `metrics.jacobian` returns it.
      spacing: voxel size in mm, (3,).
      title: the first line is bold; further lines (times, numbers) follow below it.
      labels: (D, H, W) fixed label map; its outlines are drawn over fixed, moving and warped.
      matched: for images of different contrast, (moving, warped) with the values of the fixed image; differences and
        checkerboards show these.
      heads: {"Fixed", "Moving" or "Warped": (whole head, mask of its brain)}, (D, H, W) each; the panels of these names
        show the head, and the outline of the mask.
      confidence: (D, H, W) in [0, 1], see `registration.confidence`; without it, a checkerboard before the registration
        is shown in its place.
    """
    fixed, moving, warped, *matched = (np.asarray(x, np.float32).reshape(x.shape[:3])
                                       for x in (fixed, moving, warped, *(matched or (moving, warped))))
    spacing = np.asarray(spacing, float)
    u, force = (np.asarray(x, np.float32) * np.float32(spacing) for x in (u, force))
    jac = uncropped(jac, fixed.shape)
    white = np.percentile(fixed[fixed > 0], 99.5) if (fixed > 0).any() else 1.0
    brain = metrics.brain(fixed > 0.05 * white)
    brain = brain if brain.any() else np.ones_like(brain)
    centre = np.rint(ndimage.center_of_mass(brain)).astype(int)
    box = _box(brain | (moving > 0.05 * white), spacing)

    blocks = [_image_panels(fixed, moving, warped, matched, brain, white, spacing, labels, heads or {}),
              _deformation_panels(fixed, moving, u, force, jac, brain, white)]
    if confidence is None:
        blocks[1]["Checkerboard, after"] = blocks[0].pop("Checkerboard, after")
    else:
        del blocks[0]["Checkerboard, before"]
        blocks[1]["Confidence"] = lambda tile: tile.image(confidence, Normalize(0, 1), "cividis", inside=brain)
    folded = (brain & (jac <= 0)).any()
    bars = {"|Fixed − Warped|": (2, "intensity, one scale for both"), "|Displacement|": (1, "mm"),
            "log Jacobian": (1, "log J" + (", yellow: J ≤ 0" if folded else "")),
            "Confidence": (1, "squared local correlation")}

    width, heights = _sizes(box, spacing)
    sheet = Sheet(6, heights, title)
    for block, panels in enumerate(blocks):
        for column, (name, draw) in enumerate(panels.items()):
            for row, (view, axes, letters) in enumerate(VIEWS):
                tile = Tile(sheet.axes(block, row, column), axes, centre, box, spacing, width)
                shown = draw(tile)
                if row == 0:
                    tile.ax.set_title(name, fontsize=10.5, pad=5)
                if column == 0:
                    tile.ax.set_ylabel(view, fontsize=10, labelpad=5)
                    tile.letters(letters)
                    tile.scale_bar()
            if name in bars:
                columns, label = bars[name]
                sheet.bar(block, column - columns + 1, column, shown, label)
    sheet.note(1, "Grid and arrows are the in-plane part of φ; an arrow runs\n"
                  "from a fixed point to the moving point that it samples.")
    _save(sheet.figure, path)


def means(path, images, spacing, title="", note=""):
    """Draw three planes through the brain of each of several images of one grid, {name: (D, H, W)}, side by side.

    All have the grey values of the last, and the planes pass through the centre of mass of its brain.
    """
    *_, last = images.values()
    white, spacing = np.percentile(last[last > 0], 99.5), np.full(3, float(spacing))
    brain = last > 0.05 * white
    centre, box = np.rint(ndimage.center_of_mass(brain)).astype(int), _box(brain, spacing)
    width, heights = _sizes(box, spacing)
    sheet = Sheet(len(images), heights, title, blocks=1)
    for column, (name, image) in enumerate(images.items()):
        for row, (view, axes, letters) in enumerate(VIEWS):
            tile = Tile(sheet.axes(0, row, column), axes, centre, box, spacing, width)
            tile.image(image, Normalize(0, white), "gray")
            if row == 0:
                tile.ax.set_title(name, fontsize=10.5, pad=5)
            if column == 0:
                tile.ax.set_ylabel(view, fontsize=10, labelpad=5)
                tile.letters(letters)
    sheet.note(0, note)
    _save(sheet.figure, path)


def outline(path, image, mask, title=""):
    """Draw three planes of a Volume through the middle of its brain, and the outline of the brain's mask, a Volume."""
    image, mask = canonical(image), canonical(mask)
    inside, spacing = mask.data > 0, image.spacing
    centre = np.rint(ndimage.center_of_mass(inside)).astype(int)
    box = tuple(slice(0, n) for n in inside.shape)
    width = max((box[a].stop - box[a].start) * spacing[a] for a in (0, 1))
    sheet = Sheet(3, [max(n * size for n, size in zip(inside.shape, spacing, strict=True)) / width], title, blocks=1)
    white = np.percentile(image.data[inside], 99.5)
    for column, (view, axes, letters) in enumerate(VIEWS):
        tile = Tile(sheet.axes(0, 0, column), axes, centre, box, spacing, width)
        tile.image(image.data, Normalize(0, white), "gray")
        tile.outlines(inside, SKY, 1.0)
        tile.ax.set_title(view, fontsize=10.5, pad=5)
        tile.letters(letters)
    volume = np.count_nonzero(inside) * spacing.prod() / 1e3
    sheet.note(0, f"Blue: the outline of the brain, {volume:.0f} ml.")
    _save(sheet.figure, path)


def labelled(path, image, labels, confidence, title=""):
    """Draw three planes of a Volume near the middle of its labels: their outlines, and their confidence.

    Args:
      path: the PNG to write.
      image: the Volume of the scan.
      labels, confidence: (X, Y, Z) on its grid; the confidence from 0 to 1.
      title: as in `overview`.
    """
    image, labels, confidence = (canonical(replace(image, data=x)) for x in (image.data, labels, confidence))
    inside, spacing = labels.data > 0, image.spacing
    inside = inside if inside.any() else np.ones_like(inside)
    centre, box = np.rint(ndimage.center_of_mass(inside)).astype(int), _box(inside, spacing)
    centre[0] += (box[0].stop - box[0].start) // 8  # beside the gap between the halves of a brain
    width = max((box[a].stop - box[a].start) * spacing[a] for a in (0, 1))
    height = max((box[a].stop - box[a].start) * spacing[a] for a in (1, 2)) / width
    sheet = Sheet(3, [height, height], title, blocks=1, tile=3.6)
    white = np.percentile(image.data[inside], 99.5)
    for column, (view, axes, letters) in enumerate(VIEWS):
        outlines, sure = (Tile(sheet.axes(0, row, column), axes, centre, box, spacing, width) for row in (0, 1))
        outlines.image(image.data, Normalize(0, white), "gray")
        outlines.outlines(labels.data)
        outlines.ax.set_title(view, fontsize=10.5, pad=5)
        outlines.letters(letters)
        shown = sure.image(confidence.data, Normalize(0, 1), "cividis", inside=inside)
    sheet.bar(0, 0, 2, shown, "confidence")
    _save(sheet.figure, path)


def _sizes(box, spacing):
    """(the width of a tile in mm, the heights of the three views as multiples of it).

    All tiles have one width, so that the views are at the same scale.
    """
    width = max((box[a].stop - box[a].start) * spacing[a] for a in (0, 1))
    return width, [(box[up].stop - box[up].start) * spacing[up] / width for _, (_, up), _ in VIEWS]


def _image_panels(fixed, moving, warped, matched, brain, white, spacing, labels, heads):
    """{name: function that draws it on a tile} of the images, their differences and their checkerboards."""
    before, after = (np.abs(fixed - x) for x in matched)
    intensity = Normalize(0, white)
    difference = Normalize(0, max(np.percentile(before[brain], 99.5), 1e-6))
    squares = sum((np.arange(n) * spacing[axis] // SQUARE).astype(np.int16).reshape(
        [-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(fixed.shape)) % 2 == 0

    def anatomy(tile, x, name):
        x, mask = heads.get(name, (x, None))
        tile.image(x, intensity, "gray")
        if mask is not None:
            tile.outlines(mask > 0.5, SKY, 1.0)
        if labels is not None:
            tile.outlines(labels)

    def checkerboard(tile, x):
        tile.image(np.where(squares, fixed, x), intensity, "gray")

    return {"Fixed": lambda tile: anatomy(tile, fixed, "Fixed"),
            "Moving": lambda tile: anatomy(tile, moving, "Moving"),
            "Warped": lambda tile: anatomy(tile, warped, "Warped"),
            "|Fixed − Moving|": lambda tile: tile.image(before, difference, "inferno"),
            "|Fixed − Warped|": lambda tile: tile.image(after, difference, "inferno"),
            "Checkerboard, before": lambda tile: checkerboard(tile, matched[0]),
            "Checkerboard, after": lambda tile: checkerboard(tile, matched[1])}


def _deformation_panels(fixed, moving, u, force, jac, brain, white):
    """{name: function that draws it on a tile} of the grid, displacement, driving force and Jacobian."""
    size, folded = np.sqrt(np.einsum("...i,...i", u, u)), brain & (jac <= 0)
    log_jac = np.log(np.maximum(jac, 1e-3))
    bound = max(np.percentile(np.abs(log_jac[brain & ~folded]), 99.5), 0.1)
    length = Normalize(0, max(np.percentile(size[brain], 99.8), 0.1))

    def grid(tile):
        tile.image(moving, Normalize(0, 1.4 * white), "gray")
        tile.grid(u, SKY)

    usual = usual_length(size[brain]), usual_length(np.linalg.norm(force[brain], axis=-1))

    def arrows(tile, vectors, colour, usual):
        tile.image(fixed, Normalize(0, 1.8 * white), "gray")
        tile.arrows(vectors, brain, colour, usual)

    def logarithm(tile):
        shown = tile.image(log_jac, Normalize(-bound, bound), "RdBu_r", inside=brain)
        tile.image(np.where(folded, 1.0, np.nan), Normalize(0, 1), ListedColormap([YELLOW]))
        return shown

    return {"Deformed grid on Moving": grid,
            "Displacement": lambda tile: arrows(tile, u, ORANGE, usual[0]),
            "Driving force": lambda tile: arrows(tile, force, SKY, usual[1]),
            "|Displacement|": lambda tile: tile.image(size, length, "cividis", inside=brain),
            "log Jacobian": logarithm}


def uncropped(jac, shape):
    """A Jacobian determinant on the whole grid `shape`: 1 at the voxels that `metrics.jacobian` cropped."""
    return jac if jac.shape == shape else np.pad(jac, 2, constant_values=1.0)


def forces(path, fixed, levels, spacing):
    """The driving force, one row a level, coarse to fine: its two terms, their sum, the remaining displacement.

    All tiles show the axial plane through the centre of mass of the fixed brain. The left three columns show lengths;
    in each row they share one scale, that of the force. Arrows are magnified, in each tile by the factor that its key
    gives.

    Args:
      path: the PNG to write.
      fixed: (D, H, W).
      levels: `network.outputs.LevelForces`, (D, H, W, 3) each in voxels of the image, coarse to fine.
      spacing: voxel size in mm, (3,).
    """
    spacing = np.asarray(spacing, float)
    brain = metrics.brain(fixed)
    centre, box = np.rint(ndimage.center_of_mass(brain)).astype(int), _box(brain, spacing)
    _, axes, letters = VIEWS[0]
    width, height = ((box[a].stop - box[a].start) * spacing[a] for a in axes)
    sheet = Sheet(5, [height / width] * len(levels), "The driving force, coarse to fine", blocks=1)
    white = np.percentile(fixed[brain], 99.5)
    for row, level in enumerate(levels):
        vectors = {name: np.asarray(resize(np.asarray(getattr(level, key), np.float32), fixed.shape)) * spacing
                   for name, key in (("Demons term", "demons_force"), ("Attention term", "attention_force"),
                                     ("Driving force", "force"), ("Remaining displacement", "remaining"))}
        sizes = {name: np.linalg.norm(vectors[name], axis=-1) for name in (
            "Demons term", "Attention term", "Driving force")}
        most = max(np.percentile(sizes["Driving force"][brain], 99.5), 1e-3)
        for column, name in enumerate(("Demons term", "Attention term", "|Driving force|", "Driving force",
                                       "Remaining displacement")):
            tile = Tile(sheet.axes(0, row, column), axes, centre, box, spacing, width)
            if column < 3:
                tile.image(sizes[name.strip("|")], Normalize(0, most), "cividis", inside=brain)
                if column == 2:
                    tile.ax.text(0.97, 0.97, f"yellow: {most:.1f} mm", transform=tile.ax.transAxes, color="white",
                                 ha="right", va="top", fontsize=8, path_effects=[HALO])
            else:
                tile.image(fixed, Normalize(0, 1.8 * white), "gray")
                tile.arrows(vectors[name], brain, SKY if column == 3 else ORANGE,
                            usual_length(np.linalg.norm(vectors[name][brain], axis=-1)))
            if row == 0:
                tile.ax.set_title(f"|{name}|" if column < 2 else name, fontsize=10.5, pad=5)
            if column == 0:
                tile.ax.set_ylabel(f"Level {row + 1}", fontsize=10, labelpad=5)
                tile.letters(letters)
                tile.scale_bar()
    sheet.note(0, "Each level starts from what the coarser ones left. Terms and force of a row at one scale, whose "
                  "end is written; arrows show the in-plane part.")
    _save(sheet.figure, path)


def curves(path, rows):
    """The loss, and the validation Dice where there is one, over the training steps.

    Args:
      path: the PNG to write.
      rows: dicts with "step" and "loss" or "val_dice" or both, in order.
    """
    panels = []
    for key, name, colour in (("loss", "Training loss", BLUE), ("val_dice", "Validation Dice", ORANGE)):
        points = [(row["step"], row[key]) for row in rows if np.isfinite(np.array(row.get(key), float))]
        if points:
            panels.append((key, name, colour, np.array(points, float).T))
    figure = Figure(figsize=(5.2 * max(len(panels), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for ax, (key, name, colour, (step, value)) in zip(axes, panels, strict=False):
        window = max(len(value) // 50, 1) if key == "loss" else 1
        if window > 1:
            ax.plot(step, value, color=colour, alpha=0.25, linewidth=0.8)
            value = ndimage.uniform_filter1d(value, window, mode="nearest")
        marker = "o" if len(value) < 40 else None
        ax.plot(step, value, color=colour, linewidth=1.8, marker=marker, markersize=3.5)
        if key == "val_dice":
            best = int(np.argmax(value))
            ax.annotate(f"best {value[best]:.4f} at {step[best]:.0f}", (1, 0), (-6, 8),
                        xycoords="axes fraction", textcoords="offset points", ha="right", color=GREY,
                        fontsize=9)
        ax.set_title(name, fontsize=11, loc="left")
        ax.set_xlabel("step")
        _plain(ax, "y")
    _save(figure, path)


def dice_boxplot(path, before, after, names=None, most=30):
    """Dice before and after registration: a pair of boxes for each structure, the best structure on top.

    With more than `most` structures, left and right are merged. If these are still more, `most` of them are drawn,
    evenly spaced from the best to the worst.

    Args:
      path: the PNG to write.
      before, after: {label: [Dice of each pair]}.
      names: {label: name}; a label without a name is shown by its number.
    """
    names = names or {}
    groups = {}
    for label in after:
        groups.setdefault(str(names.get(label, label)), []).append(label)
    if len(groups) > most:
        merged = {}
        for name, members in groups.items():
            merged.setdefault(_without_side(name), []).extend(members)
        groups = merged
    pooled = {name: [_finite(v for label in members for v in x.get(label, ())) for x in (before, after)]
              for name, members in groups.items()}
    pooled = {name: values for name, values in pooled.items() if values[1].size}
    order = sorted(pooled, key=lambda name: np.median(pooled[name][1]))
    total = len(order)
    if total > most:
        order = [order[i] for i in np.unique(np.linspace(0, total - 1, most).astype(int))]

    figure = Figure(figsize=(7.2, 1.2 + 0.3 * len(order)), layout="constrained")
    ax = figure.subplots()
    for index, (offset, colour, label) in enumerate(((0.2, "#BBBBBB", "before"), (-0.2, BLUE, "after"))):
        ax.boxplot([pooled[name][index] for name in order], positions=np.arange(len(order)) + offset,
                   orientation="horizontal", widths=0.32, patch_artist=True, manage_ticks=False,
                   boxprops={"facecolor": colour, "edgecolor": "none"}, whiskerprops={"color": GREY},
                   capprops={"visible": False}, medianprops={"color": "black", "linewidth": 1.3},
                   flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY})
        ax.barh(0, 0, color=colour, label=label)
    ax.set_yticks(range(len(order)), order, fontsize=8.5)
    ax.set_ylim(-0.7, len(order) - 0.3)
    ax.set_xlim(0, 1)
    ax.set_xlabel("Dice" + (f" ({len(order)} of {total} structures)" if total > len(order) else ""))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    _plain(ax, "x")
    _save(figure, path)


def boxes(path, groups, label):
    """A box for each of {name: numbers}, in the order given. The first is on top and has another colour.

    Args:
      path: the PNG to write.
      label: the quantity that the numbers give.
    """
    figure = Figure(figsize=(7.2, 1.0 + 0.42 * len(groups)), layout="constrained")
    ax = figure.subplots()
    shown = ax.boxplot(list(groups.values()), orientation="horizontal", widths=0.6, patch_artist=True,
                       tick_labels=list(groups), whiskerprops={"color": GREY}, capprops={"visible": False},
                       medianprops={"color": "black", "linewidth": 1.3},
                       flierprops={"marker": ".", "markersize": 3, "markeredgecolor": GREY})
    for i, patch in enumerate(shown["boxes"]):
        patch.set(facecolor=BLUE if i == 0 else "#BBBBBB", edgecolor="none")
    ax.invert_yaxis()
    ax.set_xlabel(label)
    _plain(ax, "x")
    _save(figure, path)


def _box(inside, spacing, margin=7.0):
    """The slices of the box around `inside`, with a margin of `margin` mm."""
    found = ndimage.find_objects(inside.astype(np.uint8))[0]
    pad = [int(np.ceil(margin / s)) for s in spacing]
    return [slice(max(s.start - p, 0), min(s.stop + p, n))
            for s, p, n in zip(found, pad, inside.shape, strict=True)]


def _plain(ax, grid):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, color=GREY)


def _without_side(name):
    """The name of a structure without its side: X for Left-X, X_right or ctx-lh-X."""
    bare = re.sub(r"(?i)(?<![a-z])(left|right|lh|rh)(?![a-z])", " ", name)
    return re.sub(r"[\s_-]*\s[\s_-]*", " ", bare).strip(" -_") or name


def _finite(values):
    values = np.array(list(values), float)
    return values[np.isfinite(values)]


def _save(figure, path):
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    # At zlib's usual level, 6, compressing takes twice as long, for 4 % of the size.
    figure.savefig(data, format="png", dpi=150, pil_kwargs={"compress_level": 4})
    write_bytes(path, data.getvalue())
