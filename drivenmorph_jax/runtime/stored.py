"""Compiled programs that are stored whole, so that a later run of a command does not trace them again.

JAX's own cache keeps what XLA compiles. To find a program there, JAX first traces and lowers it, which takes longer
than loading it: for the network 4.6 s of 6 s. A program that is `stored` is found by what it is made from instead: the
names of its functions, its settings, shapes, the source of the package, and what all programs depend on. After a change
of the source, it is found by its lowered text.
"""

import contextlib
import hashlib
import inspect
import os
import pickle
import platform
import time
from functools import cache, lru_cache, partial, update_wrapper
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from drivenmorph_jax.backends import current, kernels
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import make_folder, replacing
from drivenmorph_jax.runtime.shipped import PACKAGE

UNUSED = 30 * 24 * 3600  # seconds after which a program that no run has loaded is deleted


class Nameless(Exception):
    """A program that is made from something without a text that tells it from all others, in every process."""


class Stored:
    """A function like `jax.jit(function, **options)`, whose programs are stored in the folder of JAX's cache.

    They are stored on CPU, for one device, and where that folder is set. Within another program, or where it is made
    from a function outside the package, such as a force of your own, it is an ordinary jitted function.
    """

    def __init__(self, function, static_argnames=(), **options):
        self.static = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        self.jitted = jax.jit(function, static_argnames=self.static, **options)
        self.signature, self.options = inspect.signature(function), str(sorted(options.items()))
        self.made_from = function, self.options
        update_wrapper(self, function)

    def __call__(self, *args, **kwargs):
        dynamic, static = self._split(*args, **kwargs)
        if not _storable(jax.tree.leaves(dynamic)):
            return self.jitted(*args, **kwargs)
        return _program(self, *_types(dynamic), static)(**dynamic)

    def compiled(self, *args, **kwargs):
        """The compiled program for these arguments, arrays or ShapeDtypeStructs. It takes them by their names."""
        dynamic, static = self._split(*args, **kwargs)
        return _program(self, *_types(dynamic), static)

    def _split(self, *args, **kwargs):
        """The arguments by their names: a dictionary of those that are arrays, and the items of the static ones."""
        given = self.signature.bind(*args, **kwargs).arguments
        static = tuple((name, given.pop(name)) for name in self.static if name in given)
        return given, static


def stored(function=None, **options):
    """Decorator: the `Stored` function; `options` are those of `jax.jit`."""
    return partial(Stored, **options) if function is None else Stored(function, **options)


def _types(dynamic):
    leaves, tree = jax.tree.flatten(dynamic)
    return tree, tuple(map(jax.typeof, leaves))


def _storable(leaves):
    return (jax.config.jax_compilation_cache_dir is not None and current() == "cpu" == jax.devices()[0].platform
            and jax.device_count() == 1 and not any(isinstance(x, jax.core.Tracer) for x in leaves))


@lru_cache(maxsize=64)
def _program(one, tree, types, static):
    def lowered():
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in types]
        return one.jitted.lower(**jax.tree.unflatten(tree, shapes), **dict(static))

    if not _storable(()):
        return lowered().compile()
    try:
        made_from = _hashed((one.made_from, str(tree), types, static, _source(), _surroundings()))
    except Nameless:
        return lowered().compile()
    folder = Path(jax.config.jax_compilation_cache_dir) / "programs"
    known = folder / f"{made_from}.name"
    with contextlib.suppress(Exception):  # one is missing, or damaged; XLA raises many types
        return _loaded(folder / known.read_text(), known)
    found = lowered()
    path = folder / _hashed((found.as_text(), str(tree), str(found.out_tree), one.options, _surroundings()))
    try:
        program = _loaded(path)
    except Exception:  # as above
        with _uncached():
            program = found.compile()
        with contextlib.suppress(InputError, ValueError, NotImplementedError):  # then it is compiled next time, too
            _write(path, pickle.dumps(serialize(program)))
    with contextlib.suppress(InputError):
        _write(known, path.name.encode())
    return program


def _loaded(path, *known):
    program = deserialize_and_load(*pickle.loads(path.read_bytes()), execution_devices=jax.devices())
    for used in (path, *known):
        os.utime(used)
    return program


@contextlib.contextmanager
def _uncached():
    """Within the block, JAX's cache is not used: it would hand out programs that cannot be stored, since they lack the
    functions that they call (findings/jax_serialized_from_cache.sh)."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _write(path, content):
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    with contextlib.suppress(OSError):  # another process deletes them, too
        for other in path.parent.iterdir():
            if other.stat().st_mtime < time.time() - UNUSED:
                other.unlink()


def _hashed(x):
    return hashlib.sha256(_text(x).encode()).hexdigest()


def _text(x):
    """x as a text that is the same in every process. Raises Nameless where there is none."""
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(_text, x))})"
    if isinstance(x, partial):
        return _text((x.func, x.args, sorted(x.keywords.items())))
    if isinstance(x, Stored):
        return _text(x.made_from)
    if isinstance(x, jax.core.ShapedArray):
        return f"{x.str_short()} {x.weak_type}"
    if inspect.isfunction(x):
        if (x.__module__ or "").split(".")[0] != PACKAGE.name:  # its source may change without a sign
            raise Nameless(x.__qualname__)
        inside = [cell.cell_contents for cell in x.__closure__ or ()]
        return f"{x.__module__}.{x.__qualname__}:{x.__code__.co_firstlineno} {_text((inside, x.__defaults__ or ()))}"
    text = repr(x)
    if " at 0x" in text:
        raise Nameless(text)
    return text


@cache
def _source():
    """The hash of the package's source."""
    source = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".so"):
            source.update(path.read_bytes())
    return source.hexdigest()


@cache
def _surroundings():
    """What all compiled programs depend on: the versions, the flags, the processor, and whether there are kernels.

    Programs call kernels, and the question loads them."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")),
                         processor)
    return (version("jax"), version("jaxlib"), os.environ.get("XLA_FLAGS"), os.cpu_count(),
            platform.machine(), processor, jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision,
            kernels.available())
