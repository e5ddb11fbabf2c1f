"""Programs that are stored whole: found again without tracing, only where they are the same, and run by others."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from drivenmorph_jax.runtime import stored as module
from drivenmorph_jax.runtime.stored import stored

X = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
TRACED = []


@pytest.fixture
def folder(tmp_path):
    """An empty folder of JAX's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


@pytest.fixture
def traced():
    """One item each time that `power` is traced."""
    TRACED.clear()
    return TRACED


def ours(function):
    """`function` as if it were one of the package: of others, the source is not known."""
    function.__module__ = "drivenmorph_jax.tests"
    return function


def power():
    def raised(x, n):
        TRACED.append(n)
        return {"power": x**n, "sum": x.sum()}

    return stored(ours(raised), static_argnames="n")


def programs(folder):
    return [path for path in folder.glob("programs/*") if path.suffix != ".name"]


def forget():
    """As a new process: nothing that was compiled is known."""
    module._program.cache_clear()


def test_a_stored_program_is_found_without_tracing(folder, traced):
    first = power()(X, n=2)
    assert traced == [2] and len(programs(folder)) == 1
    forget()
    again = power()(X, 2)  # by position as well
    assert traced == [2] and len(programs(folder)) == 1
    np.testing.assert_array_equal(again["power"], X**2)
    assert float(first["sum"]) == float(again["sum"]) == X.sum()


def test_after_a_change_of_the_source_it_is_traced_but_not_compiled(folder, traced, monkeypatch):
    power()(X, n=2)
    monkeypatch.setattr(module, "_source", lambda: "another")
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    for _ in range(2):
        forget()
        np.testing.assert_array_equal(power()(X, n=2)["power"], X**2)
    assert traced == [2, 2] and len(programs(folder)) == 1


@pytest.mark.parametrize(("x", "n"), [(X, 3), (X[:1], 2), (X.astype(np.int32), 2)])
def test_another_setting_shape_or_type_is_another_program(x, n, folder, traced):
    power()(X, n=2)
    forget()
    found = power()(x, n=n)
    assert len(traced) == 2 and len(programs(folder)) == 2
    np.testing.assert_allclose(found["power"], x**n, rtol=1e-6)


def test_what_a_function_closes_over_tells_it_from_others(folder):
    def times(factor):
        @stored
        @ours
        def scaled(x):
            return factor * x

        return scaled

    found = []
    for factor in (2.0, 3.0, 2.0):
        forget()
        found.append(np.asarray(times(factor)(X)))
    np.testing.assert_array_equal(found, [2 * X, 3 * X, 2 * X])
    assert len(programs(folder)) == 2


def test_a_damaged_program_is_compiled_again(folder, traced):
    power()(X, n=2)
    path, = programs(folder)
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[:len(whole) // 2]):
        path.write_bytes(damaged)
        forget()
        np.testing.assert_array_equal(power()(X, n=2)["power"], X**2)
    assert traced == [2] * 4 and len(programs(folder)) == 1


def test_a_function_of_an_object_without_a_text_is_not_stored(folder):
    thing = object()

    @stored
    @ours
    def same(x):
        return x if thing is not None else 0

    np.testing.assert_array_equal(same(X), X)
    assert not programs(folder)


def test_a_function_outside_the_package_is_not_stored(folder):
    np.testing.assert_array_equal(stored(lambda x: x)(X), X)
    assert not programs(folder)


def test_within_other_programs_it_is_an_ordinary_function(folder, traced):
    square = power()
    gradient = jax.grad(lambda x: square(x, n=2)["power"].sum())(X)
    np.testing.assert_allclose(gradient, 2 * X)
    np.testing.assert_allclose(jax.vmap(partial(square, n=3))(X)["power"], X**3, rtol=1e-6)
    assert not programs(folder)


def test_without_a_cache_nothing_is_stored(folder, traced):
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_array_equal(power()(X, n=2)["power"], X**2)
    assert not programs(folder)


@pytest.mark.parametrize("enabled", [False, True])
def test_jaxs_own_cache_stays_as_it_was_set(folder, enabled):
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", enabled)
    try:
        power()(X, n=5)
        assert jax.config.jax_enable_compilation_cache == enabled and len(programs(folder)) == 1
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def test_an_argument_that_is_left_out_and_one_that_is_none_make_two_programs(folder):
    def doubled(x, weight=None):
        return 2 * x if weight is None else 2 * x * weight

    for _ in range(2):
        one = stored(ours(doubled))
        np.testing.assert_array_equal(one(X), one(X, None))
        forget()
    assert len(programs(folder)) == 2


def test_programs_that_no_run_has_loaded_for_long_are_deleted(folder, traced, monkeypatch):
    power()(X, n=2)
    first, = programs(folder)
    late = first.stat().st_mtime + module.UNUSED + 60
    monkeypatch.setattr(module.time, "time", lambda: late)
    power()(X, n=3)
    assert first not in programs(folder)


def test_another_process_runs_a_program_that_jax_had_in_its_cache(folder):
    # JAX hands out an incomplete program where its own cache has it, see findings/jax_serialized_from_cache.sh.
    code = """
import jax, jax.numpy as jnp, sys
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
from drivenmorph_jax.runtime.stored import stored
def f(x):
    print("traced")
    return jnp.sin(x) @ jnp.cos(x) + jnp.maximum(x, 0).sum(0)
f.__module__ = "drivenmorph_jax.tests"
x = jnp.ones((64, 64))
if sys.argv[1] == "cached":
    jax.jit(f)(x)
    jax.clear_caches()
print(float(stored(f)(x).sum()))
"""
    said = [subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[1], env={"JAX_COMPILATION_CACHE_DIR": str(folder), "HOME": "/"})
            .stdout.split() for how in ("cached", "again")]
    assert said[0].count("traced") == 2 and said[1] == said[0][-1:]
