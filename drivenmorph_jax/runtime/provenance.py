"""Where a result comes from: the version and the commit of the package, the versions of what it stands on, the device.

The commit is told only of the package's own checkout. An installed package may lie within a git repository of another
project, whose commit says nothing about it.
"""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

from drivenmorph_jax.runtime.shipped import PACKAGE, VERSION


def git_commit():
    """The commit of the checkout that the package is the top folder of, "-dirty" added where files differ from it.

    None where the package lies anywhere else, or where git does not track it.
    """
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != PACKAGE.parent:
            return None
        git("ls-files", "--error-unmatch", f"{PACKAGE.name}/__init__.py")
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment():
    """What a result depends on besides its inputs: version, commit, versions of packages, devices."""
    return {"version": VERSION, "commit": git_commit(), "python": platform.python_version(),
            "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
            **{name: version(name) for name in ("jax", "flax", "numpy", "SimpleITK")}}
