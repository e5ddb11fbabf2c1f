"""Data sets of the user: a folder of NIfTI files that share one grid.

    ID_t1.nii.gz      the brain
    ID_seg.nii.gz     its label map (optional)
    splits.json       {"train": [ids], "val": [ids], "test": [ids]} (optional; may lie in the parent folder); all images
                      of a person are in one split, such as sub-01_ses-1 and sub-01_ses-2
    labels.csv        names: "number,name" a row (optional; may lie in the parent folder)
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from drivenmorph_jax.data.subject import SPLITS, Dataset, Subject, read_label_names
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.intensity import anchored, normalise
from drivenmorph_jax.images.reading import load_image, load_labels
from drivenmorph_jax.images.volume import canonical

IMAGE, LABELS = "_t1.nii.gz", "_seg.nii.gz"
SPLIT_SEED = 0  # fixed, so that training and evaluation split a folder without splits.json in the same way
THREADS = 4


def folder_dataset(config, splits=SPLITS):
    """Read the subjects of a folder, in canonical RAS axis order, with intensities in [0, 1].

    Without a splits.json, a tenth of the persons become val and a tenth test, the same ones every time. Each has at
    least two persons where there are six, and one where there are three. All images of a `person` are in one split.

    Args:
      config: root, the folder. exclude, labels that scores leave out besides background. splits, the path of a
        splits.json, or None to look for one in the folder and then in its parent. skip_bad: if true, a subject that
        cannot be read is named on stderr and left out. atlas, the id of the moving image of all pairs, or None for
        pairs of subjects.
      splits: the splits to read; the others stay empty.

    Returns:
      A `Dataset`.

    Raises:
      InputError: no such folder, fewer than two images in it, ids without an image, a subject or a person in two
        splits, an invalid splits.json, no subject in `splits`, images that do not share one isotropic grid, or a file
        that cannot be read.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: set data.root to the one that holds the ID{IMAGE} files")
    found = sorted(path.name.removesuffix(IMAGE) for path in root.glob(f"*{IMAGE}"))
    if len(found) < 2:
        raise InputError(f"{root} holds {len(found)} files named ID{IMAGE}: put at least 2 subjects there")

    path = _splits_file(root, config.get("splits"))
    ids = _read_splits(path, root, found) if path else drawn_splits(found)
    wanted, atlas = [id for split in splits for id in ids[split]], config.get("atlas")
    if not wanted:
        raise InputError(f"{path or root} has no subjects for {', '.join(splits)}: add ids to a splits.json")
    if atlas is not None:
        if atlas not in found:
            raise InputError(f"{root / (atlas + IMAGE)} does not exist: set data.atlas to the id of an image that does")
        wanted = dict.fromkeys([*wanted, atlas])
    with ThreadPoolExecutor(THREADS) as pool:  # gzip releases the interpreter lock
        read = pool.map(lambda id: _read_subject(root, id, config.get("skip_bad", False) and id != atlas), wanted)
        subjects = {subject.id: subject for subject in read if subject is not None}
    if not subjects:
        raise InputError(f"{root} holds no image that can be read: look at the files named above")
    spacing = _common_spacing(root, list(subjects.values()))

    table = beside(root, "labels.csv")
    read = {split: tuple(subjects[id] for id in ids[split] if id in subjects) if split in splits else ()
            for split in SPLITS}
    return Dataset(root.resolve().name, **read,
                   spacing=spacing, label_names=read_label_names(table) if table else {},
                   exclude=tuple(sorted({0, *config.get("exclude", ())})), atlas=subjects.get(atlas))


