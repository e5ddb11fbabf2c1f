import contextlib
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# Tests and the programs that they start compile the same code, each piece once, and quickly rather than well. JAX reads
# these when it is imported, which happens only in the tests.
CACHE = Path(tempfile.gettempdir()) / f"drivenmorph-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs end with the module that they were compiled for: each takes memory, and mappings of it, of
    which Linux gives a process 65,530; the compiler aborts where there are no more."""
    yield
    import jax
    jax.clear_caches()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """(workdir, summary) of one run of `configs/smoke.py`."""
    from configs.smoke import get_config
    from drivenmorph_jax.training.loop import train_and_evaluate
    workdir = tmp_path_factory.mktemp("smoke")
    return workdir, train_and_evaluate(get_config(), workdir)


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

        def value_and_gradients():
            value, pull = jax.vjp(f, *arrays)
            return value, *pull(g)

        wanted = value_and_gradients()
        compile_for(backend)
        for a, b in zip(*map(jax.tree.leaves, (value_and_gradients(), wanted)), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)
        return str(jax.make_jaxpr(value_and_gradients)())

    return check
