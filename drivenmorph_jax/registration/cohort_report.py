"""The table and the page of a cohort: cohort.csv and report.html."""

import html

from drivenmorph_jax.evaluation import page
from drivenmorph_jax.registration import decisions
from drivenmorph_jax.registration.job import DONE, FAILED, MISSING
from drivenmorph_jax.registration.pairs import PAGE
from drivenmorph_jax.registration.score import DEFINITIONS

SCORES = ("similarity_before", "similarity_after", "dice_before", "dice_after", "fold_pct")
COLUMNS = ("name", "fixed", "moving", "status", *SCORES, "warnings", "checks", "seconds", "error",
           *decisions.COLUMNS)
HEAD = ("name", "", "status", "similarity before", "similarity after", "Dice before", "Dice after", "J ≤ 0 (%)",
        "warnings", "which", "seconds", "decision", "note")
WIDTH = 220  # pixels of a picture, which takes 20 KB
ORDER = FAILED, MISSING, DONE


def write_report(jobs, states):
    """Write the table and the page of the jobs and their states to the folder of the cohort.

    The table has the order of the jobs. The page begins with what is doubtful: what failed, then most warnings. What a
    person decided about a pair, and wrote into the former table, stays.

    Raises InputError where the files cannot be written.
    """
    out = jobs[0].notes.parents[1]
    decided = decisions.decisions(out)
    rows = [_row(job, state) | decided.get(job.name, {}) for job, state in zip(jobs, states, strict=True)]
    decisions.write_table(out, COLUMNS, rows)
    number = {status: sum(row["status"] == status for row in rows) for status in ORDER}
    doubtful = sum(bool(row["warnings"]) for row in rows)
    told = [f"{number[DONE]} of {len(rows)} pairs are registered", f"{doubtful} of them with warnings",
            f"{number[FAILED]} failed", f"{number[MISSING]} are not registered yet"]
    both = sorted(zip(jobs, rows, strict=True), key=lambda both: (ORDER.index(both[1]["status"]),
                                                                  -(both[1]["warnings"] or 0)))
    page.write(out / PAGE, "Cohort", [
        page.paragraph("; ".join(told) + ". What is doubtful comes first. A click on a column's head sorts by it."),
        page.sortable(HEAD, [_cells(job, row) for job, row in both]),
        page.heading("Definitions"),
        page.definitions({
            "similarity": DEFINITIONS["similarity"], "Dice": DEFINITIONS["dice"], "J ≤ 0 (%)": DEFINITIONS["fold_pct"],
            "warnings": "Checks with a value outside their limits. The report of the pair, to which its name leads, "
                        "explains each.",
            "seconds": "Of all stages, without the writing of the files."})])


def _row(job, state):
    """The row of cohort.csv, {column: value or None}."""
    row = dict.fromkeys(COLUMNS) | {"name": job.name, "fixed": job.files["fixed"], "moving": job.files["moving"],
                                    "status": state["status"], "error": state.get("error")}
    if state["status"] == DONE:
        summary = state["summary"]
        warn = [check["name"] for check in summary["checks"] if check["status"] != "ok"]
        row |= {name: summary.get(name) for name in SCORES} | {
            "warnings": len(warn), "checks": "; ".join(warn), "seconds": round(summary["seconds"]["total"], 1)}
    return row


def _cells(job, row):
    """The cells of a row of the page, as `page.sortable` takes them."""
    picture, name = "", html.escape(job.name)
    if row["status"] == DONE:
        name = page.link(job.name, f"{job.name}/{PAGE}")
        if (job.folder / "overview.png").is_file():
            picture = page.thumbnail(job.folder / "overview.png", WIDTH, f"Overview of {job.name}")
    said = row["checks"] if row["error"] is None else row["error"]
    return [(name, job.name), (picture, None), (row["status"], row["status"]),
            *(("" if row[score] is None else f"{row[score]:.3g}", row[score]) for score in SCORES),
            ("" if row["warnings"] is None else str(row["warnings"]), row["warnings"]), (html.escape(said or ""), said),
            ("" if row["seconds"] is None else f"{row['seconds']:.1f}", row["seconds"]),
            *((html.escape(row[column] or ""), row[column]) for column in decisions.COLUMNS)]
