"""Make the mean asymmetry of brains that `registration.sides` compares with, and say how well it tells mirrored brains.

    python -m benchmarks.asymmetry FOLDER weights/brain-t1/asymmetry.npy

FOLDER holds T1 brains and a splits.json as train reads them. The mean is that of the train subjects. For each of them
the cosine with the mean of the others is printed, for the others the cosine with the mean.
"""

import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from drivenmorph_jax import data
from drivenmorph_jax.registration.sides import SHAPE, asymmetry


def main():
    folder, out = map(Path, sys.argv[1:3])
    splits = data.load(ConfigDict({"name": "folder", "root": str(folder), "exclude": (0,), "splits": None}))
    found = {split: [asymmetry(subject.image) for subject in getattr(splits, split)]
             for split in ("train", "val", "test")}
    total = sum(found["train"])
    for split, vectors in found.items():
        means = [total - x if split == "train" else total for x in vectors]
        print(split, *(f"{x @ mean / np.linalg.norm(mean):.3f}" for x, mean in zip(vectors, means, strict=True)))
    np.save(out, (total / np.linalg.norm(total)).reshape(SHAPE).astype(np.float16))


if __name__ == "__main__":
    main()
