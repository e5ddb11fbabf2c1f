"""The effect of contrast: Dice for a moving image of changed contrast, with and without the correction of contrast.

python -m benchmarks.contrast --data FOLDER [--split test] [--pairs 12]

The folder is as for `eval.py --data`. The moving image of every ordered pair is registered as it is; inverted (1 - x in
the brain; the background stays dark, as in a scan of another contrast); and with its values mapped by two random
curves, linear between 6 random heights, which are drawn for the pair: once sorted ("monotone"), once unsorted
("mixed").
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.demons import arguments, pairs, score
from drivenmorph_jax import demons
from drivenmorph_jax.images.contrast import SAME, correlation, matched, recoloured
from drivenmorph_jax.network.inference import load_checkpoint, make_predict
from drivenmorph_jax.registration.read import REFINE_STEPS
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.runtime.checkpoint import SHIPPED

CONTRASTS = {
    "same": lambda image, key: image,
    "inverted": lambda image, key: jnp.where(image > 0, 1 - image, 0),
    "monotone": lambda image, key: recoloured(image, jnp.sort(jax.random.uniform(key, (6,)))),
    "mixed": lambda image, key: recoloured(image, jax.random.uniform(key, (6,))),
}


def methods():
    """A function (fixed, moving) -> {name: u}, for images (D, H, W)."""
    config, params, _ = load_checkpoint(SHIPPED)
    alone, refined = (make_predict(config, steps) for steps in (0, REFINE_STEPS["drivenmorph"]))

    def network(predict, fixed, moving):
        return predict(params, fixed[None], moving[None])[0][0]

    def classical(name, fixed, moving):
        return demons.registered(fixed[..., None], moving[..., None], name)

    def fields(fixed, moving):
        by_network, by_lncc = partial(network, alone), partial(classical, "lncc")
        seen = matched(by_network, fixed, moving)
        return {"network": by_network(fixed, moving),
                "network, corrected": by_network(fixed, seen),
                "network, corrected, refined": network(refined, fixed, seen),
                "Demons, LNCC": by_lncc(fixed, moving),
                "Demons, LNCC, corrected": by_lncc(fixed, matched(by_lncc, fixed, moving)),
                "Demons, MIND": classical("mind", fixed, moving)}

    return fields


def main():
    flags = arguments(__doc__).parse_args()
    sharding.start()
    fields, found = methods(), {}
    for k, (fixed, moving) in enumerate(tqdm(pairs(flags.data, flags.split, flags.pairs), unit="pair")):
        for contrast, change in CONTRASTS.items():
            images = jnp.asarray(fixed.image), change(jnp.asarray(moving.image), jax.random.key(k))
            r = float(correlation(*images))
            tqdm.write(f"{fixed.id} {moving.id} {contrast}: correlation {r:.2f}, {'same' if r >= SAME else 'other'}")
            for name, u in fields(*images).items():
                rows = found.setdefault(name, {}).setdefault(contrast, [])
                rows.append(score(fixed, moving, np.asarray(u)))
    print("| Dice | " + " | ".join(CONTRASTS) + " | J <= 0 (%) |\n| --- |" + " ---: |" * (len(CONTRASTS) + 1))
    for name, rows in found.items():
        dice = [np.mean([row["dice"] for row in rows[contrast]]) for contrast in CONTRASTS]
        fold = np.mean([row["fold_pct"] for one in rows.values() for row in one])
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in dice) + f" | {fold:.5f} |")


if __name__ == "__main__":
    main()
