"""The progress that a registration prints while it runs."""

import time
from contextlib import contextmanager


class Progress:
    """`with progress(name):` prints the name and the seconds of a stage, and keeps them in `seconds`."""

    def __init__(self, quiet):
        self.quiet, self.seconds = quiet, {}

    @contextmanager
    def __call__(self, name):
        self.tell(f"{name} ...", end=" ")
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.tell()
            raise
        self.seconds[name] = time.perf_counter() - start
        self.tell(f"{self.seconds[name]:.1f} s")

    def tell(self, *words, end="\n"):
        """Print at once, unless the registration is quiet."""
        if not self.quiet:
            print(*words, end=end, flush=True)
