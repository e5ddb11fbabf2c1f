"""The layouts of data sets: functions that find {id: (image, labels or None, split or None)} in a folder."""

import re

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import stem

NIFTI = (".nii.gz", ".nii", ".mgz")
ANALYZE = (".img", ".img.gz")


def neurite_oasis(source):
    """OASIS as neurite prepared it: OASIS_*/aligned_norm.nii.gz, aligned_seg35.nii.gz."""
    return distinct((path.parent.name, path, _first(path.parent, "aligned_seg35.nii.gz"), "train")
                    for path in source.glob("OASIS_*/aligned_norm.nii.gz"))


def learn2reg_oasis(source):
    """OASIS of Learn2Reg: imagesTr/OASIS_0001_0000.nii.gz, labelsTr; subjects 395 to 414 are its validation set."""
    rows = []
    for path in source.glob("imagesTr/*_0000.nii.gz"):
        id = path.name.removesuffix("_0000.nii.gz")
        number = int(re.search(r"\d+$", id)[0])
        rows.append((id, path, _first(source / "labelsTr", path.name), "val" if 395 <= number <= 414 else "train"))
    return distinct(rows)


def ixi_pickles(source):
    """IXI as TransMorph's authors prepared it: Train, Val, Test and Atlas/*.pkl, a pair (image, labels) each."""
    splits = {"Train": "train", "Val": "val", "Test": "test", "Atlas": "atlas"}
    return distinct((path.stem, path, path, split) for folder, split in splits.items()
                    for path in source.glob(f"{folder}/*.pkl"))


def ixi(source):
    """IXI as it is published, skull-stripped: IXI002-Guys-0828-T1.nii.gz."""
    return distinct((path.name.split("-T1")[0], path, None, None) for path in source.rglob("IXI*-T1*.nii.gz"))


def lpba40(source):
    """LPBA40, delineation space: S01/S01.delineation.skullstripped.*, S01.delineation.structure.label.*."""
    rows = []
    for path in source.rglob("S*.delineation.skullstripped.*"):
        if path.name.endswith(ANALYZE + NIFTI):
            id = stem(path).removesuffix(".delineation.skullstripped")
            rows.append((id, path, _only(path.parent, f"{id}.delineation.structure.label", ANALYZE + NIFTI), None))
    return distinct(rows)


def mindboggle(source):
    """Mindboggle-101 volumes: */t1weighted_brain.nii.gz with labels.DKT31.manual.nii.gz (or .DKT25), native space."""
    return distinct((path.parent.name, path,
                     _first(path.parent, "labels.DKT31.manual.nii.gz", "labels.DKT25.manual.nii.gz"), None)
                    for path in source.rglob("t1weighted_brain.nii.gz"))


def malf(source):
    """MICCAI 2012 multi-atlas challenge: 1000_3.nii.gz with 1000_3_glm.nii.gz, skull-stripped; or ID_t1 and ID_seg."""
    images = [path for path in source.rglob("*_3.nii*") if path.name.endswith(NIFTI)]
    return distinct((stem(path).removesuffix("_3"), path, _only(path.parent, f"{stem(path)}_glm"), None)
                    for path in images) or folder(source)


def folder(source):
    """Any folder: ID.nii.gz, or ID_t1.nii.gz with ID_seg.nii.gz; .nii and .mgz are read too."""
    images = [path for path in source.iterdir() if path.name.endswith(NIFTI) and not stem(path).endswith("_seg")]
    ids = [stem(path).removesuffix("_t1") for path in images]
    return distinct((id, path, _only(source, f"{id}_seg"), None) for id, path in zip(ids, images, strict=True))


def distinct(rows):
    """{id: (image, labels, split)} of rows (id, image, labels, split), sorted by id.

    Raises InputError where two ids are the same, or differ only in the case of letters: many disks ignore it.
    """
    found, images = {}, {}
    for id, image, *rest in sorted(rows, key=lambda row: row[:2]):
        other = images.setdefault(id.casefold(), image)
        if other is not image:
            raise InputError(f"{other} and {image} would both be {id} (case does not count): rename one of them or "
                             "move it out of SOURCE")
        found[id] = image, *rest
    return found


def _first(parent, *names):
    return next((parent / name for name in names if (parent / name).is_file()), None)


def _only(parent, name, endings=NIFTI):
    """The file of this name with one of the endings, or None. Raises InputError where there are two."""
    found = [path for path in (parent / f"{name}{ending}" for ending in endings) if path.is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are both label maps of one image: move one of them out of SOURCE")
    return found[0] if found else None
