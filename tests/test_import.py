"""What importing the package does: nothing outside itself; rooms import one way."""

import ast
import subprocess
import sys
from pathlib import Path

import drivenmorph_jax

PACKAGE = Path(drivenmorph_jax.__file__).parent
# From the bottom up: a room imports only what stands before it.
ROOMS = ("errors", "files", "backends", "runtime", "fields", "demons", "images", "brain", "network", "transforms",
         "data", "evaluation", "training", "registration", "labelling", "view", "cli")


def imports(path):
    """Names of the rooms that a file imports at its top level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("drivenmorph_jax"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


def test_rooms_import_only_what_stands_before_them():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert found - {"__init__"} == set(ROOMS)
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__" or path.name == "prepare.py" and room == "data":  # whose -m form is a program
            continue
        for other in imports(path):
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.relative_to(PACKAGE)} imports {other}"


def test_one_place_asks_for_the_backend():
    asking = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
              if "default_backend" in path.read_text()]
    assert asking == ["backends/__init__.py"]


def test_importing_every_module_changes_nothing_outside_the_package():
    modules = [".".join(("drivenmorph_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
               for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    others = sorted({name for path in PACKAGE.rglob("*.py") for node in ast.parse(path.read_text()).body
                     for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                                  [alias.name for alias in node.names] if isinstance(node, ast.Import) else ())
                     if not name.startswith("drivenmorph_jax")})
    code = f"""
import importlib, logging, os, signal, warnings
for name in {others!r}:
    importlib.import_module(name)  # what these do is theirs
import jax, matplotlib, tensorstore
def state():
    return (logging.getLogger("absl").level, logging.getLogger("absl").disabled, logging.root.level,
            dict(os.environ), list(warnings.filters), tensorstore.KvStore.Spec.to_json,
            tensorstore.experimental_collect_matching_metrics, signal.getsignal(signal.SIGTERM),
            {{name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_compilation_cache_dir",
                                                         "jax_persistent_cache_min_compile_time_secs")}},
            {{name: value for name, value in matplotlib.rcParams.items() if name != "backend"}})
before = state()
for name in {modules!r}:
    importlib.import_module(name)
for a, b in zip(before, state()):
    assert a == b, set(a.items()) ^ set(b.items()) if isinstance(a, dict) else (a, b)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_public_name_is_there():
    for name in drivenmorph_jax.__all__:
        assert getattr(drivenmorph_jax, name) is not None
    assert set(drivenmorph_jax._HOME) | {"demons"} == set(drivenmorph_jax.__all__)
