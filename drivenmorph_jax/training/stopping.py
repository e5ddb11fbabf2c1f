"""The end of a run by SIGTERM."""

import os
import signal
import threading
from contextlib import contextmanager

import jax


@contextmanager
def terminated():
    """Yields two Events, `stopping` and `unsaved`, by which SIGTERM ends a run without loss.

    The first SIGTERM sets `stopping` instead of ending the process. Only the training loop checks it, since only the
    loop can save. The loop sets `unsaved` while it has something to save. While it is not set, a thread ends the
    process at once: the compiler may run for minutes and lets no signal handler of Python run.
    """
    stopping, unsaved = threading.Event(), threading.Event()
    # Only the main thread may handle signals. With several processes the JAX runtime handles SIGTERM for all of them.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stopping, unsaved
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while told := os.read(reading, 1):
            if told[0] == signal.SIGTERM and not unsaved.is_set():
                print("\nstopped; there was nothing more to save; the same command continues the run", flush=True)
                os._exit(0)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set()), signal.set_wakeup_fd(writing)
    try:
        yield stopping, unsaved
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.set_wakeup_fd(before[1])
        os.close(writing)  # which ends the thread
        watching.join()
        os.close(reading)
