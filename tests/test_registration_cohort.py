import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_programs import refused, run

import cohort as program
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import alone_in
from drivenmorph_jax.registration import cohort, decisions, job
from drivenmorph_jax.registration.pairs import pairs_of_bids, pairs_of_table
from drivenmorph_jax.registration.register import register

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).resolve().parents[1]
FAST = {"method": "demons", "force": "intensity", "affine": "none"}
FLAGS = [x for name, value in FAST.items() for x in (f"--{name}", value)]
NAMES = ["one", "<b>&two", "broken", "four"]


def brain(path, stretch, labels=False):
    x = (np.moveaxis(np.indices((28, 28, 28)), 0, -1) - 14) / [stretch, 1.1, 1]
    data = np.select([(radius := np.linalg.norm(x, axis=-1)) < 4, radius < 7, radius < 10], [3, 9, 6], 0)
    nib.save(nib.Nifti1Image((data if labels else 100 * data).astype(np.int16), np.diag([5.0, 5, 5, 1])), path)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with pairs.csv, whose third pair has an image that is none."""
    folder = tmp_path_factory.mktemp("study")
    brain(folder / "fixed.nii.gz", 1.1)
    for k, stretch in enumerate((0.9, 0.95, 1, 1.05)):
        brain(folder / f"m{k}.nii.gz", stretch)
    brain(folder / "fixed_seg.nii.gz", 1.1, labels=True)
    brain(folder / "m0_seg.nii.gz", 0.9, labels=True)
    (folder / "m2.nii.gz").write_text("no image")
    rows = [f"{name},fixed.nii.gz,m{k}.nii.gz,{'fixed_seg.nii.gz,m0_seg.nii.gz' if k == 0 else ','}"
            for k, name in enumerate(NAMES)]
    (folder / "pairs.csv").write_text("\ufeffname,fixed, moving,fixed_labels,moving_labels\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def whole(study):
    """(folder of a run that nothing stopped, what it returned)."""
    return study / "whole", cohort.register_cohort(pairs_of_table(study / "pairs.csv"), study / "whole", **FAST)


def table(out):
    with (out / "cohort.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def bits(folder):
    return np.asarray(nib.load(folder / "displacement.nii.gz").dataobj)


def test_results_are_those_of_register_and_the_table_tells_them(whole, study):
    out, states = whole
    rows = table(out)
    assert list(rows) == list(states) == NAMES and [row["status"] for row in rows.values()].count("done") == 3
    found = register(study / "fixed.nii.gz", study / "m0.nii.gz", fixed_labels=study / "fixed_seg.nii.gz",
                     moving_labels=study / "m0_seg.nii.gz", quiet=True, **FAST)
    found.save(study / "alone")
    np.testing.assert_array_equal(bits(out / "one"), bits(study / "alone"))
    assert {path.name for path in (out / "one").iterdir()} == {path.name for path in (study / "alone").iterdir()}
    for score in ("similarity_before", "similarity_after", "fold_pct", "dice_before", "dice_after"):
        assert float(rows["one"][score]) == found.summary[score]
    warn = [check["name"] for check in found.summary["checks"] if check["status"] != "ok"]
    assert rows["one"]["warnings"] == str(len(warn)) and rows["one"]["checks"] == "; ".join(warn)
    assert rows["four"]["dice_after"] == "" and float(rows["four"]["seconds"]) > 0


def test_a_broken_pair_is_named_skipped_and_tried_again(whole, study, tmp_path, monkeypatch, capsys):
    out, rows = whole[0], table(whole[0])
    assert rows["broken"]["status"] == "failed" and str(study / "m2.nii.gz") in rows["broken"]["error"]
    assert not (out / "broken").exists()
    copy = shutil.copytree(out, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/summary.json")}
    arguments = ["--pairs", study / "pairs.csv", "--out", copy, *FLAGS]
    status, said = run(program, arguments, monkeypatch, capsys)
    told = [line for line in said.replace("\r", "\n").splitlines() if "failed" in line]
    assert status == 4 and len(told) == 1 and told[0].startswith("broken failed and is skipped: ")
    assert "m2.nii.gz cannot be read" in told[0]
    assert before == {path: path.stat().st_mtime_ns for path in copy.glob("*/summary.json")}  # the others are done


class Rows(HTMLParser):
    """The text of the cells of a page's table, its links and its elements."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name == "href"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and "dl" not in self.tags:
            self.rows[-1][-1] += data


