"""The page of a cohort: its pairs, the doubtful first, and what a person decides about them."""

import json
import threading
from itertools import pairwise
from pathlib import Path

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.registration.cohort_report import COLUMNS, ORDER
from drivenmorph_jax.registration.decisions import ACCEPT, REDO, decide, read_table
from drivenmorph_jax.registration.job import DONE
from drivenmorph_jax.view.news import News
from drivenmorph_jax.view.steering import ResultPage

OPEN = 2  # pages of pairs that stay in memory
LONGEST = 10_000  # letters of a note


class CohortPage:
    """The page of the cohort in a folder. Raises InputError where the folder holds none."""

    html = "cohort.html"

    def __init__(self, folder):
        self.folder, self._open, self._lock = Path(folder), {}, threading.Lock()
        self.names = [row["name"] for row in self._rows()]  # a pair keeps its number
        self.news = News()
        self._tell()

    def _rows(self):
        """The rows of the table: failed, missing, then those with most warnings."""
        rows = read_table(self.folder)
        known = {status: k for k, status in enumerate(ORDER)}
        return sorted(rows, key=lambda row: (known.get(row["status"], 0), -_whole(row.get("warnings"))))

    def _tell(self):
        pairs = [dict.fromkeys(COLUMNS, "") | row | {"number": self._number(row)} for row in self._rows()]
        self.news.tell(title=f"Cohort {self.folder.resolve().name}", pairs=pairs)

    def _number(self, row):
        """The number of a pair whose result can be opened, or None."""
        return self.names.index(row["name"]) if row["status"] == DONE and row["name"] in self.names else None

    def content(self, name):
        """(bytes, type) of a name, or None."""
        return (json.dumps(self.news.content["pairs"]).encode(), "application/json") if name == "pairs.json" else None

    def page(self, number):
        """The page of a pair, or None. Raises InputError where its result cannot be shown."""
        if not number.isdecimal() or int(number) >= len(self.names):
            return None
        with self._lock:
            if number not in self._open:
                name = self.names[int(number)]
                page = ResultPage(self.folder / name)
                done = [pair["number"] for pair in self.news.content["pairs"] if pair["number"] is not None]
                page.pair = {"name": name, "next": dict(pairwise(done)).get(int(number))}
                idle = [key for key, one in self._open.items() if not one.news.content["busy"]]
                for key in idle[:max(len(self._open) + 1 - OPEN, 0)]:
                    del self._open[key]
                self._open[number] = page
                threading.Thread(target=page.prepare, daemon=True).start()
            return self._open[number]

    def prepare(self):
        """Nothing: the table is read."""

    def begin(self):
        """Look again what the table says. Called when a page is open."""
        self._tell()

    def act(self, name, asked):
        """Keep a decision, and return the answer, a dictionary. Raises InputError where it cannot be kept."""
        if name != "decide":
            return None
        pair, decision, note = (asked.get(key) for key in ("name", "decision", "note"))
        if pair not in self.names or not isinstance(note, str) or len(note) > LONGEST:
            raise InputError(f"a note has at most {LONGEST} letters: shorten it, or load the page again")
        if decision not in ("", ACCEPT, REDO):
            raise InputError(f"the decision is {decision!r}: choose {ACCEPT} or {REDO}")
        decide(self.folder, pair, decision, " ".join(note.split()))
        self._tell()
        return {}


def _whole(text):
    return int(text) if text and text.isdecimal() else 0
