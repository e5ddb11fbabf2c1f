"""Two images in; aligned image, transforms, force and a picture out.

The fixed image is resampled to a working grid, the moving one to the same grid through the affine alignment. The
field found there becomes a transform in millimetres, sampled on the images' own grids: only the last step touches
the voxels that are written.
"""

import time
from contextlib import contextmanager


class _Stages:
    """`with stages(name):` tells the stage and its seconds, and keeps them in `seconds`."""

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
        if not self.quiet:
            print(*words, end=end, flush=True)
