"""Figures and tables of registrations: arrays and numbers in, files out.

Arrays are of one pair, RAS: axis 0 runs to the Right, 1 to Anterior, 2 to Superior; spacing in mm. Colours
stay apart for colour-blind readers; no global matplotlib state is touched. Every file is written beside its
place and then moved there, so that a reader never sees half of one.
"""

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from drivenmorph_jax import metrics
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.grid import resize
from drivenmorph_jax.metrics import DEFINITIONS

BLUE, ORANGE, SKY, YELLOW, GREY = "#0072B2", "#E69F00", "#56B4E9", "#F0E442", "#5A5A5A"  # Okabe and Ito

SQUARE = 16.0  # mm, of a checkerboard
HALO = withStroke(linewidth=3, foreground="black")

# Name of the view, the axes it shows as (right, up), and the letters at its left, right, bottom and top.
VIEWS = (("Axial", (0, 1), "LRPA"), ("Coronal", (0, 2), "LRIS"), ("Sagittal", (1, 2), "PAIS"))

LABELS = {
    "dice": "Dice", "dice_initial": "Dice before", "hd95": "HD95 (mm)", "sdlogj": "SDlogJ",
    "sdlogj_l2r": "SDlogJ (Learn2Reg)", "fold_pct": "J ≤ 0 (%)", "ndv_pct": "NDV (%)",
    "inverse_mm": "Inverse consistency (mm)", "tre_mm": "TRE (mm)", "seconds": "Seconds a pair",
    "cosine": "Force cosine", "pearson": "Force Pearson r", "spearman": "Force Spearman ρ", "r2": "Force R²",
}

OF_FORCE = ("cosine", "pearson", "spearman", "r2")
OF_PAIRS = "Mean and standard deviation over the pairs, {} in all."
ABOUT_FORCE = ("The forces of each level against the displacement that remained when it began, and their sum against "
               "the whole: mean over pairs with its 95 % bootstrap interval. Control: the force of one pair against "
               "the displacement of another.")


