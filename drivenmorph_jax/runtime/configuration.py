"""Configurations: a Python file with `get_config()`, and `--config.KEY=VALUE` on the command line.

The files in `configs/` come with the package and are known by their names.
"""

import ast
import copy
import difflib
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.runtime.shipped import shipped

PREFIX = "--config."


def load(name_or_path):
    """The ConfigDict that `get_config()` of a file returns, or of a shipped configuration, which has a name: "default".

    Raises InputError where there is none.
    """
    named = {path.stem: path for path in shipped("configs").glob("*.py")}
    path = named.get(str(name_or_path), name_or_path)
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give a file, or one of {', '.join(sorted(named))}")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
    except Exception as error:  # the file is a program: it can fail in any way
        raise InputError(f"{path} is not a configuration ({type(error).__name__}: {error}): "
                         "it must define get_config()") from error
    return get_config()


def override(config, arguments):
    """A copy of `config` with keys set by arguments `--config.KEY=VALUE`, each value in the type it replaces.

    Raises InputError for another argument, an unknown key, or a value of another type.
    """
    config = copy.deepcopy(config)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name.startswith(PREFIX) and equals):
            raise InputError(f"{argument} is not understood: see --help; settings are written {PREFIX}KEY=VALUE")
        *parents, key = name.removeprefix(PREFIX).split(".")
        node = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or key not in node or isinstance(node[key], ConfigDict):
            raise InputError(f"{name} is not a setting of this configuration{_nearest(config, name)}")
        node[key] = _typed(name, text, node[key])
    return config


def from_dict(settings):
    """The ConfigDict that `settings`, read from JSON, was written from: JSON has no tuples."""
    return ConfigDict({key: from_dict(value) if isinstance(value, dict) else
                       tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def keys(config, prefix=""):
    """Every setting as (dotted key, value)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nearest(config, name):
    names = [PREFIX + key for key, _ in keys(config)]
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f": the settings are {', '.join(names)}"


def _typed(name, text, old):
    if isinstance(old, str) or old is None:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(old):
        raise InputError(f"{name}={text} does not fit: the value must be a {type(old).__name__} like {old!r}")
    return value
