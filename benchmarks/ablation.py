"""How much each part of the network contributes: trainings that differ in one part, with equal budgets.

python -m benchmarks.ablation --data FOLDER --out runs/ablation [--rows "as it is" "no self-attention"]

Every row is the network of configs/default.py, trained at half resolution on boxes of 48^3 voxels without labels. It is
scored on the val pairs at full resolution. The seconds are those of one pair through the network, without compilation.
The rows are trained one after the other. A row that was trained already is only scored again.
"""

import argparse
import contextlib
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from configs.default import get_config as default
from configs.malf import get_config as malf
from drivenmorph_jax import data
from drivenmorph_jax.cli.program import run
from drivenmorph_jax.demons.forces import squash
from drivenmorph_jax.network import model as model_module
from drivenmorph_jax.network.attention import CrossAttention, SelfAttention
from drivenmorph_jax.network.convolution import Conv
from drivenmorph_jax.network.difference import DifferenceStream
from drivenmorph_jax.network.encoder import Encoder
from drivenmorph_jax.network.model import DrivenMorph
from drivenmorph_jax.network.settings import checked
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.training.loop import train_and_evaluate


def unshared_encoder(*settings, name):
    """In place of `Encoder`: one encoder for each of the two images."""
    names = iter((f"{name}_fixed", f"{name}_moving"))
    return lambda image: Encoder(*settings, name=next(names))(image)


class ConvolutionHead(DifferenceStream):
    """In place of `DifferenceStream`: a convolution computes the force from the attended difference."""

    @nn.compact
    def __call__(self, fixed, moving):
        offset, attended = jnp.zeros((*fixed.shape[:-1], 3)), moving
        if self.cross_radius:
            attended, offset = CrossAttention(self.cross_radius, self.heads, self.dtype)(fixed, moving)
        tokens = nn.leaky_relu(Conv(fixed.shape[-1], self.dtype, name="tokens")(fixed - attended))
        if self.self_radius or self.self_window:
            tokens = SelfAttention(self.heads, self.self_radius, self.self_window, self.dtype)(tokens)
        head = Conv(4, self.dtype, nn.initializers.normal(1e-2), name="head")(tokens).astype(jnp.float32)
        force, attention_force = head[..., :3], jax.nn.sigmoid(head[..., 3:]) * offset
        return squash(force + attention_force, self.max_step), force, attention_force


ROWS = {  # name: (changed settings of the configuration, replaced parts of `drivenmorph_jax.network.model`)
    "as it is": ({}, {}),
    "an encoder for each image": ({}, {"Encoder": unshared_encoder}),
    "no cross-attention": ({"model.cross_radius": (0, 0, 0)}, {}),
    "no self-attention": ({"model.self_radius": (0, 0, 0), "model.self_window": (0, 0, 0)}, {}),
    "no attention": ({"model.cross_radius": (0, 0, 0), "model.self_radius": (0, 0, 0),
                      "model.self_window": (0, 0, 0)}, {}),
    "force by a convolution": ({}, {"DifferenceStream": ConvolutionHead}),
    "no force supervision": ({"loss.force": 0.0}, {}),
    "1 update a level": ({"model.updates": (1, 1, 1)}, {}),
    "3 updates a level": ({"model.updates": (3, 3, 3)}, {}),
    "log domain": ({"model.update_rule": "log"}, {}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of aligned images and labels")
    parser.add_argument("--out", required=True, help="folder for the trainings")
    parser.add_argument("--steps", type=int, default=200, help="of every training; default: 200")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help=f"of: {', '.join(ROWS)}")
    flags = parser.parse_args()
    sharding.start()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    config = malf()
    config.data.root = flags.data
    cohort = data.load(config.data, ("train", "val"))
    # Without test subjects, the evaluation at the end of a training scores the val pairs.
    (out / "splits.json").write_text(json.dumps(
        {split: [subject.id for subject in getattr(cohort, split)] for split in ("train", "val")}))
    table = ["| | Dice | J <= 0 (%) | seconds | parameters |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in flags.rows:
        config = malf()
        changes = {"data.root": flags.data, "data.splits": str(out / "splits.json"), "data.crop": (48, 48, 48),
                   "steps": flags.steps, "val_every": flags.steps, "checkpoint_every": flags.steps}
        for name in ("channels", "updates", "cross_radius", "self_radius", "self_window"):
            changes[f"model.{name}"] = default().model[name]
        config.update_from_flattened_dict(changes | ROWS[row][0])
        with contextlib.ExitStack() as stack:
            for name, part in ROWS[row][1].items():
                stack.enter_context(mock.patch.object(model_module, name, part))
            summary = train_and_evaluate(config, out / row.replace(" ", "-"))
            if summary is None:  # SIGTERM
                return
            image = jnp.zeros((1, 48, 48, 48, 1))
            network = DrivenMorph(checked(config.model))
            shapes = jax.eval_shape(network.init, jax.random.key(0), image, image)
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        table.append("| {} | {:.4f} | {:.4f} | {:.2f} | {} |".format(
            row, summary["dice"]["mean"], summary["fold_pct"]["mean"], summary["seconds"]["mean"], parameters))
        print("\n".join(table), flush=True)
    (out / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    run(main)
