"""Three properties of the classical methods on real pairs.

python -m benchmarks.promises --data FOLDER [--split test] [--pairs 12]

The properties: MIND does not depend on inversion of an image; the log domain does not depend on the order of the
images; refinement does not lower the scores. The folder is as for `eval.py --data`. For every ordered pair:

  MIND: Dice with the moving image as it is, and with its brain inverted (1 - x where x > 0): the background stays dark,
    as in a scan of another contrast.
  log domain: mean |phi_swapped o phi - id| over the fixed brain in voxels, phi_swapped from the two images exchanged.
  refinement: Dice and folding of ESM Demons and of local correlation, before and after 20 more iterations.
"""

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.demons import arguments, pairs, score
from drivenmorph_jax import demons
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.fields.warp import compose
from drivenmorph_jax.runtime import sharding

LOG = demons.INTENSITY | {"update": "log", "sigma_diffusion": 1.0}
REFINE_STEPS = 20


def main():
    flags = arguments(__doc__).parse_args()
    sharding.start()
    rows = []
    for fixed, moving in tqdm(pairs(flags.data, flags.split, flags.pairs), unit="pair"):
        f, m = (jnp.asarray(subject.image)[..., None] for subject in (fixed, moving))
        found = {name: demons.registered(f, image, "mind")
                 for name, image in (("MIND", m), ("MIND, inverted", jnp.where(m > 0, 1 - m, 0)))}
        there, back = demons.demons(f, m, **LOG).u, demons.demons(m, f, **LOG).u
        found["log domain"] = there
        for name, force in (("ESM", "intensity"), ("LNCC", "lncc")):
            found[name] = demons.registered(f, m, force)
            found[f"{name} refined"] = demons.refine(f, m, found[name], REFINE_STEPS)
        row = {}
        for name, u in found.items():
            scores = score(fixed, moving, np.asarray(u))
            row |= {f"Dice, {name}": scores["dice"], f"folding %, {name}": scores["fold_pct"]}
        distance = jnp.linalg.norm(compose(back, there), axis=-1)
        row["swap error, voxels"] = float(distance[metrics.brain(fixed.image)].mean())
        rows.append(row)
        tqdm.write(f"{fixed.id} {moving.id}  " + "  ".join(f"{key} {value:.5f}" for key, value in row.items()))

    print(f"\n{'':42}{'mean':>9}{'least':>9}{'most':>9}")
    changes = {f"change of Dice, {a} to {b}": [row[f"Dice, {b}"] - row[f"Dice, {a}"] for row in rows]
               for a, b in (("MIND", "MIND, inverted"), ("ESM", "ESM refined"), ("LNCC", "LNCC refined"))}
    for key, values in ({key: [row[key] for row in rows] for key in rows[0]} | changes).items():
        print(f"{key:42}{np.mean(values):9.5f}{min(values):9.5f}{max(values):9.5f}")


if __name__ == "__main__":
    main()