def labelled_subjects(root, ids=None):
    """Read the subjects of a folder that have a label map, as `folder_dataset` reads subjects.

    Args:
      root: the folder.
      ids: those to read, or None for all that have a label map.

    Returns:
      (a tuple of `Subject`s, the spacing of their grid in mm, {label: name} of a labels.csv or {}).

    Raises:
      InputError: no such folder, fewer than two subjects with labels in it, an id without image or labels, images that
        do not share one isotropic grid, or a file that cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the one that holds the ID{IMAGE} and ID{LABELS} files")
    found = sorted(id for id in (path.name.removesuffix(IMAGE) for path in root.glob(f"*{IMAGE}"))
                   if (root / f"{id}{LABELS}").is_file())
    if missing := sorted(set(ids or ()) - set(found)):
        raise InputError(f"{root} lacks {missing[0]}{IMAGE} or {missing[0]}{LABELS}: add it, or leave {missing[0]} out")
    wanted = found if ids is None else list(ids)
    if len(wanted) < 2:
        raise InputError(f"{root} holds {len(wanted)} images ID{IMAGE} with a label map ID{LABELS}: put at least 2 "
                         "there")
    with ThreadPoolExecutor(THREADS) as pool:  # gzip releases the interpreter lock
        subjects = tuple(pool.map(lambda id: _read_subject(root, id, skip_bad=False), wanted))
    table = beside(root, "labels.csv")
    return subjects, _common_spacing(root, subjects), read_label_names(table) if table else {}


def beside(root, name):
    """The file of that name in the folder or, failing that, in its parent; None if neither has one."""
    return next((path for path in (root / name, root.parent / name) if path.is_file()), None)


def _splits_file(root, given):
    if given is None:
        return beside(root, "splits.json")
    if not Path(given).is_file():
        raise InputError(f"{given} does not exist: set data.splits to a splits.json, or leave it out")
    return Path(given)


def _read_splits(path, root, found):
    try:
        ids = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(ids, dict) or not all(isinstance(ids.get(split, []), list) for split in SPLITS):
        raise InputError(f'{path} must have the form {{"train": [ids], "val": [ids], "test": [ids]}}')
    ids = {split: [str(id) for id in ids.get(split, [])] for split in SPLITS}
    listed, people = [id for split in SPLITS for id in ids[split]], {}
    for split, members in ids.items():
        for id in members:
            if id not in found:
                raise InputError(f"{path} lists {id}, but {root / (id + IMAGE)} is missing: add it or drop it")
            if listed.count(id) > 1:
                raise InputError(f"{path} lists {id} more than once: a subject belongs to one split")
            other, place = people.setdefault(person(id), (id, split))
            if place != split:
                raise InputError(f"{path} has {other} in {place} and {id} in {split}, images of one person: put both "
                                 "into one split")
    return ids


def person(id):
    """The person whom an image shows: sub-01 for the id sub-01_ses-1, as BIDS names a subject; else the id itself.

    What follows the subject need not be BIDS, and the case of letters does not count. One person taken for two can be
    trained on and tested on; two taken for one cannot.
    """
    return id.partition("_")[0].casefold() if id.startswith("sub-") else id


def drawn_splits(found):
    """Divide subject ids at random, but always in the same way, into {"train", "val", "test"}, as `folder_dataset`."""
    images = {}
    for id in found:
        images.setdefault(person(id), []).append(id)
    people = list(images)
    order = [people[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(people))]
    # A split needs two subjects to have a pair.
    held = max(min(2, len(people) // 3), round(len(people) / 10))
    splits = {"val": order[:held], "test": order[held:2 * held], "train": order[2 * held:]}
    return {split: [id for one in drawn for id in images[one]] for split, drawn in splits.items()}


def _read_subject(root, id, skip_bad):
    labels = None
    try:
        image = load_image(root / f"{id}{IMAGE}")
        if (root / f"{id}{LABELS}").is_file():
            labels = canonical(load_labels(root / f"{id}{LABELS}", image)).data.astype(np.int32)
    except InputError as error:
        if not skip_bad:
            raise
        print(f"{id} is left out: {error}", file=sys.stderr)
        return None
    image = canonical(image)
    return Subject(id, np.asarray(normalise(anchored(image.data)), np.float32), labels, image.affine)


def _common_spacing(root, subjects):
    """The voxel size in mm that all subjects share. Raises InputError, which names the first file on another grid."""
    first = subjects[0]
    for subject in subjects:
        same_affine = np.allclose(subject.affine, first.affine, atol=1e-3)
        if subject.image.shape != first.image.shape or not same_affine:
            raise InputError(f"{root / (subject.id + IMAGE)} is not on the grid of {first.id}{IMAGE}: "
                             "align and resample all images of the folder to one grid")
    sizes = np.linalg.norm(first.affine[:3, :3], axis=0)
    if np.ptp(sizes) > 1e-2 * sizes.min():
        voxel = " x ".join(f"{size:.3g}" for size in sizes)
        raise InputError(f"{root / (first.id + IMAGE)} has voxels of {voxel} mm: "
                         "resample the folder to cubic ones")
    return float(sizes.mean())
