"""How often the checks of a registration raise a false alarm, and how many of the registrations that fail they find.

    python -m benchmarks.checks FOLDER --out runs/checks [--method demons] [--step 2]

FOLDER holds ID_t1.nii.gz, ID_seg.nii.gz and a splits.json as train and eval read them. Every ordered pair of the val
and of the test subjects is registered as it is: each warning is a false alarm. Then the moving image of every test pair
is spoilt in each way of `KINDS` and registered again. A registration has failed where Dice, of the labels that were
spoilt alike, is lower by .05 or more than that of the pair as it is. It is found where a check warns, or where the
input is refused. Pairs that are in results.jsonl of --out already are not registered again.
"""

import argparse
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from drivenmorph_jax.data.folder import beside
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import json_text, read_rows
from drivenmorph_jax.registration.checks import LIMITS
from drivenmorph_jax.registration.register import register

FALLEN = 0.05


def cut(share, from_below):
    def spoil(image, labels, affine, rng):
        inside = np.flatnonzero((image > 0).any((0, 1)))
        count = round(share * len(inside))
        keep = slice(inside[0] + count, None) if from_below else slice(0, inside[-1] + 1 - count)
        affine = affine.copy()
        affine[:3, 3] += affine[:3, 2] * (keep.start or 0)
        return image[:, :, keep], labels[:, :, keep], affine
    return spoil


def half(image, labels, affine, rng):
    middle = round(ndimage.center_of_mass(image)[0])
    image = image.copy()
    image[:middle] = 0
    return image, labels, affine


def flipped(*axes):
    return lambda image, labels, affine, rng: (np.flip(image, axes), np.flip(labels, axes), affine)


def noise(image, labels, affine, rng):
    return (image > 0) * rng.gamma(2.0, 300.0, image.shape), labels, affine


def organ(image, labels, affine, rng):
    """A smooth body of another shape, with vessels."""
    x = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij"), -1)
    bumps = ndimage.gaussian_filter(rng.normal(size=image.shape), 8)
    body = np.linalg.norm(x * (1.3, 1.8, 1.5) - (0.2, 0, 0.1), axis=-1) + 2 * bumps / np.abs(bumps).max() * 0.2 < 0.9
    vessels = ndimage.gaussian_filter(rng.normal(size=image.shape), 2)
    return body * (600 + 400 * (vessels > 1.5 * vessels.std())), labels, affine


def head(image, labels, affine, rng):
    """The brain within a skull and a scalp."""
    distance = ndimage.distance_transform_edt(image == 0, np.linalg.norm(affine[:3, :3], axis=0))
    grown = np.where((distance > 3) & (distance < 5), 0.1, np.where((distance >= 5) & (distance < 18), 0.9, 0))
    return np.where(image > 0, image, grown * np.percentile(image, 99)), labels, affine


def scaled(*factors):
    return lambda image, labels, affine, rng: (image, labels, np.diag([*factors, 1]) @ affine)


def swapped(*order):
    return lambda image, labels, affine, rng: (image.transpose(order), labels.transpose(order), affine)


def bias(image, labels, affine, rng):
    field = ndimage.gaussian_filter(rng.normal(size=image.shape), 12)
    return image * np.exp(1.2 * field / np.abs(field).max() * 2), labels, affine


def z_scored(image, labels, affine, rng):
    brain = image > 0
    return np.where(brain, (image - image[brain].mean()) / image[brain].std(), 0), labels, affine


def repeated(image, labels, affine, rng):
    """Four of five slices are copies of the one before."""
    index = np.arange(image.shape[2]) // 5 * 5
    return image[:, :, index], labels, affine


def motion(image, labels, affine, rng):
    """The head moves by up to 20 mm between groups of slices."""
    out = np.zeros_like(image)
    for start in range(0, image.shape[2], 6):
        part = slice(start, start + 6)
        out[:, :, part] = ndimage.shift(image[:, :, part], (*rng.uniform(-10, 10, 2), 0), order=1)
    return out, labels, affine


def unchanged(image, labels, affine, rng):
    return image, labels, affine


def wrong_affine(rng):
    turn = nib.eulerangles.euler2mat(*np.deg2rad(rng.choice([-1, 1], 3) * rng.uniform(10, 25, 3)))
    return {"affine": nib.affines.from_matvec(turn, rng.choice([-1, 1], 3) * rng.uniform(10, 25, 3))}


KINDS = {  # kind: (change of the moving image, further settings of `register`)
    "mirrored": (flipped(0), {}), "turned by 180 degrees": (flipped(0, 1), {}), "upside down": (flipped(1, 2), {}),
    "noise": (noise, {}), "another organ": (organ, {}), "whole head": (head, {}),
    "20 % cut below": (cut(0.2, True), {}), "50 % cut below": (cut(0.5, True), {}),
    "20 % cut above": (cut(0.2, False), {}), "50 % cut above": (cut(0.5, False), {}), "half missing": (half, {}),
    "1.7 times as large": (scaled(1.7, 1.7, 1.7), {}), "slices 1.5 times as thick": (scaled(1, 1, 1.5), {}),
    "axes swapped": (swapped(2, 1, 0), {}), "axes turned": (swapped(0, 2, 1), {}), "strong bias": (bias, {}),
    "z-scored": (z_scored, {}), "another subject's affine": (unchanged, wrong_affine),
    "mask in the other sense": (unchanged, "mask"), "slices repeated": (repeated, {}), "heavy motion": (motion, {}),
}


