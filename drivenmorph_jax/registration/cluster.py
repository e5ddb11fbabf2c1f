"""The pairs of a cohort as tasks of a Dask cluster, one pair a task."""

import logging
import os
import signal
import threading
from concurrent.futures import CancelledError

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.registration.job import MISSING
from drivenmorph_jax.runtime import sharding

PATIENCE = 30  # s, to find the scheduler
ALONE = threading.Lock()  # a pair takes all cores and much memory, so a worker of many threads has one at a time


def run_on(scheduler, jobs, told, time_limit):
    """Register the jobs on the cluster of the scheduler at this address. `told(job, state)` is called at each end.

    A pair whose worker died is registered by another one. After the fourth worker it counts as failed.

    Raises InputError where the package distributed is missing, where no scheduler answers or it ends, or where
    `time_limit` cannot be kept.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError("--scheduler needs the package distributed, here and in the workers: pip install "
                         "distributed") from error
    for job in jobs:
        job.forget()
    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise InputError(f"no scheduler answers at {scheduler}: start one by `dask scheduler` and give the address "
                         "that it prints, such as tcp://host:8786") from error
    with client:
        if time_limit is not None and None in client.run(_nanny).values():
            raise InputError(f"a worker of {scheduler} has no nanny, which starts it again after --time_limit: start "
                             "workers without --no-nanny")
        futures = client.map(registered, jobs, limit=time_limit, key="register", pure=False)
        job_of = {future.key: job for future, job in zip(futures, jobs, strict=True)}
        for future in as_completed(futures):
            job = job_of[future.key]
            try:
                told(job, future.result())
            except CancelledError as error:
                logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # one sentence is enough
                raise InputError(f"the scheduler at {scheduler} has gone: start it and give the same command again, "
                                 "which continues") from error
            except Exception as error:
                job.fail(_reason(error))
                told(job, job.state())


def registered(job, limit=None):
    """Register a job in a worker, unless it has ended in another. Returns its state."""
    with ALONE, job.alone(wait=True):
        if job.state()["status"] == MISSING:
            sharding.start()
            watch = threading.Timer(limit or threading.TIMEOUT_MAX, _give_up, [job, limit])
            watch.daemon = True
            watch.start()
            job.run()
            watch.cancel()
        return job.state()


def _give_up(job, limit):
    """Count the job as failed and end this worker: nothing gentler ends a computation. Its nanny starts a new one, and
    the job's next attempt finds the failure."""
    job.fail(InputError(f"it took longer than --time_limit, {limit:g} s"))
    os.kill(os.getpid(), signal.SIGKILL)


def _nanny(dask_worker):
    return dask_worker.nanny


def _reason(error):
    from distributed import KilledWorker

    return InputError("each worker that registered it was killed, perhaps for want of memory") if isinstance(
        error, KilledWorker) else error
