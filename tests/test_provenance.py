import shutil
import subprocess

import pytest

from drivenmorph_jax.runtime import provenance
from drivenmorph_jax.runtime.shipped import VERSION

NAME = "drivenmorph_jax"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """(a git repository that holds a file, a function of the folder of a copy of the package -> its commit)."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # which a git hook sets
        monkeypatch.delenv(name, raising=False)

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True,
                       capture_output=True)

    def commit_of(package, tracked):
        package.mkdir(parents=True)
        shutil.copy(provenance.PACKAGE / "__init__.py", package)
        if tracked:
            git("add", ".")
            git("commit", "-m", "the package")
        monkeypatch.setattr(provenance, "PACKAGE", package.resolve())
        return provenance.git_commit()

    git("init")
    (tmp_path / "file").write_text("")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path, commit_of


@pytest.mark.parametrize(("place", "tracked", "own"), [
    (NAME, True, True), (NAME, False, False), (f".venv/lib/site-packages/{NAME}", False, False),
    (f"vendor/{NAME}", True, False)])
def test_the_commit_is_that_of_the_packages_own_checkout(place, tracked, own, repository):
    folder, commit_of = repository
    commit = commit_of(folder / place, tracked)
    assert (commit is not None) == own
    if own:
        assert len(commit) == 40
        (folder / place / "__init__.py").write_text("")
        assert provenance.git_commit() == f"{commit}-dirty"


def test_there_is_no_commit_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / NAME)
    assert provenance.git_commit() is None


def test_the_environment_tells_the_version():
    told = provenance.environment()
    assert told["version"] == VERSION and {"commit", "python", "device", "jax", "flax"} <= set(told)