def read(folder, subject, step):
    """(image, labels, affine) with every `step` voxels one."""
    image, labels = (nib.as_closest_canonical(nib.load(folder / f"{subject}_{ending}.nii.gz"))
                     for ending in ("t1", "seg"))
    data = np.asarray(image.dataobj, np.float32)
    data = data[tuple(slice(0, n - n % step) for n in data.shape)]
    for axis in range(3):
        data = sum(np.take(data, range(k, data.shape[axis], step), axis) for k in range(step)) / step
    affine = image.affine @ np.diag([step, step, step, 1])
    affine[:3, 3] += image.affine[:3, :3] @ np.full(3, (step - 1) / 2)
    labels = np.asarray(labels.dataobj)[tuple(slice(0, n * step, step) for n in data.shape)]
    return data, labels.astype(np.int32), affine


def result(fixed, moving, settings):
    """{"dice", "checks": {name: value}}, or {"refused": sentence}."""
    f, fl, m, ml = (nib.Nifti1Image(x.astype(dtype), affine) for (image, labels, affine) in (fixed, moving)
                    for x, dtype in ((image, np.float32), (labels, np.int32)))
    if settings.pop("mask", False):
        settings["moving_mask"] = nib.Nifti1Image((moving[0] > 0).astype(np.uint8), moving[2])
    try:
        summary = register(f, m, fixed_labels=fl, moving_labels=ml, quiet=True, **settings).summary
    except InputError as error:
        return {"refused": str(error)}
    return {"dice": summary["dice_after"], "checks": {one["name"]: one["value"] for one in summary["checks"]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="demons")
    parser.add_argument("--step", type=int, default=2, help="voxels of the files that become one")
    parser.add_argument("--good", action="store_true", help="only the pairs as they are")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    splits = json.loads(beside(flags.folder, "splits.json").read_text())
    record = flags.out / "results.jsonl"
    done = {(row["kind"], row["fixed"], row["moving"]) for row in read_rows(record)}
    jobs = [("as it is", *pair) for split in ("test", "val") for pair in itertools.permutations(splits[split], 2)]
    if not flags.good:
        jobs += [(kind, *pair) for kind in KINDS for pair in itertools.permutations(splits["test"], 2)]
    for number, (kind, fixed, moving) in enumerate(jobs):
        if (kind, fixed, moving) in done:
            continue
        rng = np.random.default_rng(number)
        spoil, settings = KINDS.get(kind, (unchanged, {}))
        settings = {"mask": True} if settings == "mask" else settings(rng) if callable(settings) else dict(settings)
        row = result(read(flags.folder, fixed, flags.step), spoil(*read(flags.folder, moving, flags.step), rng),
                     settings | {"method": flags.method})
        with record.open("a") as file:
            file.write(json_text({"kind": kind, "fixed": fixed, "moving": moving, **row}) + "\n")
        print(f"{number + 1} of {len(jobs)}: {kind}, {moving} to {fixed}: {row.get('dice', 'refused')}", flush=True)
    (flags.out / "checks.md").write_text(table(read_rows(record)))
    print((flags.out / "checks.md").read_text())


def warned(row):
    """The names of the checks that warn with the limits of today."""
    if "refused" in row:
        return ["refused"]
    return [name for name, value in row["checks"].items()
            if value is None or not LIMITS[name][0] <= value <= LIMITS[name][1]]


def table(rows):
    """Markdown: how many of each kind failed, were found, and by which checks."""
    good = {(row["fixed"], row["moving"]): row["dice"] for row in rows if row["kind"] == "as it is"}
    lines = ["| moving image | pairs | Dice fell by .05 | of these found | checks that warn |",
             "|---|---:|---:|---:|---|"]
    total = np.zeros(2, int)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here = [row for row in rows if row["kind"] == kind]
        failed = [row for row in here if row.get("dice", 0) < good[row["fixed"], row["moving"]] - FALLEN]
        found = [row for row in failed if warned(row)]
        if kind != "as it is":
            total += len(failed), len(found)
        names = [name for row in here for name in warned(row)]
        counts = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names), key=names.count, reverse=True))
        lines.append(f"| {kind} | {len(here)} | {len(failed)} | {len(found)} | {counts} |")
    share = 100 * total[1] / max(total[0], 1)
    return "\n".join([*lines, "", f"Found: {total[1]} of {total[0]} failures, {share:.1f} %.", ""])


if __name__ == "__main__":
    main()
