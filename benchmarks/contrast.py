"""What another contrast costs: Dice where the moving image's contrast is changed, of networks and the classical forces.

python -m benchmarks.contrast --data FOLDER [--split test] [--pairs 12] [--checkpoint weights/brain-any]

The folder is as `eval.py --data` takes it. The moving image of every ordered pair comes as it is; inverted (1 - x in
the brain, the background stays dark, as in a scan of another contrast); and through curves of contrast, linear between
6 random heights that are of the pair: sorted, and as they come.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.demons import pairs, score
from drivenmorph_jax import checkpoint, demons, sharding
from drivenmorph_jax.data.augmentation import curve
from drivenmorph_jax.evaluation import load_checkpoint, make_predict
from drivenmorph_jax.registration import REFINE_STEPS

CONTRASTS = {
    "same": lambda image, key: image,
    "inverted": lambda image, key: jnp.where(image > 0, 1 - image, 0),
    "monotone": lambda image, key: curve(image, jnp.sort(jax.random.uniform(key, (6,)))),
    "mixed": lambda image, key: curve(image, jax.random.uniform(key, (6,))),
}


def network(folder, refine_steps=0):
    config, params, _ = load_checkpoint(folder)
    predict = make_predict(config, refine_steps)
    return lambda fixed, moving: predict(params, fixed[None], moving[None])[0][0]


def classical(name):
    features, settings = demons.FORCES[name]
    return lambda fixed, moving: demons.demons(features(fixed[..., None]), features(moving[..., None]), **settings).u


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--pairs", type=int, help="only the first of them")
    parser.add_argument("--checkpoint", default=checkpoint.SHIPPED.with_name("brain-any"),
                        help="of the network; default: the project's")
    flags = parser.parse_args()
    sharding.start()
    methods = {"network": network(flags.checkpoint),
               "network, refined": network(flags.checkpoint, REFINE_STEPS["drivenmorph"]),
               "brain-t1": network(checkpoint.SHIPPED), "Demons, MIND": classical("mind"),
               "Demons, LNCC": classical("lncc")}
    found = {name: {contrast: [] for contrast in CONTRASTS} for name in methods}
    for k, (fixed, moving) in enumerate(tqdm(pairs(flags.data, flags.split, flags.pairs), unit="pair")):
        for contrast, change in CONTRASTS.items():
            image = change(jnp.asarray(moving.image), jax.random.key(k))
            for name, method in methods.items():
                u = np.asarray(method(jnp.asarray(fixed.image), image))
                found[name][contrast].append(score(fixed, moving, u))
    print("| Dice | " + " | ".join(CONTRASTS) + " | J <= 0 (%) |\n| --- |" + " ---: |" * (len(CONTRASTS) + 1))
    for name, rows in found.items():
        dice = [np.mean([row["dice"] for row in rows[contrast]]) for contrast in CONTRASTS]
        fold = np.mean([row["fold_pct"] for one in rows.values() for row in one])
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in dice) + f" | {fold:.5f} |")


if __name__ == "__main__":
    main()
