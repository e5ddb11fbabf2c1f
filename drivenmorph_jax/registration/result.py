"""Two images in; aligned image, transforms, force and a picture out.

The fixed image is resampled to a working grid, the moving one to the same grid through the affine alignment. The
field found there becomes a transform in millimetres, sampled on the images' own grids: only the last step touches
the voxels that are written.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from drivenmorph_jax.evaluation import figures, page
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.images import writing
from drivenmorph_jax.transforms.files import write_force
from drivenmorph_jax.transforms.transform import Transform

NETWORK_FORCE = "driving force of the network's first look: the sum over its updates, on the fixed grid"
DEMONS_FORCE = "force of Demons between the fixed and the affinely aligned moving image, on the fixed grid"


@dataclass(frozen=True, eq=False)
class Result:
    """A registration. Vectors and determinants lie on the fixed image's grid."""

    warped: nibabel.Nifti1Image  # the moving image
    warped_labels: nibabel.Nifti1Image | None
    transform: Transform  # from the fixed to the moving image, affine and deformable, with its inverse
    force: np.ndarray  # (X, Y, Z, 3), RAS mm
    jacobian: np.ndarray  # (X, Y, Z), determinant of the transform
    summary: dict  # similarity, Dice, folding, seconds, each with its definition
    pictured: dict  # what `report.overview` draws, on the working grid

    def overview(self, path):
        """Draw the picture of the registration to a PNG file."""
        figures.overview(path, title=_title(self.summary), **self.pictured)

    def report(self, path="report.html"):
        """Write the page of the registration: slices to move through, picture, numbers. Returns its path."""
        picture = Path(path).with_suffix(".png")
        self.overview(picture)
        return self._page(path, picture)

    def _page(self, path, picture):
        title, numbers = _title(self.summary).split("\n")
        volumes = {name: x for name, x in self.pictured.items() if name not in ("labels", "matched")}
        volumes["jacobian"] = volumes.pop("jac")
        page.write(path, title, [page.paragraph(numbers), page.viewer("Slices", **volumes),
                                 page.figure("Overview", picture), page.definitions(self.summary["definitions"])])
        return path

    def save(self, out, formats=("itk",), bids=None):
        """Write everything to the folder `out`, as register.py does.

        Args:
          formats: of the transform and its inverse: "itk" displacement fields, LPS mm, and the affine; "ras" the
            fields in RAS mm, intent 1006; "h5" ITK composites; "l2r" the field of Learn2Reg, in voxels.
          bids: (prefix, moving space, fixed space), such as ("sub-01", "T1w", "MNI152NLin2009cAsym"): the transforms
            are named as BIDS derivatives, sub-01_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.

        Raises InputError where something cannot be written.
        """
        out, (fixed, moving) = make_folder(out), (self.transform.grid, self.transform.other)
        names = ["displacement", "inverse_displacement"]
        if bids:
            prefix, *spaces = bids
            names = [f"{prefix}_from-{a}_to-{b}_mode-image_xfm" for a, b in (spaces, spaces[::-1])]

        def volumes():
            for name, image in (("warped", self.warped), ("warped_labels", self.warped_labels)):
                if image is not None:
                    writing.write(out / f"{name}.nii.gz", image)
            for name, transform in zip(names, (self.transform, self.transform.inverse), strict=True):
                if "itk" in formats:
                    transform.save(out / f"{name}.nii.gz")
                if "ras" in formats:
                    transform.save(out / f"{name}_ras.nii.gz", "RAS")
                if "h5" in formats:
                    transform.save(out / f"{name}.h5")
            if "itk" in formats:
                self.transform.save(out / "affine.tfm")
            if "l2r" in formats:
                self.transform.save_learn2reg(out / f"disp_{_stem(fixed.path)}_{_stem(moving.path)}.nii.gz")
            writing.save(out / "jacobian.nii.gz", self.jacobian, fixed)
            write_force(out / "force.nii.gz", self.force, fixed,
                                   NETWORK_FORCE if self.summary["method"] == "drivenmorph" else DEMONS_FORCE)

        # Compressing takes as long as drawing, and only one of them needs Python.
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(volumes)
            self.overview(out / "overview.png")
            self._page(out / "report.html", out / "overview.png")
            written.result()
        with replacing(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(self.summary, indent=2) + "\n")


def _stem(path):
    return Path(path).name.split(".")[0]


def _title(summary):
    lines = [f"{Path(summary['moving']).name} to {Path(summary['fixed']).name} ({summary['method']})",
             f"similarity {summary['similarity_before']:.3f} before, {summary['similarity_after']:.3f} after; "
             f"J ≤ 0 in {summary['fold_pct']:.4f} %"]
    if summary["contrast"] == "other":
        lines[1] += "; differences and checkerboards with the values of the fixed image"
    if "dice_after" in summary:
        lines[1] = f"Dice {summary['dice_before']:.3f} before, {summary['dice_after']:.3f} after; " + lines[1]
    return "\n".join(lines)