def test_the_page_begins_with_what_is_doubtful_and_escapes_names(whole):
    out, states = whole
    text = (out / "report.html").read_text()
    found = Rows(text)
    head, *rows = found.rows
    assert rows[0][0] == "broken" and "cannot be read" in rows[0][head.index("which")]
    warnings = [int(row[head.index("warnings")]) for row in rows[1:]]
    assert sorted(row[0] for row in rows) == sorted(NAMES) and warnings == sorted(warnings, reverse=True)
    assert "b" not in found.tags and "<b>" not in text and found.tags.count("img") == 3
    assert sorted(found.links) == ["%3Cb%3E%26two/report.html", "four/report.html", "one/report.html"]
    assert 'class="sortable"' in text and "http" not in re.sub(r"[\w+/=]{200,}", "", text)


def test_shards_make_the_whole_and_the_last_completes_the_table(whole, study, tmp_path):
    pairs = pairs_of_table(study / "pairs.csv")
    first = cohort.register_cohort(pairs, tmp_path, shard=(1, 2), **FAST)
    assert list(first) == NAMES[::2]
    assert [row["status"] for row in table(tmp_path).values()] == ["done", "missing", "failed", "missing"]
    shutil.copytree(whole[0] / "four", tmp_path / "four")  # is done, to save time
    with job.Job("<b>&two", str(tmp_path), {}, {}, (), {}).alone():  # in another process
        assert cohort.register_cohort(pairs, tmp_path, shard=(2, 2), **FAST)["<b>&two"]["status"] == "missing"
    cohort.register_cohort(pairs, tmp_path, shard=(2, 2), **FAST)
    rows, wanted = table(tmp_path), table(whole[0])
    for name in NAMES:
        assert rows[name] | {"seconds": ""} == wanted[name] | {"seconds": ""}
        if name != "broken":
            np.testing.assert_array_equal(bits(tmp_path / name), bits(whole[0] / name))


def test_a_run_that_was_killed_continues(whole, study, tmp_path):
    out, text = tmp_path / "out", (study / "pairs.csv").read_text()
    (study / "two.csv").write_text("\n".join(text.splitlines()[:3]))
    command = [sys.executable, "cohort.py", "--pairs", study / "two.csv", "--out", out, *FLAGS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / NAMES[1] / ".new").exists():  # half of the second pair is written
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert [path.parent.name for path in done] == ["one"] and not (out / "cohort.csv").exists()
    states = cohort.register_cohort(pairs_of_table(study / "two.csv"), out, **FAST)
    assert [state["status"] for state in states.values()] == ["done", "done"]
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    for name in NAMES[:2]:
        np.testing.assert_array_equal(bits(out / name), bits(whole[0] / name))
    assert not list(out.rglob(".new"))


def test_another_setting_and_another_file_are_registered_anew(whole, study, tmp_path, monkeypatch):
    out, begun = shutil.copytree(whole[0], tmp_path / "out"), []
    monkeypatch.setattr(job.Job, "begin", lambda self, progress: begun.append(self.name) or 1 / 0)
    pairs = {name: dict(files) for name, files in pairs_of_table(study / "pairs.csv").items() if name != "broken"}
    cohort.register_cohort(pairs, out, **FAST)
    assert begun == []
    brain(tmp_path / "m3.nii.gz", 1.05)
    shutil.copystat(study / "m3.nii.gz", tmp_path / "m3.nii.gz")
    os.utime(tmp_path / "m3.nii.gz")
    pairs["four"]["moving"] = str(tmp_path / "m3.nii.gz")
    found = cohort.register_cohort(pairs, out, **FAST)
    assert begun == ["four"] and found["four"]["error"] == "ZeroDivisionError: division by zero"
    assert table(out)["four"]["status"] == "failed" and (out / "four" / "summary.json").exists()
    cohort.register_cohort(pairs, out, **FAST | {"contrast": "same"})
    assert begun == ["four", "one", "<b>&two", "four"]