def overview(path, fixed, moving, warped, u, force, jac, spacing, title="", labels=None, matched=None):
    """One page for one pair: images, differences, checkerboards, grid, displacement beside driving force, Jacobian.

    The three planes pass through the fixed brain's centre of mass, all at one scale in mm. Grid and arrows
    show the in-plane part of phi: an arrow runs from a fixed point to the moving point that it samples.
    Arrows are magnified, displacement and force each by its own factor, which the key gives.

    Args:
      path: the PNG to write.
      fixed, moving, warped: (D, H, W) or (D, H, W, 1) on the fixed grid, `moving` after the affine.
      u, force: (D, H, W, 3) in voxels.
      jac: det(I + grad u), (D, H, W), or with 2 voxels cropped each side as `metrics.jacobian` gives it.
      spacing: voxel size in mm, (3,).
      title: first line in bold; further lines (times, numbers) below it.
      labels: (D, H, W) fixed label map; its outlines are drawn over fixed, moving and warped.
      matched: moving and warped, of another contrast, with the values of the fixed image: what differences and
        checkerboards show.
    """
    fixed, moving, warped, *matched = (np.asarray(x, np.float32).reshape(x.shape[:3])
                                       for x in (fixed, moving, warped, *(matched or (moving, warped))))
    spacing = np.asarray(spacing, float)
    u, force = np.asarray(u, np.float32) * spacing, np.asarray(force, np.float32) * spacing
    jac = uncropped(jac, fixed.shape)
    white = np.percentile(fixed[fixed > 0], 99.5) if (fixed > 0).any() else 1.0
    brain = ndimage.binary_fill_holes(fixed > 0.05 * white)
    brain = brain if brain.any() else np.ones_like(brain)
    centre = np.rint(ndimage.center_of_mass(brain)).astype(int)
    box = _box(brain | (moving > 0.05 * white), spacing)

    before, after, size = *(np.abs(fixed - x) for x in matched), np.linalg.norm(u, axis=-1)
    folded = brain & (jac <= 0)
    log_jac = np.log(np.maximum(jac, 1e-3))
    bound = max(np.percentile(np.abs(log_jac[brain & ~folded]), 99.5), 0.1)
    intensity, growth = Normalize(0, white), Normalize(-bound, bound)
    difference = Normalize(0, max(np.percentile(before[brain], 99.5), 1e-6))
    length = Normalize(0, max(np.percentile(size[brain], 99.8), 0.1))

    def anatomy(tile, x):
        tile.image(x, intensity, "gray")
        if labels is not None:
            tile.outlines(labels)

    squares = sum(np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) * spacing[axis] // SQUARE
                  for axis, n in enumerate(fixed.shape)) % 2 == 0

    def arrows(tile, vectors, colour):
        tile.image(fixed, Normalize(0, 1.8 * white), "gray")
        tile.arrows(vectors, brain, colour)

    def grid(tile):
        tile.image(moving, Normalize(0, 1.4 * white), "gray")
        tile.grid(u, SKY)

    def logarithm(tile):
        shown = tile.image(log_jac, growth, "RdBu_r", inside=brain)
        tile.image(np.where(folded, 1.0, np.nan), Normalize(0, 1), ListedColormap([YELLOW]))
        return shown

    blocks = [
        {"Fixed": lambda tile: anatomy(tile, fixed),
         "Moving": lambda tile: anatomy(tile, moving),
         "Warped": lambda tile: anatomy(tile, warped),
         "|Fixed − Moving|": lambda tile: tile.image(before, difference, "inferno"),
         "|Fixed − Warped|": lambda tile: tile.image(after, difference, "inferno"),
         "Checkerboard, before": lambda tile: tile.image(np.where(squares, fixed, matched[0]), intensity, "gray")},
        {"Deformed grid on Moving": grid,
         "Displacement": lambda tile: arrows(tile, u, ORANGE),
         "Driving force": lambda tile: arrows(tile, force, SKY),
         "|Displacement|": lambda tile: tile.image(size, length, "cividis", inside=brain),
         "log Jacobian": logarithm,
         "Checkerboard, after": lambda tile: tile.image(np.where(squares, fixed, matched[1]), intensity, "gray")},
    ]
    bars = {"|Fixed − Warped|": (2, "intensity, one scale for both"), "|Displacement|": (1, "mm"),
            "log Jacobian": (1, "log J" + (", yellow: J ≤ 0" if folded.any() else ""))}

    # One width for all tiles, so that the three views are at the same scale.
    width = max((box[a].stop - box[a].start) * spacing[a] for a in (0, 1))
    heights = [(box[up].stop - box[up].start) * spacing[up] / width for _, (_, up), _ in VIEWS]
    sheet = _Sheet(6, heights, title)
    for block, panels in enumerate(blocks):
        for column, (name, draw) in enumerate(panels.items()):
            for row, (view, axes, letters) in enumerate(VIEWS):
                tile = _Tile(sheet.axes(block, row, column), axes, centre, box, spacing, width)
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


def uncropped(jac, shape):
    """A Jacobian determinant on the whole grid `shape`, 1 where `metrics.jacobian` cropped it."""
    return jac if jac.shape == shape else np.pad(jac, 2, constant_values=1.0)


