import contextlib
import fcntl
import os
import pickle
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# Tests and the programs that they start compile the same code, each piece once, and quickly rather than well. JAX reads
# these when it is imported, which happens only in the tests.
CACHE = Path(tempfile.gettempdir()) / f"drivenmorph-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# They compile in two thirds of the time; jax 0.11 does not know the first.
OLDER_CODE = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0"
                      + OLDER_CODE * version("jax").startswith("0.10."))

# Modules that take longest, which begin first, so that the workers end together.
LONGEST = ("test_training", "test_weights", "test_model", "test_registration", "test_demons", "test_inputs",
           "test_kill", "test_checks", "test_affine", "test_evaluation", "test_fuzz")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.module.__name__, len(LONGEST)))


@pytest.fixture(autouse=True)
def flags_of_one_test(monkeypatch):
    """A program that runs in the test's process adds to these flags. XLA has read them by then, and what was compiled
    is found again by them."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs end with the module that they were compiled for: each takes memory, and mappings of it, of
    which Linux gives a process 65,530; the compiler aborts where there are no more."""
    yield
    import jax
    jax.clear_caches()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, worker_id):
    """(workdir, summary) of one run of `configs/smoke.py`, of which each worker has a copy."""
    from configs.smoke import get_config
    from drivenmorph_jax.training.loop import train_and_evaluate
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "smoke"
    with (shared.parent / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers wait for the one that was first
        kept = shared / "summary.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(train_and_evaluate(get_config(), shared)))
    workdir = shutil.copytree(shared, base / "smoke-copy")
    return workdir, pickle.loads(kept.read_bytes())


@pytest.fixture(scope="session")
def brains(tmp_path_factory):
    """Four subjects of the smoke cohort as a folder of files, stored as LAS int16."""
    from configs.smoke import get_config
    from drivenmorph_jax import data
    folder = tmp_path_factory.mktemp("brains")
    dataset = data.load(get_config().data, ("val", "test"))
    for subject in dataset.val + dataset.test:
        affine = subject.affine @ np.array([[-1, 0, 0, subject.image.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0],
                                            [0, 0, 0, 1.0]])
        for ending, voxels in (("t1", 1000 * subject.image), ("seg", subject.labels)):
            nib.save(nib.Nifti1Image(voxels[::-1].astype(np.int16), affine), folder / f"{subject.id}_{ending}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def no_pictures():
    """Empty pictures: to draw them takes most of the time of a saved result and of an evaluation.

    `test_report` and `test_registration` draw them, and so does the smoke run.
    """
    from PIL import Image

    from drivenmorph_jax.evaluation import figures
    with pytest.MonkeyPatch.context() as patch:
        for name in ("overview", "forces", "dice_boxplot", "curves"):
            patch.setattr(figures, name, lambda path, *_, **__: Image.new("L", (60, 40)).save(path))
        yield


@pytest.fixture
def compile_for():
    """A function (backend): from there to the end of the test, programs are traced for that device."""
    from drivenmorph_jax.backends import compiling_for
    with contextlib.ExitStack() as stack:
        yield lambda backend: stack.enter_context(compiling_for(backend))


@pytest.fixture
def computed_on(compile_for):
    """(backend, f, arrays, g, atol) -> the text of the program there: what that backend would compute, f(*arrays) and
    the derivative along g, is what this one does."""
    def check(backend, f, arrays, g, atol):
        import jax

        def value_and_gradients(arrays, g):
            value, pull = jax.vjp(f, *arrays)
            return value, *pull(g)

        wanted = jax.jit(value_and_gradients)(arrays, g)
        compile_for(backend)
        for a, b in zip(*map(jax.tree.leaves, (jax.jit(value_and_gradients)(arrays, g), wanted)), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)
        return str(jax.make_jaxpr(value_and_gradients)(arrays, g))

    return check
