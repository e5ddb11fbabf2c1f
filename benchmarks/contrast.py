"""What another contrast costs: Dice where the moving image's contrast is changed, with and without its correction.

python -m benchmarks.contrast --data FOLDER [--split test] [--pairs 12]

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
from drivenmorph_jax.contrast import SAME, correlation, recoloured, registered
from drivenmorph_jax.evaluation import load_checkpoint, make_predict
from drivenmorph_jax.registration import REFINE_STEPS

CONTRASTS = {
    "same": lambda image, key: image,
    "inverted": lambda image, key: jnp.where(image > 0, 1 - image, 0),
    "monotone": lambda image, key: recoloured(image, jnp.sort(jax.random.uniform(key, (6,)))),
    "mixed": lambda image, key: recoloured(image, jax.random.uniform(key, (6,))),
}


def methods():
    """{name: function (fixed, moving) -> u}, images (D, H, W)."""
    config, params, _ = load_checkpoint(checkpoint.SHIPPED)
    predict = make_predict(config)

    def network(fixed, moving):
        return predict(params, fixed[None], moving[None])[0]

    def refined(fixed, moving):
        found, seen = registered(network, fixed, moving)
        return demons.refine(fixed[..., None], seen[..., None], found[0], REFINE_STEPS["drivenmorph"])

    def classical(name):
        features, settings = demons.FORCES[name]
        return lambda fixed, moving: demons.demons(features(fixed[..., None]), features(moving[..., None]),
                                                   **settings)[:1]

    return {"network": lambda *images: network(*images)[0],
            "network, corrected": lambda *images: registered(network, *images)[0][0],
            "network, corrected, refined": refined,
            "Demons, LNCC": lambda *images: classical("lncc")(*images)[0],
            "Demons, LNCC, corrected": lambda *images: registered(classical("lncc"), *images)[0][0],
            "Demons, MIND": lambda *images: classical("mind")(*images)[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--pairs", type=int, help="only the first of them")
    flags = parser.parse_args()
    sharding.start()
    compared = methods()
    found = {name: {contrast: [] for contrast in CONTRASTS} for name in compared}
    for k, (fixed, moving) in enumerate(tqdm(pairs(flags.data, flags.split, flags.pairs), unit="pair")):
        for contrast, change in CONTRASTS.items():
            images = jnp.asarray(fixed.image), change(jnp.asarray(moving.image), jax.random.key(k))
            r = float(correlation(*images))
            tqdm.write(f"{fixed.id} {moving.id} {contrast}: correlation {r:.2f}, {'same' if r >= SAME else 'other'}")
            for name, method in compared.items():
                found[name][contrast].append(score(fixed, moving, np.asarray(method(*images))))
    print("| Dice | " + " | ".join(CONTRASTS) + " | J <= 0 (%) |\n| --- |" + " ---: |" * (len(CONTRASTS) + 1))
    for name, rows in found.items():
        dice = [np.mean([row["dice"] for row in rows[contrast]]) for contrast in CONTRASTS]
        fold = np.mean([row["fold_pct"] for one in rows.values() for row in one])
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in dice) + f" | {fold:.5f} |")


if __name__ == "__main__":
    main()