def test_a_decision_is_kept_and_a_pair_is_done_again_once(whole, study, tmp_path, monkeypatch):
    out, begun = shutil.copytree(whole[0], tmp_path / "out"), []
    begin = job.Job.begin
    monkeypatch.setattr(job.Job, "begin", lambda self, progress: begun.append(self.name) or begin(self, progress))
    pairs = {name: files for name, files in pairs_of_table(study / "pairs.csv").items() if name in ("one", "four")}
    decisions.decide(out, "one", "accept", 'good, "so far"')
    decisions.decide(out, "four", "redo", "<i>moved")
    (out / "four" / "jacobian.nii.gz").unlink()
    cohort.register_cohort(pairs, out, **FAST)
    rows = table(out)
    assert begun == ["four"] and (out / "four" / "jacobian.nii.gz").exists()
    assert (rows["one"]["decision"], rows["one"]["note"]) == ("accept", 'good, "so far"')
    assert (rows["four"]["decision"], rows["four"]["note"], rows["four"]["status"]) == ("", "<i>moved", "done")
    text = (out / "report.html").read_text()
    assert "&lt;i&gt;moved" in text and "<i>moved" not in text
    monkeypatch.setattr(cohort, "_run", lambda jobs, told: 1 / 0)  # the program is killed before the pair is done
    decisions.decide(out, "one", " Redo", "")
    with pytest.raises(ZeroDivisionError):
        cohort.register_cohort(pairs, out, **FAST)
    assert table(out)["one"]["decision"] == ""
    assert "made_from" not in (out / "one" / "summary.json").read_text()  # so the next run does it


def test_two_runs_in_one_folder_are_refused_and_shards_are_not(whole, study):
    with alone_in(whole[0]), pytest.raises(InputError, match="in use by another run"):
        cohort.register_cohort(pairs_of_table(study / "pairs.csv"), whole[0], **FAST)
    with alone_in(whole[0], shared=True):
        with alone_in(whole[0], shared=True), pytest.raises(InputError, match="in use by another run"):
            cohort.register_cohort(pairs_of_table(study / "pairs.csv"), whole[0], **FAST)


@pytest.mark.parametrize(("text", "words"), [
    ("", ("columns named fixed",)),
    ("fixed;moving\na;b\n", ("columns named fixed",)),
    ("fixed,moving\n", ("has no pair",)),
    ("fixed,moving\nfixed.nii.gz,gone.nii.gz\n", ("line 2", "gone.nii.gz does not exist")),
    ("fixed,moving\nfixed.nii.gz,\n", ("line 2", "no moving")),
    ("fixed,moving\nfixed.nii.gz,m0.nii.gz,m1.nii.gz\n", ("line 2", "more cells")),
    ("fixed,moving\nfixed.nii.gz,m0.nii.gz\nfixed.nii.gz,m0.nii.gz\n", ("line 3", "m0_to_fixed", "column name")),
    ("name,fixed,moving\na,fixed.nii.gz,m0.nii.gz\nA,fixed.nii.gz,m1.nii.gz\n", ("line 3", "'A'")),
    *((f"name,fixed,moving\n{name},fixed.nii.gz,m0.nii.gz\n", ("line 2", repr(name), "folder")) for name in (
        "../x", "..", ".cohort", "a/b", "/tmp/x", "a\\b", "Report.html", "x" * 201)),
])
def test_a_table_that_cannot_be_used_is_refused(text, words, study, tmp_path, monkeypatch, capsys):
    path = study / "bad.csv"
    path.write_text(text)
    status, said = run(program, ["--pairs", path, "--out", tmp_path / "out", *FLAGS], monkeypatch, capsys)
    refused(status, said, str(path), *words)
    assert status == 2 and not (tmp_path / "out").exists()


def test_files_of_one_pair_are_columns_and_no_settings(study, tmp_path):
    (study / "l.csv").write_text("fixed_x\n")
    (study / "guided.csv").write_text("fixed,moving,landmarks,extra_fixed\nfixed.nii.gz,m0.nii.gz,l.csv,m1.nii.gz\n")
    pairs = pairs_of_table(study / "guided.csv")
    assert pairs["m0_to_fixed"]["landmarks"] == str(study / "l.csv")
    states = cohort.register_cohort(pairs, tmp_path / "out", **FAST)
    assert "extra_fixed has 1 images and extra_moving 0" in states["m0_to_fixed"]["error"]
    for name, words in (("landmarks", "the column of this name"), ("initial_transform", "leave it out")):
        with pytest.raises(InputError, match=f"{name} is no setting of all pairs .*{words}"):
            cohort.register_cohort(pairs, tmp_path / "none", **FAST, **{name: study / "l.csv"})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("flags", "word"), [
    (["--shard", "0/2"], "1/10"), (["--shard", "3/2"], "1/10"), (["--time_limit", "5"], "--scheduler"),
    (["--shard", "1/2", "--scheduler", "x"], "exclude"), (["--to", "t.nii"], "--bids"), (["--refine_steps", "-1"], "0"),
    (["--checkpoint", "none", "--method", "drivenmorph"], "none does not exist")])
