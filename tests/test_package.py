"""The wheel, installed into an empty folder, with the checkout out of reach."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def done(command, cwd, **environment):
    finished = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made from the sdist, which is made from a copy: a build leaves files in the source tree."""
    copy = tmp_path_factory.mktemp("source")
    for path in map(ROOT.joinpath, ("drivenmorph_jax", "configs", "weights")):
        shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for pattern in ("LICENSE", "setup.py", "MANIFEST.in", "README.md", "pyproject.toml", "requirements*.txt"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    done([sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", "built"], copy)
    assert len(list((copy / "built").glob("*.tar.gz"))) == 1
    (made,) = (copy / "built").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(folder with nothing but the installed wheel, another folder, a function that runs a command there)."""
    folder, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    done([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel], "/")
    return folder, elsewhere, lambda *command: done([*map(str, command)], elsewhere, PYTHONPATH=str(folder))


def test_the_wheel_holds_the_code_the_configurations_and_the_shipped_weights(wheel):
    packed = zipfile.ZipFile(wheel).namelist()
    names = {name.removeprefix("drivenmorph_jax/") for name in packed if name.startswith("drivenmorph_jax/")}
    wanted = {path.relative_to(base).as_posix() for base, pattern in (
        (ROOT / "drivenmorph_jax", "**/*.py"), (ROOT, "configs/*.py"), (ROOT, "weights/brain-t1/**/*"))
        for path in base.glob(pattern) if path.is_file()}
    page = {f"view/{path.name}" for path in (ROOT / "drivenmorph_jax/view").iterdir()
            if path.suffix in (".html", ".css", ".js")}
    kernels = {"backends/_kernels.abi3.so"} if shutil.which("c++") else set()
    assert page and names == wanted | page | kernels | {"py.typed", "evaluation/page.html"}


def test_the_metadata_names_both_licences(wheel):
    with zipfile.ZipFile(wheel) as file:
        (folder,) = {name.split("/")[0] for name in file.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(file.read(f"{folder}/METADATA"))
        assert "CC BY-NC 3.0" in file.read(f"{folder}/licenses/weights/brain-t1/LICENSE").decode()
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-NC-3.0"
    assert metadata.get_all("License-File") == ["LICENSE", "weights/brain-t1/LICENSE"]
    assert any(line.startswith("jax") for line in metadata.get_all("Requires-Dist"))
    assert {"test", "docs", "rivals", "view"} == set(metadata.get_all("Provides-Extra"))


def brain(path, stretch):
    """A small head of three tissues, `stretch` times as long as another along the first axis."""
    x = (np.moveaxis(np.indices((40, 48, 40)), 0, -1) - [20, 24, 20]) / [stretch, 1.2, 1]
    radius = np.linalg.norm(x, axis=-1)
    data = np.select([radius < 6, radius < 11, radius < 15], [300, 900, 600], 0).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.5, 1.5, 1])), path)


def test_the_program_registers_and_finds_the_shipped_weights(installed):
    folder, elsewhere, run = installed
    brain(elsewhere / "fixed.nii.gz", 1.1)
    brain(elsewhere / "moving.nii.gz", 0.9)
    run(sys.executable, "-m", "drivenmorph_jax.cli.main", "register", "--fixed", "fixed.nii.gz", "--moving",
        "moving.nii.gz", "--out", "out", "--affine", "none", "--method", "demons", "--force", "intensity")
    summary = json.loads((elsewhere / "out" / "summary.json").read_text())
    assert summary["similarity_after"] > summary["similarity_before"]
    assert summary["environment"]["commit"] is None
    said = run(sys.executable, "-c", "import jax\n"
                                     "from drivenmorph_jax.network.inference import load_checkpoint\n"
                                     "from drivenmorph_jax.runtime.checkpoint import SHIPPED\n"
                                     "_, params, about = load_checkpoint(SHIPPED)\n"
                                     "print(SHIPPED, about['step'], sum(x.size for x in jax.tree.leaves(params)))")
    where, step, parameters = said.split()
    assert where == str(folder / "drivenmorph_jax" / "weights" / "brain-t1")
    assert int(step) > 1000 and 100_000 < int(parameters) < 1_000_000


def test_the_program_and_the_configurations_are_installed(installed):
    folder, _, run = installed
    assert run(folder / "bin" / "drivenmorph", "--version").split()[0] == "drivenmorph"
    said = run(sys.executable, "-c", "from drivenmorph_jax.runtime.configuration import load\n"
                                     "from pathlib import Path\n"
                                     "print(load('brain_t1').steps, Path(load('ixi').init).is_dir())")
    assert said.split() == ["4000", "True"]
