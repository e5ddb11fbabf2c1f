"""Checkpoints, by Orbax: `latest` to go on from, `best` (on the validation pairs) to use.

A checkpoint holds `params`; `about`: the configuration, the git commit and what a user of the parameters must know;
and in `latest` also `opt_state` and `data`, the state of the input pipeline.
"""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax


def git_commit():
    """The commit of the source tree, "-dirty" added where files differ from it; None where it is no git tree."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment():
    """What a result depends on besides its inputs: commit, versions, devices."""
    return {"commit": git_commit(), "python": platform.python_version(), "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(), **{name: version(name) for name in ("jax", "flax", "numpy", "SimpleITK")}}
