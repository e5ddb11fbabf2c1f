"""Hours of training and evaluation in one process: do memory and open files stay constant?

python -m benchmarks.soak [--hours 3] [--out runs/soak]

The training is `configs/smoke.py` without a last step. It validates every STEPS steps. With each validation, the test
pairs are scored with all figures and the report. Checkpoints are saved more often. One row a round is printed and
appended to OUT/soak.jsonl; OUT/soak.png shows the curves. The first ten minutes, in which everything is compiled, do
not count. The run ends by SIGTERM, as a preempted run does.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.smoke import get_config
from drivenmorph_jax.evaluation.evaluate import evaluate
from drivenmorph_jax.files import make_folder, rows_text
from drivenmorph_jax.runtime import sharding
from drivenmorph_jax.training import loop
from drivenmorph_jax.training.loop import train_and_evaluate

STEPS, WARM = 60, 600  # steps of a round; seconds at the start that do not count


def used():
    """(MiB of memory, open files, threads) of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")))


def draw(path, rows):
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, key in zip(figure.subplots(3, 1, sharex=True), ("MiB", "files", "threads"), strict=True):
        ax.plot([row["seconds"] / 60 for row in rows], [row[key] for row in rows])
        ax.set(ylabel=key, ylim=(0, None))
    ax.set_xlabel("minutes")
    figure.savefig(path, dpi=100)


def tell(rows):
    """Print the first and last value after the warm-up, and the growth by least squares."""
    warm = [row for row in rows if row["seconds"] > WARM]
    for key in ("MiB", "files", "threads"):
        if len(warm) > 1:
            slope = np.polyfit([row["seconds"] / 3600 for row in warm], [row[key] for row in warm], 1)[0]
            print(f"{key}: {warm[0][key]:.0f} after {WARM // 60} minutes, {warm[-1][key]:.0f} at the end, "
                  f"{slope:+.1f} an hour", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=3)
    parser.add_argument("--out", default="runs/soak")
    flags = parser.parse_args()
    sharding.start()
    out, config, rows, began = make_folder(flags.out), get_config(), [], time.monotonic()
    config.val_every, config.checkpoint_every, config.steps = STEPS, STEPS // 6, 10**9
    validate = loop.validate

    def round_(predict, params, dataset, space):
        scores = validate(predict, params, dataset, space)
        dice = evaluate(config, params, dataset, "test", out / "evaluation")["dice"]["mean"]
        rows.append({"seconds": time.monotonic() - began, "steps": STEPS * (len(rows) + 1), "dice": dice,
                     **dict(zip(("MiB", "files", "threads"), used(), strict=True))})
        with (out / "soak.jsonl").open("a") as file:
            file.write(rows_text(rows[-1:]))
        print("\n{seconds:6.0f} s  {steps} steps  Dice {dice:.3f}  {MiB:.0f} MiB  {files} files  "
              "{threads} threads".format(**rows[-1]), flush=True)
        draw(out / "soak.png", rows)
        if rows[-1]["seconds"] > 3600 * flags.hours:
            tell(rows)
            os.kill(os.getpid(), signal.SIGTERM)  # which ends a validation at once
        return scores

    loop.validate = round_
    train_and_evaluate(config, out / "training")


if __name__ == "__main__":
    main()