def test_flags_that_cannot_be_used_are_refused(flags, word, study, tmp_path, monkeypatch, capsys):
    status, said = run(program, ["--pairs", study / "pairs.csv", "--out", tmp_path / "out", *FLAGS, *flags],
                       monkeypatch, capsys)
    assert status == 2 and word in said.splitlines()[-1] and not (tmp_path / "out").exists()


def test_every_t1w_image_of_a_bids_folder_moves_to_the_template(study, tmp_path):
    places = ["sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-01/ses-2/anat/sub-01_ses-2_T1w", "sub-02/anat/sub-02_T1w",
              "sub-02/anat/sub-02_dseg"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(study / "m0.nii.gz", tmp_path / f"{place}.nii.gz")
    found = pairs_of_bids(tmp_path, study / "fixed.nii.gz")
    assert list(found) == ["sub-01_ses-1", "sub-01_ses-2", "sub-02"]
    assert found["sub-02"] == {"fixed": str(study / "fixed.nii.gz"), "moving": str(tmp_path / f"{places[2]}.nii.gz"),
                               "moving_labels": str(tmp_path / f"{places[3]}.nii.gz")}
    for folder, template, word in ((study, study / "fixed.nii.gz", "no T1w"), (tmp_path, "gone.nii", "gone.nii"),
                                   (tmp_path / "gone", study / "fixed.nii.gz", "gone is not a folder")):
        with pytest.raises(InputError, match=word):
            pairs_of_bids(folder, template)


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed", reason="needs the package distributed")
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def test_a_cluster_makes_the_same_although_a_worker_is_killed(cluster, whole, study, tmp_path, capsys):
    """The workers are processes. One of them dies in the middle, and another one by its time limit."""
    pairs, out, pids = pairs_of_table(study / "pairs.csv"), tmp_path / "out", []

    def kill():
        while not list(out.glob("*/summary.json")):
            time.sleep(0.02)
        pids.extend(nanny.pid for nanny in cluster.workers.values())
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    states = cohort.register_cohort(pairs, out, scheduler=cluster.scheduler_address, **FAST)
    killer.join()
    assert len(pids) == 3 and [state["status"] for state in states.values()] == ["done", "done", "failed", "done"]
    rows = table(out)
    for name in NAMES:
        assert rows[name] | {"seconds": ""} == table(whole[0])[name] | {"seconds": ""}
        if name != "broken":
            np.testing.assert_array_equal(bits(out / name), bits(whole[0] / name))
    slow = cohort.register_cohort({"one": pairs["one"]}, tmp_path / "slow", scheduler=cluster.scheduler_address,
                                  time_limit=0.05, **FAST)
    assert slow["one"]["error"] == "it took longer than --time_limit, 0.05 s"
    assert not (tmp_path / "slow" / "one").exists()


def test_after_the_scheduler_has_gone_the_same_command_does_what_is_missing(whole, study, tmp_path):
    """The scheduler is killed when a pair is done, and another one is started with workers of its own."""
    pytest.importorskip("distributed", reason="needs the package distributed")
    out, pairs, seen = tmp_path / "out", pairs_of_table(study / "pairs.csv"), {}
    for killed in (True, False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"tcp://localhost:{free.getsockname()[1]}"
        dask = [sys.executable, "-m", "dask"]
        scheduler = subprocess.Popen([*dask, "scheduler", "--port", address.rpartition(":")[2], "--no-dashboard"])
        workers = subprocess.Popen([*dask, "worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard",
                                    "--death-timeout", "60"], cwd=ROOT)
        try:
            if killed:
                def kill(scheduler=scheduler):
                    while not list(out.glob("*/summary.json")):
                        time.sleep(0.02)
                    scheduler.kill()

                killer = threading.Thread(target=kill, daemon=True)
                killer.start()
                with pytest.raises(InputError, match="the scheduler at .* has gone: .* the same command again"):
                    cohort.register_cohort(pairs, out, scheduler=address, **FAST)
                killer.join()
                seen = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
                assert 1 <= len(seen) < 3
            else:
                states = cohort.register_cohort(pairs, out, scheduler=address, **FAST)
        finally:
            for process in (workers, scheduler):
                process.terminate()
                process.wait()
    assert [state["status"] for state in states.values()] == ["done", "done", "failed", "done"]
    assert all(path.stat().st_mtime_ns == then for path, then in seen.items())
    for name in NAMES:
        if name != "broken":
            np.testing.assert_array_equal(bits(out / name), bits(whole[0] / name))


def test_without_the_package_distributed_one_sentence_says_so(whole, study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match="pip install distributed"):
        cohort.register_cohort(pairs_of_table(study / "pairs.csv"), tmp_path, scheduler="tcp://x:1", **FAST)
