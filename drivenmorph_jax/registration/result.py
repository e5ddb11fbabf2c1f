"""The result of a registration, and its files."""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import nibabel
import numpy as np

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import figures, metrics, notebook, page
from drivenmorph_jax.fields.warp import warp
from drivenmorph_jax.files import SUMMARY, check_apart, former_files, make_folder, new_files, stem, write_json
from drivenmorph_jax.images import writing
from drivenmorph_jax.images.volume import Volume, resample, smoothed
from drivenmorph_jax.registration.score import Scored
from drivenmorph_jax.registration.strip import mask_image
from drivenmorph_jax.runtime.memory import trim_memory
from drivenmorph_jax.transforms.files import learn2reg_name, write_force
from drivenmorph_jax.transforms.reading import BACK
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.transforms.world import without_affine

FORCE_IS = {
    "drivenmorph": "driving force of the network's first pass: the sum over its updates, on the fixed grid",
    "demons": "force of Demons between the fixed and the affinely aligned moving image, on the fixed grid"}


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a registration. Vectors and determinants lie on the grid of the fixed image."""

    warped: nibabel.Nifti1Image  # the moving image on the fixed grid
    warped_labels: nibabel.Nifti1Image | None
    transform: Transform  # from the fixed to the moving image, affine and deformable, with its inverse
    force: np.ndarray  # (X, Y, Z, 3), RAS mm
    jacobian: np.ndarray  # (X, Y, Z), determinant of the transform
    confidence: np.ndarray  # (X, Y, Z), in [0, 1], see `registration.confidence`
    uncertainty: np.ndarray  # (X, Y, Z), mm, in the fixed brain; 0 outside
    summary: dict  # the content of summary.json: similarity, Dice, folding, seconds, checks; files once it is saved
    brains: dict[str, Volume]  # the masks of the images that showed whole heads, by their role
    pictured: dict  # the arguments of `evaluation.figures.overview`, on the working grid

    def overview(self, path: str | Path) -> None:
        """Draw the overview of the registration to a PNG file."""
        figures.overview(path, title=_title(self.summary), **self.pictured)

    def report(self, path: str | Path = "report.html") -> str | Path:
        """Write the report of the registration: slices to move through, overview, numbers. Returns its path."""
        picture = Path(path).with_suffix(".png")
        self.overview(picture)
        return self._page(path, picture, self._slices())

    def view(self):
        """The result in a notebook, as a widget: fixed, warped and moving image, and the maps over them.

        Raises InputError where the package ipyniivue is missing, which draws it.
        """
        fixed, moving, linear = self.transform.grid, self.transform.other, self.transform.linear
        images = {"fixed": fixed.data, "warped": np.asarray(self.warped.dataobj, np.float32),
                  "moving": resample(moving, fixed.data.shape, fixed.affine, linear)}
        maps = {"force": lambda: self.force,
                "displacement": lambda: without_affine(self.transform.displacement, fixed.affine, linear),
                "jacobian": lambda: self.jacobian, "uncertainty": lambda: self.uncertainty}
        if self.warped_labels is not None:
            maps["labels"] = lambda: np.asarray(self.warped_labels.dataobj)
        return notebook.widget(images, maps, fixed.affine)

    def _slices(self):
        """The piece of the report with the slices to move through."""
        volumes = {name: x for name, x in self.pictured.items() if name not in ("labels", "matched", "heads")}
        volumes["jacobian"] = volumes.pop("jac")
        volumes["heads"] = {name: head for name, (head, _) in self.pictured["heads"].items()}
        return page.viewer("Slices", **volumes)

    def _page(self, path, picture, slices):
        title, numbers = _title(self.summary).split("\n")
        page.write(path, title, [page.paragraph(numbers), *_told(self.summary["checks"]), slices,
                                 page.figure("Overview", picture), page.definitions(self.summary["definitions"])])
        return path

    def save(self, out: str | Path, formats: Sequence[str] = ("itk",), bids: Sequence[str] | None = None,
             beside: Callable[[Path], None] | None = None) -> None:
        """Write all files of the registration to the folder `out`, as `drivenmorph register` does.

        They replace the files of an earlier registration there as a whole: first all are written to a folder inside,
        then those of the earlier one are deleted, and summary.json, which lists the files, comes last.

        Args:
          formats: of the transform and its inverse: "itk" displacement fields, LPS mm, and the affine; "ras" the
            fields in RAS mm, intent 1006; "h5" ITK composites; "l2r" the field of Learn2Reg, in voxels; "freesurfer"
            warps .mgz and the affine .lta; "fsl" relative warps; "spm" deformations y_; "afni" displacements in LPS mm.
          bids: (prefix, moving space, fixed space), such as ("sub-01", "T1w", "MNI152NLin2009cAsym"): the transforms
            are named as BIDS derivatives, sub-01_from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.
          beside: function of a folder that writes further files into it, which then belong to the result.

        Raises InputError where a file cannot be written, where names for BIDS are none, or where the folder holds
        something else under these names, or an input of this registration.
        """
        out = make_folder(out)
        former = check_out(out, [file["path"].removesuffix(BACK) for files in self.summary.get("inputs", {}).values()
                                 for file in files if file["path"]])
        trim_memory()

        def volumes(new):
            self._save_images(new)
            save_transforms(new, self.transform, formats, bids)

        with new_files(out, former) as new:
            # Compressing takes as long as drawing. The two can run in parallel, since only drawing holds Python's lock.
            with ThreadPoolExecutor(1) as pool:
                written, slices = pool.submit(volumes, new), pool.submit(self._slices)
                self.overview(new / "overview.png")
                self._page(new / "report.html", new / "overview.png", slices.result())
                if beside is not None:
                    beside(new)
                written.result()
            files = sorted(path.name for path in new.iterdir())
            self.summary.update(formats=list(formats), bids=None if bids is None else list(bids), files=files)
            write_json(new / SUMMARY, self.summary)

    def _save_images(self, out):
        for name, image in (("warped", self.warped), ("warped_labels", self.warped_labels)):
            if image is not None:
                writing.write(out / f"{name}.nii.gz", image)
        for role, brain in self.brains.items():
            writing.write(out / f"{role}_brain.nii.gz", mask_image(brain))
        for name in ("jacobian", "confidence", "uncertainty"):
            writing.save(out / f"{name}.nii.gz", getattr(self, name), self.transform.grid)
        by = "demons" if self.summary["stiffness"] == "high" else self.summary["method"]
        write_force(out / "force.nii.gz", self.force, self.transform.grid, FORCE_IS[by])


def read_summary(folder):
    """The content of summary.json of a result. Raises InputError where the folder holds no result."""
    try:
        found = json.loads((Path(folder) / SUMMARY).read_text())
        set(found["files"]), found["fixed"], found["moving"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder} holds no result of register: give the folder that was its --out") from error
    return found


def transform_names(bids=None):
    """The names of the files of a transform and of its inverse, without endings; `bids` is that of `Result.save`.

    Raises InputError where a name has other characters than those of BIDS, or both spaces are one.
    """
    if not bids:
        return "displacement", "inverse_displacement"
    prefix, *spaces = bids
    for name, allowed in ((prefix, r"[\w+-]+"), *((space, r"[A-Za-z0-9+]+") for space in spaces)):
        if not re.fullmatch(allowed, name, re.ASCII):
            raise InputError(f"--bids has {name!r}: a prefix is such as sub-01_ses-1, a space such as T1w or "
                             "MNI152NLin2009cAsym, of letters and digits")
    if spaces[0] == spaces[1]:
        raise InputError(f"--bids names both spaces {spaces[0]}, and a transform and its inverse would have one name: "
                         "name two")
    return tuple(f"{prefix}_from-{a}_to-{b}_mode-image_xfm" for a, b in (spaces, spaces[::-1]))


def save_transforms(out, transform, formats, bids=None):
    """Write a `Transform` and its inverse to the folder `out`; `formats` and `bids` are those of `Result.save`."""
    for name, one in zip(transform_names(bids), (transform, transform.inverse), strict=True):
        if "itk" in formats:
            one.save(out / f"{name}.nii.gz")
        if "ras" in formats:
            one.save(out / f"{name}_ras.nii.gz", "ras")
        for form in {"fsl", "afni"} & set(formats):
            one.save(out / f"{name}_{form}.nii.gz", form)
        if "spm" in formats:  # which reads no .nii.gz, and looks for this prefix
            one.save(out / f"y_{name}.nii", "spm")
        for form, ending in (("h5", ".h5"), ("freesurfer", ".mgz")):
            if form in formats:
                one.save(out / f"{name}{ending}")
    for form, ending in (("itk", ".tfm"), ("freesurfer", ".lta")):
        if form in formats:
            transform.save(out / f"affine{ending}")
    if "l2r" in formats:
        transform.save_learn2reg(out / learn2reg_name(stem(transform.grid.path), stem(transform.other.path)))


def check_out(out, inputs):
    """The names of the files that an earlier registration left in the folder `out`.

    Raises InputError where its summary.json does not list them, or where they hold one of the files `inputs`.
    """
    former = former_files(out, ("fixed", "moving"))
    check_apart(inputs, (Path(out) / name for name in former))
    return former


def result_of(scored: Scored, seconds=None) -> Result:
    """The `Result` of a scored registration. `seconds` of each stage, where given, are added to its summary."""
    summary = scored.summary
    if seconds is not None:
        summary = summary | {"seconds": seconds | {"total": sum(seconds.values())}}
    labels = scored.warped_labels
    if labels is not None:
        labels = writing.to_nibabel(labels, scored.fixed, dtype=scored.moving_labels.header.get_data_dtype())
    brains = {role: getattr(scored, f"{role}_brain") for role in summary["stripped"]}
    return Result(writing.to_nibabel(scored.warped, scored.fixed), labels, scored.transform, scored.vectors,
                  scored.jacobian, scored.confidence, scored.uncertainty, summary, brains, _pictured(scored))


def _pictured(scored):
    """The arguments of `evaluation.figures.overview`."""
    alike = outlines = None
    if scored.contrast == "other":
        alike = [np.asarray(scored.seen), scored.matched]
    if scored.fixed_labels is not None:
        outlines = resample(scored.fixed_labels, scored.shape, scored.grid, order=0)
    return {"fixed": np.asarray(scored.fixed_on_grid), "moving": np.asarray(scored.moving_on_grid),
            "warped": scored.moved, "u": scored.u, "force": scored.force, "jac": metrics.jacobian(scored.u),
            "confidence": scored.confidence_on_grid, "spacing": (scored.spacing,) * 3, "labels": outlines,
            "matched": alike, "heads": _heads(scored)}


def _heads(scored):
    """{name of a panel: (the whole head, its brain's mask)} on the working grid, intensities as those of the brains."""
    shape, grid, found = scored.shape, scored.grid, {}
    for role, through in (("fixed", None), ("moving", scored.affine)):
        brain = getattr(scored, f"{role}_brain")
        if brain is None:
            continue
        images = (replace(x, data=x.data.astype(np.float32)) for x in (getattr(scored, f"{role}_head"), brain))
        head, mask = (resample(smoothed(x, scored.spacing), shape, grid, through) for x in images)
        head = np.clip(head / max(np.percentile(head[mask > 0.5], 99.5), 1e-6), 0, 1) if (mask > 0.5).any() else head
        found[role.capitalize()] = head, mask
    if "Moving" in found:
        found["Warped"] = tuple(np.asarray(warp(jnp.asarray(x)[..., None], scored.u)[..., 0]) for x in found["Moving"])
    return found


def _told(checks):
    """The pieces of the report on the checks: those that warn first."""
    warn = [one for one in checks if one["status"] != "ok"]
    head = f"{len(warn)} of {len(checks)} checks warn: look at the pictures before you use the result." if warn else (
        f"None of {len(checks)} checks warns.")
    rows = ["| check | value | at least | at most | | |", "|---|---:|---:|---:|---|---|"]
    for one in [*warn, *(one for one in checks if one["status"] == "ok")]:
        value, low, high = ("" if x is None else f"{x:.3g}" for x in (one["value"], *one["limits"]))
        rows.append(f"| {one['name']} | {value} | {low} | {high} | {one['status']} | {one['sentence']} |")
    return page.heading("Checks"), page.paragraph(head), page.table("\n".join(rows))


def _number(x):
    return "none" if x is None else f"{x:.3f}"


def _title(summary):
    lines = [f"{Path(summary['moving']).name} to {Path(summary['fixed']).name} ({summary['method']})",
             f"similarity {_number(summary['similarity_before'])} before, {_number(summary['similarity_after'])} "
             f"after; J ≤ 0 in {summary['fold_pct']:.4f} %"]
    if summary["contrast"] == "other":
        lines[1] += "; differences and checkerboards with the values of the fixed image"
    if summary.get("dice_after") is not None:
        lines[1] = f"Dice {summary['dice_before']:.3f} before, {summary['dice_after']:.3f} after; " + lines[1]
    return "\n".join(lines)
