"""The layout `bids`: which T1w images of a BIDS folder are taken, and which label map belongs to which image."""

from dataclasses import dataclass
from pathlib import Path

from ancpbids.utils import parse_bids_name

from drivenmorph_jax.data.layouts import distinct
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import stem

GRID = {"space", "cohort", "res", "den"}  # entities that say in which space an image lies
KIND = {"desc", "seg", "atlas", "label", "scale"}  # entities in which an image and its label map may differ


@dataclass(frozen=True)
class _File:
    """A T1w image or a label map, with its entities in three groups."""

    path: Path
    person: str
    scan: str  # the entities that are in neither GRID nor KIND, as in the name; the id of an image
    grid: frozenset  # the entities of GRID
    kind: frozenset  # the entities of KIND
    derived: bool  # whether its folder or its entities say that it was computed


def bids(source):
    """BIDS: sub-*/[ses-*/]anat/*_T1w.nii.gz, and the *_dseg.nii.gz of the same entities, there or in derivatives/."""
    images, maps = _files(source, "T1w"), {}
    for one in _files(source, "dseg"):
        maps.setdefault((one.scan, one.grid), []).append(one)
    raw = {one.person for one in images if not one.derived}
    taken = [one for one in images if not (one.derived and one.person in raw)]
    # prepare aligns to MNI space itself, so an image that was resampled to a template before is second best.
    native = {one.scan for one in taken if not one.grid}
    taken = [one for one in taken if not (one.grid and one.scan in native)]
    rows = [(one.scan, one.path, _label_map(one, maps.get((one.scan, one.grid), [])), None) for one in taken]
    found = distinct(rows)
    if any(one.derived and one.person in raw for one in images):
        print("T1w images of derivatives are not taken, because the raw ones are: to take them, give their folder in "
              "derivatives/ as SOURCE")
    if maps and (bare := [path.name for _, path, labels, _ in rows if labels is None]):
        print(f"{len(bare)} of {len(rows)} images have no label map: no *_dseg has the entities of {bare[0]}")
    return found


def _files(source, suffix):
    """The files of the folder with this BIDS suffix. Raises InputError for a name that is not BIDS."""
    found = []
    for path in sorted(source.rglob(f"sub-*_{suffix}.nii*")):
        folders = path.relative_to(source).parts[:-1]
        if not path.name.endswith((".nii", ".nii.gz")) or "sourcedata" in folders:  # BIDS has no rules for that folder
            continue
        entities = (parse_bids_name(path.name) or {"entities": {}})["entities"]
        # The parser drops what follows a second hyphen, and all but the last of equal entities.
        if stem(path) != "_".join([*map("-".join, entities.items()), suffix]):
            raise InputError(f"{path} is not a BIDS name: rename it, as in sub-01_ses-1_run-1_{suffix}.nii.gz, or move "
                             "it out of SOURCE")
        grid, kind = (frozenset(one for one in entities.items() if one[0] in keys) for keys in (GRID, KIND))
        scan = "_".join("-".join(one) for one in entities.items() if one[0] not in GRID | KIND)
        found.append(_File(path, entities["sub"], scan, grid, kind, bool("derivatives" in folders or grid or kind)))
    return found


def _label_map(image, maps):
    """The path of the label map of an image, or None.

    Of `maps`, those of its scan and space, the one is taken whose other entities differ least from the image's.

    Raises InputError where two fit equally.
    """
    differences = [len(one.kind ^ image.kind) for one in maps]
    best = [one.path for one, number in zip(maps, differences, strict=True) if number == min(differences)]
    if len(best) > 1:
        raise InputError(f"{best[0]} and {best[1]} are both label maps of {image.path}: move one of them out of SOURCE")
    return best[0] if best else None