def forces(path, fixed, levels, spacing):
    """Coarse to fine, a row a level: the two terms of the force, the force, and the displacement that remained.

    The axial plane through the fixed brain's centre of mass. The left three are lengths, each row at a scale of its
    own, that of the force; arrows are magnified, each tile by the factor that its key gives.

    Args:
      path: the PNG to write.
      fixed: (D, H, W).
      levels: `explanation.LevelForces` (D, H, W, 3) each, in voxels of the image, coarse to fine.
      spacing: voxel size in mm, (3,).
    """
    spacing = np.asarray(spacing, float)
    brain = metrics.brain(fixed)
    centre, box = np.rint(ndimage.center_of_mass(brain)).astype(int), _box(brain, spacing)
    _, axes, letters = VIEWS[0]
    width, height = ((box[a].stop - box[a].start) * spacing[a] for a in axes)
    sheet = _Sheet(5, [height / width] * len(levels), "The driving force, coarse to fine", blocks=1)
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
            tile = _Tile(sheet.axes(0, row, column), axes, centre, box, spacing, width)
            if column < 3:
                tile.image(sizes[name.strip("|")], Normalize(0, most), "cividis", inside=brain)
                if column == 2:
                    tile.ax.text(0.97, 0.97, f"yellow: {most:.1f} mm", transform=tile.ax.transAxes, color="white",
                                 ha="right", va="top", fontsize=8, path_effects=[HALO])
            else:
                tile.image(fixed, Normalize(0, 1.8 * white), "gray")
                tile.arrows(vectors[name], brain, SKY if column == 3 else ORANGE)
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
    """Loss, and validation Dice where there is one, over the training step.

    Args:
      path: the PNG to write.
      rows: dicts with "step" and "loss" or "val_dice" or both, in order.
    """
    panels = []
    for key, name, colour in (("loss", "Training loss", BLUE), ("val_dice", "Validation Dice", ORANGE)):
        points = [(row["step"], row[key]) for row in rows if np.isfinite(row.get(key, np.nan))]
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
    """Dice before and after registration, a pair of boxes a structure, the best structure on top.

    With more than `most` structures, left and right are merged; with still more, `most` of them are drawn,
    evenly spaced from the best to the worst.

    Args:
      path: the PNG to write.
      before, after: {label: [Dice of each pair]}.
      names: {label: name}; a label without one is shown by its number.
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
    """A box for each of {name: numbers}, in the order given, the first on top and marked.

    Args:
      path: the PNG to write.
      label: what the numbers are.
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


def pairs_csv(path, rows):
    """One line a pair, one column a key, in order of first appearance; a missing number stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _keys(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def markdown_table(summary):
    """`metrics.summarise`'s {metric: {"mean", "std"}} as a Markdown table, one line a metric."""
    lines = ["| Metric | Mean | Std |", "| --- | ---: | ---: |"]
    lines += [f"| {LABELS.get(key, key)} | {_digits(value['mean'])} | {_digits(value['std'])} |"
              for key, value in summary.items()]
    return "\n".join(lines) + "\n"


