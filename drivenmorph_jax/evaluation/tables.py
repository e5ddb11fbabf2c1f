"""Tables of scores, as CSV and Markdown files, and the Markdown report of an evaluation."""

import csv
import io
import os
from pathlib import Path

import numpy as np

from drivenmorph_jax.evaluation.metrics import DEFINITIONS
from drivenmorph_jax.files import make_folder, replacing

LABELS = {
    "dice": "Dice", "dice_initial": "Dice before", "hd95": "HD95 (mm)", "lncc": "Local correlation", "sdlogj": "SDlogJ",
    "sdlogj_l2r": "SDlogJ (Learn2Reg)", "sdlogj_l2r_whole": "SDlogJ (Learn2Reg, whole image)",
    "fold_pct": "J ≤ 0 (%)", "ndv_pct": "NDV (%)",
    "inverse_mm": "Inverse consistency (mm)", "tre_mm": "TRE (mm)", "seconds": "Seconds a pair",
    "cosine": "Force cosine", "pearson": "Force Pearson r", "spearman": "Force Spearman ρ", "r2": "Force R²",
}
OF_FORCE = ("cosine", "pearson", "spearman", "r2")
OF_PAIRS = "Mean and standard deviation over the pairs, {} in all."
ABOUT_FORCE = ("The forces of each level against the displacement that remained when it began, and their sum against "
               "the whole: mean over pairs with its 95 % bootstrap interval. Control: the force of one pair against "
               "the displacement of another.")


def pairs_csv(path, rows):
    """Write one line a pair and one column a key, in the order of first appearance. A missing number stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _keys(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def markdown_table(summary):
    """The Markdown table of {metric: {"mean", "std"}}, as `metrics.summarise` returns it: one line a metric."""
    lines = ["| Metric | Mean | Std |", "| --- | ---: | ---: |"]
    lines += [f"| {LABELS.get(key, key)} | {_digits(value['mean'])} | {_digits(value['std'])} |"
              for key, value in summary.items()]
    return "\n".join(lines) + "\n"


def pairs_table(rows):
    """The Markdown table of the pairs, one line a pair."""
    keys = _keys(rows)
    lines = ["| " + " | ".join(LABELS.get(key, key) for key in keys) + " |",
             "| " + " | ".join("---" for _ in keys) + " |"]
    lines += ["| " + " | ".join(_digits(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def report_md(path, summary, rows, figures, force):
    """Write a Markdown page: table of scores, definition of every number, force, every pair, figures.

    Args:
      path: the file to write; links are relative to its folder.
      summary: {metric: {"mean", "std"}}.
      rows: one dict a pair.
      figures: {caption: path of the picture}.
      force: the Markdown table of the force's statistics, empty where the network computes no force.
    """
    path = Path(path)
    definitions, of_force = ("\n".join(f"- **{LABELS[key]}**: {DEFINITIONS[key]}" for key in group
                                       if key in DEFINITIONS)
                             for group in (summary, OF_FORCE))
    pictures = [f"### {caption}\n\n![{caption}](<{Path(os.path.relpath(file, path.parent)).as_posix()}>)\n"
                for caption, file in figures.items()]
    parts = ["# Registration report\n", OF_PAIRS.format(len(rows)) + "\n",
             markdown_table(summary), "## Definitions\n", definitions + "\n"]
    parts += ["## The driving force\n", ABOUT_FORCE + "\n", force, of_force + "\n"] if force else []
    parts += ["## Pairs\n", pairs_table(rows)]
    parts += ["## Figures\n", *pictures] if pictures else []
    write_bytes(path, "\n".join(parts).encode())


def _keys(rows):
    return list(dict.fromkeys(key for row in rows for key in row))


def _digits(value):
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def write_bytes(path, data):
    """Write a file, complete or not at all, and create its folder. Raises InputError where it cannot be written."""
    path = Path(path)
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
