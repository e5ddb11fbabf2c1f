"""The parts of a figure: `Sheet`, a page of tiles, and `Tile`, one plane of a volume.

Volumes are RAS: axis 0 runs to the Right, 1 to Anterior, 2 to Superior. Spacing is in mm.
"""

import numpy as np
from contourpy import contour_generator
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, SKY, YELLOW, GREY = "#0072B2", "#E69F00", "#56B4E9", "#F0E442", "#5A5A5A"  # Okabe and Ito
HALO = withStroke(linewidth=3, foreground="black")
# Name of the view, the axes that it shows to the right and upwards, and the letters at its left, right, bottom and top.
VIEWS = (("Axial", (0, 1), "LRPA"), ("Coronal", (0, 2), "LRIS"), ("Sagittal", (1, 2), "PAIS"))


def usual_length(lengths):
    """The length that 95 % of the vectors of a brain do not exceed; `lengths` are theirs, in mm."""
    return max(np.percentile(lengths, 95), 1e-3)


class Tile:
    """One plane of a volume on black, in mm. Its methods take whole volumes and cut the plane out of them."""

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
        """The plane of a volume, with `up` along its rows and `right` along its columns, as imshow takes it."""
        return np.swapaxes(np.take(x, self.index, axis=self.normal), 0, 1)

    def along(self, shape):
        """Coordinates in mm of the voxel centres along `right` and along `up`."""
        return tuple((np.arange(shape[a]) + 0.5) * self.spacing[a] for a in (self.right, self.up))

    def points(self, shape):
        """Coordinates of the voxel centres in mm, (n_up, n_right) each."""
        return np.meshgrid(*self.along(shape))

    def image(self, x, norm, cmap, inside=None):
        """Draw the plane as a picture; outside the mask `inside` it stays black."""
        plane = self.cut(x)
        extent = (0, plane.shape[1] * self.spacing[self.right], 0, plane.shape[0] * self.spacing[self.up])
        shown = self.ax.imshow(plane, cmap=cmap, norm=norm, origin="lower", extent=extent, aspect="auto",
                               interpolation="nearest" if np.isnan(plane).any() else "bilinear")
        if inside is not None:
            # Black is filled up to the contour of the mask, which is smoother than the edges of its voxels.
            outside = np.pad(1.0 - self.cut(inside), 1, constant_values=1.0)
            x, y = (np.arange(-0.5, n - 1) * self.spacing[a]
                    for n, a in zip(outside.shape[::-1], (self.right, self.up), strict=True))
            self.ax.contourf(x, y, outside, levels=[0.5, 2], colors=["black"])
        self.ax.set(**self.limits)
        return shown

    def outlines(self, labels, colour=YELLOW, width=0.5):
        """Draw the outline of every label in the plane."""
        plane = self.cut(labels)
        # One collection: matplotlib's own contours of a hundred labels take seconds.
        lines = [line for label in np.unique(plane[plane > 0])
                 for line in contour_generator(*self.along(labels.shape), plane == label).lines(0.5)]
        self.ax.add_collection(LineCollection(lines, colors=colour, linewidths=width), autolim=False)

    def arrows(self, vectors, brain, colour, usual):
        """Draw the in-plane part of vectors (D, H, W, 3) in mm as magnified arrows, at sparse voxels of `brain`.

        `usual` is the length of a long vector, see `usual_length`. The three views have one magnification, so that
        their arrows can be compared. The axial tile also gets its key.
        """
        gap = self.width / 19
        steps = [max(round(gap / self.spacing[a]), 1) for a in (self.up, self.right)]
        thin = tuple(slice(step // 2, None, step) for step in steps)
        inside = self.cut(brain)[thin]
        x, y = (c[thin][inside] for c in self.points(brain.shape))
        dx, dy = (self.cut(vectors[..., a])[thin][inside] for a in (self.right, self.up))
        quiver = self.ax.quiver(x, y, dx, dy, color=colour, angles="xy", scale_units="xy",
                                scale=usual / (1.5 * gap), width=0.0075, headwidth=3.4, headlength=3.8,
                                headaxislength=3.4, minlength=0.3)
        if self.normal == 2:
            decade = 10 ** np.floor(np.log10(usual))
            mark = max(step for step in (1, 2, 5, 10) if step * decade <= 1.5 * usual) * decade
            self.ax.quiverkey(quiver, 0.86, 0.05, mark, f"{mark:g} mm", labelpos="N", color=colour,
                              labelcolor="white", labelsep=0.05, fontproperties={"size": 8})

    def grid(self, vectors, colour):
        """Draw a regular grid, deformed by the in-plane part of the displacement `vectors` (D, H, W, 3) in mm."""
        x, y = (point + self.cut(vectors[..., a])
                for point, a in zip(self.points(vectors.shape), (self.right, self.up), strict=True))
        lines = np.stack([x, y], axis=-1)
        along, across = (max(round(self.width / 32 / self.spacing[a]), 1) for a in (self.up, self.right))
        for part in (lines[along // 2::along], lines[:, across // 2::across].swapaxes(0, 1)):
            self.ax.add_collection(LineCollection(list(part), colors=colour, linewidths=0.6), autolim=False)

    def letters(self, letters):
        """Write the letters of the directions at the left, right, bottom and top."""
        places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
                  (0.5, 0.015, "center", "bottom"), (0.5, 0.985, "center", "top"))
        for letter, (x, y, horizontal, vertical) in zip(letters, places, strict=True):
            self.ax.text(x, y, letter, transform=self.ax.transAxes, ha=horizontal, va=vertical, color="white",
                         fontsize=9, weight="bold", path_effects=[HALO])

    def scale_bar(self):
        """Draw a bar of at most 35 % of the width, with its length in mm."""
        length = max((n for n in (1, 2, 5, 10, 20, 50, 100) if n <= 0.35 * self.width), default=1)
        x, y = self.limits["xlim"][0] + 0.04 * self.width, self.limits["ylim"][0] + 0.03 * self.width
        self.ax.plot([x, x + length], [y, y], color="white", linewidth=2, solid_capstyle="butt",
                     path_effects=[HALO])
        self.ax.text(x + length / 2, y + 0.015 * self.width, f"{length} mm", color="white", fontsize=8,
                     ha="center", va="bottom", path_effects=[HALO])


class Sheet:
    """A page of blocks of tiles, laid out in inches, with a strip for colour bars below each block."""

    def __init__(self, columns, heights, title, blocks=2, tile=2.2, gap=0.04, left=0.36, head=0.3, strip=0.62):
        lines = title.split("\n") if title else []
        self.tile, self.gap, self.left, self.head, self.strip = tile, gap, left, head, strip
        # All lengths are whole pixels at 150 dpi. Otherwise pictures extend beyond their tiles by a part of a pixel.
        self.heights = [round(tile * h / 0.02) * 0.02 for h in heights]
        self.top = 0.12 + 0.26 * len(lines)
        self.block = head + sum(self.heights) + gap * (len(heights) - 1) + strip
        self.width, self.height = left + columns * (tile + gap) + 0.1, self.top + blocks * self.block
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        for i, line in enumerate(lines):
            style = {"fontsize": 10, "color": GREY} if i else {"fontsize": 13, "weight": "bold"}
            self.figure.text(left / self.width, 1 - (0.12 + 0.26 * i) / self.height, line, va="top", **style)

    def axes(self, block, row, column):
        """New matplotlib axes at the place of one tile."""
        y = self.top + block * self.block + self.head + sum(self.heights[:row]) + self.gap * row
        ax = self._axes(self._x(column), y, self.tile, self.heights[row])
        ax.set(xticks=[], yticks=[], facecolor="black")
        ax.spines[:].set_visible(False)
        return ax

    def bar(self, block, first, last, shown, label):
        """Draw the colour bar of the picture `shown` below the columns `first` to `last` of a block."""
        width = self._x(last) - self._x(first) + self.tile
        ax = self._axes(self._x(first) + 0.12 * width, self._strip(block), 0.76 * width, 0.09)
        bar = self.figure.colorbar(shown, cax=ax, orientation="horizontal", ticks=MaxNLocator(5))
        bar.outline.set_visible(False)
        bar.set_label(label, fontsize=8.5, labelpad=1)
        ax.tick_params(labelsize=8, length=2, pad=1.5)

    def note(self, block, text):
        """Write a text below a block, at the left."""
        self.figure.text(self.left / self.width, 1 - self._strip(block) / self.height, text, va="top",
                         fontsize=8.5, color=GREY)

    def _x(self, column):
        return self.left + column * (self.tile + self.gap)

    def _strip(self, block):
        return self.top + (block + 1) * self.block - self.strip + 0.09

    def _axes(self, x, y, width, height):
        """Axes whose upper left corner is x and y inches from the upper left corner of the page."""
        return self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width,
                                     height / self.height))