def pairs_table(rows):
    """A Markdown table, one line a pair."""
    keys = _keys(rows)
    lines = ["| " + " | ".join(LABELS.get(key, key) for key in keys) + " |",
             "| " + " | ".join("---" for _ in keys) + " |"]
    lines += ["| " + " | ".join(_digits(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def report_md(path, summary, rows, figures, force):
    """A Markdown page: the table, the definition of every number in it, the force, every pair, the figures.

    Args:
      path: the file to write; links are relative to its folder.
      summary: {metric: {"mean", "std"}}.
      rows: one dict a pair.
      figures: {caption: path of the picture}.
      force: the Markdown table of the force's statistics, empty where there is no force.
    """
    path = Path(path)
    definitions, of_force = ("\n".join(f"- **{LABELS[key]}**: {DEFINITIONS[key]}" for key in group
                                       if key in DEFINITIONS)
                             for group in (summary, OF_FORCE))
    pictures = [f"### {caption}\n\n![{caption}](<{Path(os.path.relpath(file, path.parent)).as_posix()}>)\n"
                for caption, file in figures.items()]
    parts = ["# Registration report\n", OF_PAIRS.format(len(rows)) + "\n",
             markdown_table(summary), "## Definitions\n", definitions + "\n"]
    parts += ["## The driving force\n", ABOUT_FORCE + "\n", force, of_force + "\n"] if force else []
    parts += ["## Pairs\n", pairs_table(rows)]
    parts += ["## Figures\n", *pictures] if pictures else []
    _write(path, "\n".join(parts).encode())


class _Tile:
    """One plane of a volume on black, in mm; arrays are cut where the tile needs them."""

    def __init__(self, ax, axes, centre, box, spacing, width):
        self.ax, self.box, self.spacing, self.width = ax, box, spacing, width
        self.right, self.up = axes
        self.normal = 3 - self.right - self.up
        self.index = centre[self.normal]
        middle = (box[self.right].start + box[self.right].stop) / 2 * spacing[self.right]
        self.limits = {"xlim": (middle - width / 2, middle + width / 2),
                       "ylim": (box[self.up].start * spacing[self.up], box[self.up].stop * spacing[self.up])}
        ax.set(**self.limits)

    def cut(self, x):
        """The plane with `up` along its rows and `right` along its columns, as imshow takes it."""
        return np.swapaxes(np.take(x, self.index, axis=self.normal), 0, 1)

    def points(self, shape):
        """Coordinates in mm of the voxel centres, (n_up, n_right) each."""
        return np.meshgrid(*((np.arange(shape[a]) + 0.5) * self.spacing[a] for a in (self.right, self.up)))

    def image(self, x, norm, cmap, inside=None):
        """The plane as a picture; outside the mask `inside` it stays black."""
        plane = self.cut(x)
        extent = (0, plane.shape[1] * self.spacing[self.right], 0, plane.shape[0] * self.spacing[self.up])
        shown = self.ax.imshow(plane, cmap=cmap, norm=norm, origin="lower", extent=extent, aspect="auto",
                               interpolation="nearest" if np.isnan(plane).any() else "bilinear")
        if inside is not None:
            # Filled up to the mask's contour, which is smoother than the edges of its voxels.
            outside = np.pad(1.0 - self.cut(inside), 1, constant_values=1.0)
            x, y = (np.arange(-0.5, n - 1) * self.spacing[a]
                    for n, a in zip(outside.shape[::-1], (self.right, self.up), strict=True))
            self.ax.contourf(x, y, outside, levels=[0.5, 2], colors=["black"])
        self.ax.set(**self.limits)
        return shown

    def outlines(self, labels):
        plane = self.cut(labels)
        for label in np.unique(plane[plane > 0]):
            self.ax.contour(*self.points(labels.shape), plane == label, levels=[0.5], colors=[YELLOW],
                            linewidths=0.5)

    def arrows(self, vectors, brain, colour):
        gap = self.width / 19
        steps = [max(round(gap / self.spacing[a]), 1) for a in (self.up, self.right)]
        thin = tuple(slice(step // 2, None, step) for step in steps)
        inside = self.cut(brain)[thin]
        x, y = (c[thin][inside] for c in self.points(brain.shape))
        dx, dy = (self.cut(vectors[..., a])[thin][inside] for a in (self.right, self.up))
        # One magnification for the three views, taken from the whole brain: their arrows can be compared.
        usual = max(np.percentile(np.linalg.norm(vectors[brain], axis=-1), 95), 1e-3)
        quiver = self.ax.quiver(x, y, dx, dy, color=colour, angles="xy", scale_units="xy",
                                scale=usual / (1.5 * gap), width=0.0075, headwidth=3.4, headlength=3.8,
                                headaxislength=3.4, minlength=0.3)
        if self.normal == 2:
            decade = 10 ** np.floor(np.log10(usual))
            mark = max(step for step in (1, 2, 5, 10) if step * decade <= 1.5 * usual) * decade
            self.ax.quiverkey(quiver, 0.86, 0.05, mark, f"{mark:g} mm", labelpos="N", color=colour,
                              labelcolor="white", labelsep=0.05, fontproperties={"size": 8})

    def grid(self, vectors, colour):
        x, y = (point + self.cut(vectors[..., a])
                for point, a in zip(self.points(vectors.shape), (self.right, self.up), strict=True))
        lines = np.stack([x, y], axis=-1)
        along, across = (max(round(self.width / 32 / self.spacing[a]), 1) for a in (self.up, self.right))
        for part in (lines[along // 2::along], lines[:, across // 2::across].swapaxes(0, 1)):
            self.ax.add_collection(LineCollection(list(part), colors=colour, linewidths=0.6), autolim=False)

    def letters(self, letters):
        places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
                  (0.5, 0.015, "center", "bottom"), (0.5, 0.985, "center", "top"))
        for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
            self.ax.text(x, y, letter, transform=self.ax.transAxes, ha=horizontal, va=vertical, color="white",
                         fontsize=9, weight="bold", path_effects=[HALO])

    def scale_bar(self):
        length = max((n for n in (1, 2, 5, 10, 20, 50, 100) if n <= 0.35 * self.width), default=1)
        x, y = self.limits["xlim"][0] + 0.04 * self.width, self.limits["ylim"][0] + 0.03 * self.width
        self.ax.plot([x, x + length], [y, y], color="white", linewidth=2, solid_capstyle="butt",
                     path_effects=[HALO])
        self.ax.text(x + length / 2, y + 0.015 * self.width, f"{length} mm", color="white", fontsize=8,
                     ha="center", va="bottom", path_effects=[HALO])


class _Sheet:
    """A page of blocks of tiles, placed in inches, with a strip for colour bars below each."""

    def __init__(self, columns, heights, title, blocks=2, tile=2.2, gap=0.04, left=0.36, head=0.3, strip=0.62):
        lines = title.split("\n") if title else []
        self.tile, self.gap, self.left, self.head, self.strip = tile, gap, left, head, strip
        # All lengths are whole pixels at 150 dpi: else pictures stick out of their tiles by a part of one.
        self.heights = [round(tile * h / 0.02) * 0.02 for h in heights]
        self.top = 0.12 + 0.26 * len(lines)
        self.block = head + sum(self.heights) + gap * (len(heights) - 1) + strip
        self.width, self.height = left + columns * (tile + gap) + 0.1, self.top + blocks * self.block
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        for i, line in enumerate(lines):
            style = {"fontsize": 10, "color": GREY} if i else {"fontsize": 13, "weight": "bold"}
            self.figure.text(left / self.width, 1 - (0.12 + 0.26 * i) / self.height, line, va="top", **style)

    def axes(self, block, row, column):
        y = self.top + block * self.block + self.head + sum(self.heights[:row]) + self.gap * row
        ax = self._axes(self._x(column), y, self.tile, self.heights[row])
        ax.set(xticks=[], yticks=[], facecolor="black")
        ax.spines[:].set_visible(False)
        return ax

    def bar(self, block, first, last, shown, label):
        width = self._x(last) - self._x(first) + self.tile
        ax = self._axes(self._x(first) + 0.12 * width, self._strip(block), 0.76 * width, 0.09)
        bar = self.figure.colorbar(shown, cax=ax, orientation="horizontal", ticks=MaxNLocator(5))
        bar.outline.set_visible(False)
        bar.set_label(label, fontsize=8.5, labelpad=1)
        ax.tick_params(labelsize=8, length=2, pad=1.5)

    def note(self, block, text):
        self.figure.text(self.left / self.width, 1 - self._strip(block) / self.height, text, va="top",
                         fontsize=8.5, color=GREY)

    def _x(self, column):
        return self.left + column * (self.tile + self.gap)

    def _strip(self, block):
        return self.top + (block + 1) * self.block - self.strip + 0.09

    def _axes(self, x, y, width, height):
        """Axes whose upper left corner lies x and y inches from that of the page."""
        return self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width,
                                     height / self.height))


def _box(inside, spacing, margin=7.0):
    """Slices of the box around `inside` and `margin` mm more."""
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
    """The name of a structure without its side: Left-X, X_right, ctx-lh-X."""
    bare = re.sub(r"(?i)(?<![a-z])(left|right|lh|rh)(?![a-z])", " ", name)
    return re.sub(r"[\s_-]*\s[\s_-]*", " ", bare).strip(" -_") or name


def _finite(values):
    values = np.array(list(values), float)
    return values[np.isfinite(values)]


def _keys(rows):
    return list(dict.fromkeys(key for row in rows for key in row))


def _digits(value):
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _save(figure, path):
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=150)
    _write(path, data.getvalue())


def _write(path, data):
    path = Path(path)
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
