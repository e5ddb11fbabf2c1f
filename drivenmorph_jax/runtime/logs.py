"""The log of a training run: progress bar, JSON lines, TensorBoard."""

from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from drivenmorph_jax.files import read_rows, rows_text


class Logs:
    """Writers of one run in `folder`, from step `start` on: `metrics.jsonl`, one row a step, and TensorBoard events.

    Rows of steps after `start` are dropped, since the run repeats these steps: an earlier run was stopped between two
    checkpoints. A process that is not `main` writes nothing.
    """

    def __init__(self, folder, start, steps, main=True):
        self.main = main
        if not main:
            return
        path = Path(folder) / "metrics.jsonl"
        kept = [row for row in read(folder) if row["step"] <= start]
        path.write_text(rows_text(kept))
        self.file = path.open("a")
        self.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)
        self.shown = {}

    def write(self, step, row):
        """Log the numbers {name: value} of a step. `row` has "loss", and "val_dice" after a validation."""
        if not self.main:
            return
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.shown["loss"] = f"{row['loss']:.4f}"
        if "val_dice" in row:
            self.shown["val Dice"] = f"{row['val_dice']:.4f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self._append({"step": step, **row})

    def skip(self, step, reason, extra=None):
        """Log a step whose numbers are not finite. Every process prints the reason."""
        tqdm.write(reason)
        if self.main:
            self._append({"step": step, "skipped": reason, **(extra or {})})

    def _append(self, row):
        self.file.write(rows_text([row]))
        self.file.flush()
        self.bar.update(row["step"] - self.bar.n)

    def close(self):
        if self.main:
            self.bar.close()
            self.writer.close()
            self.file.close()


def read(folder):
    """The rows of `metrics.jsonl` of a run, in order; an empty list where there is no such file."""
    return read_rows(Path(folder) / "metrics.jsonl")
