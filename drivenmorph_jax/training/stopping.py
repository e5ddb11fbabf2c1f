"""Training, read from top to bottom: data, shapes, shardings, the step, the loop, the scores."""

import ctypes
import os
import signal
import threading
from contextlib import contextmanager

import jax


def trim_memory():
    """Give free memory back to the system: glibc keeps some of what every validation took, and in days it adds up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # not so on a Mac
        trim(0)


@contextmanager
def terminated():
    """Two Events: the first SIGTERM sets, in place of ending the process: for the loop, which can save; nothing else
    looks. The second the loop sets while it has something to save: else a thread ends the process at once, since the
    compiler, in which minutes can pass, does not let Python's handlers run."""
    stopping, unsaved = threading.Event(), threading.Event()
    # No other thread may listen to signals. Of several processes the runtime listens, and tells all of them.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stopping, unsaved
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch():
        while told := os.read(reading, 1):
            if told[0] == signal.SIGTERM and not unsaved.is_set():
                print("\nstopped; there was nothing more to save: the same command goes on", flush=True)
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
