"""Registration of many pairs: one folder a pair, a table and a page of all.

A pair whose folder holds the result of the same files and settings is done, unless a person wants it again, see
`registration.decisions`. So a run that was stopped continues with what is missing. A pair that fails is named, and the
others go on.
"""

import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields

from tqdm import tqdm

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import SUMMARY, alone_in, make_folder
from drivenmorph_jax.registration import decisions
from drivenmorph_jax.registration.cluster import run_on
from drivenmorph_jax.registration.cohort_report import write_report
from drivenmorph_jax.registration.job import DONE, FAILED, MISSING, Job, made_from
from drivenmorph_jax.registration.pairs import ROLES
from drivenmorph_jax.registration.progress import Progress
from drivenmorph_jax.registration.read import Request
from drivenmorph_jax.runtime.checkpoint import digest, read_about

# All that `register` takes beside files: the same for every pair.
SETTINGS = [field.name for field in fields(Request) if field.name not in (*ROLES, "initial_transform", "convention")]


def register_cohort(pairs, out, *, formats=("itk",), shard=(1, 1), scheduler=None, time_limit=None, **settings):
    """Register pairs of images, each to a folder of its own in `out`, and write out/cohort.csv and out/report.html.

    Args:
      pairs: {name: {role: path}}, as `registration.pairs` finds them. The folder of a pair is out/name.
      out: a folder; it is made if it does not exist.
      formats: of the transforms, as in `Result.save`.
      shard: (i, n): of the pairs, the i-th and each n-th after it, for one of n processes with a common `out`. i counts
        from 1. The table and the page tell of all pairs; the process that ends last completes them.
      scheduler: address of the scheduler of a Dask cluster, which registers the pairs. Its workers see the same files.
      time_limit: seconds that a worker of this cluster may take for a pair.
      settings: of `register`, the same for all pairs; `affine` by its name.

    Returns:
      {name: its state, see `job.Job.state`} of the pairs of this shard.

    Raises InputError for settings that cannot be used, where another run uses `out`, or where it cannot be written.
    """
    settings = _checked(settings)
    weights = digest(read_about(settings["checkpoint"])) if settings["method"] == "drivenmorph" else None
    out = str(make_folder(os.path.abspath(out)))
    if os.path.exists(os.path.join(out, SUMMARY)):
        raise InputError(f"{out} holds a result that is no cohort: give another --out")
    jobs = [Job(name, out, files, settings, tuple(formats), made_from(files, settings, formats, weights))
            for name, files in pairs.items()]
    mine = jobs[shard[0] - 1::shard[1]]
    with alone_in(out, shared=shard[1] > 1):
        _redo(mine)
        states = {job.name: job.state() for job in mine}
        left = [job for job in mine if states[job.name]["status"] != DONE]
        with tqdm(total=len(mine), initial=len(mine) - len(left), unit="pair", dynamic_ncols=True) as bar:

            def told(job, state):
                states[job.name] = state
                if state["status"] == FAILED:
                    tqdm.write(f"{job.name} failed and is skipped: {state['error']}", file=sys.stderr)
                bar.update(state["status"] != MISSING)

            if scheduler is None:
                _run(left, told)
            else:
                run_on(scheduler, left, told, time_limit)
        with decisions.alone(out):  # the shard that ends last sees all others
            write_report(jobs, [states.get(job.name) or job.state() for job in jobs])
    return states


def _checked(settings):
    """The settings with absolute paths and every default. Raises InputError where one cannot be used."""
    for name in settings:
        if name not in SETTINGS:
            raise InputError(f"{name} is no setting of all pairs of a cohort: " + (
                "give the file of each pair in the column of this name" if name in ROLES else "leave it out"))
    request = Request(fixed=None, moving=None, **settings)
    labels = request.guide_labels and [str(one) for one in request.guide_labels]  # as JSON returns them
    return {name: getattr(request, name) for name in SETTINGS} | {
        "checkpoint": os.path.abspath(request.checkpoint), "guide_labels": labels}


def _redo(jobs):
    """Forget the results of the jobs that a person wants to be done again, and that this is wanted."""
    decided = decisions.decisions(jobs[0].out) if jobs else {}
    for job in jobs:
        one = decided.get(job.name, {"decision": ""})
        if one["decision"].strip().lower() == decisions.REDO:
            job.disown()
            decisions.decide(job.out, job.name, "", one["note"])


def _run(jobs, told):
    """Register the jobs here. While one is computed, the next is read and the one before is written.

    `told(job, state)` is called when a job has ended. A job that another process has locked is left to it.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing = None
        for job, locked, progress, reading in _read_ahead(jobs, reader, told):
            try:
                result = job.compute(reading.result(), progress)
            except Exception as error:
                job.fail(error)
                locked.close()
                told(job, job.state())
                continue
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, job, locked, result, told)
            del reading, result  # two pairs in memory are enough
        if writing is not None:
            writing.result()


def _read_ahead(jobs, reader, told):
    """Yields (job, its lock, progress, future of its images); the images of the next job are being read then."""
    ahead = deque()
    for job in jobs:
        locked, progress = ExitStack(), Progress(quiet=True)
        try:
            locked.enter_context(job.alone())
        except InputError:
            continue
        if (state := job.state())["status"] == DONE:  # by another process, since this one looked
            locked.close()
            told(job, state)
            continue
        job.forget()  # an earlier run failed, and may have had less memory
        ahead.append((job, locked, progress, reader.submit(job.begin, progress)))
        if len(ahead) == 2:
            yield ahead.popleft()
    yield from ahead


def _write(job, locked, result, told):
    with locked:
        try:
            job.save(result)
        except Exception as error:
            job.fail(error)
        told(job, job.state())
