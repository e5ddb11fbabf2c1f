"""Every form of an operation against its definition: values and derivatives, whatever device this is."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drivenmorph_jax import backends
from drivenmorph_jax.backends import attention, channels, convolution, damped_step, kernels, programs, warp
from drivenmorph_jax.demons import forces
from drivenmorph_jax.fields.warp import trilinear
from drivenmorph_jax.network.attention import neighbours_attended
from drivenmorph_jax.network.convolution import convolved

DEVICES = ("cpu", "cpu without kernels", "gpu", "tpu")


def test_the_flags_of_the_user_come_before_our_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert programs.compiler_options() == {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_backend_optimization_level=0")
    assert programs.compiler_options() == {}


def normal(*shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape, scale=scale), jnp.float32)


def products(a, b):
    return [a * b, a * a]


def operations():
    """{name: (table of forms, definition as a function of arrays alone, the form likewise, arrays)}."""
    # Inside its cell, since at the border the definition's derivative is another.
    u = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (6, 5, 7, 3)), jnp.float32) - jnp.asarray(
        np.moveaxis(np.indices((6, 5, 7)), 0, -1) > 3, jnp.float32)
    return {
        "warp": (warp.FORMS, trilinear, lambda form: form, (normal(6, 5, 7, 2), u)),
        "short warp": (warp.FORMS, trilinear, lambda form: lambda image, u: form(image, u, near=True),
                       (normal(6, 5, 7, 2), u)),
        "damped step": (dict.fromkeys(DEVICES, forces.damped_step) | damped_step.FORMS,
                        lambda *arrays: stepped(*arrays), lambda form: lambda *arrays: form(*arrays, 0.1, 0.5),
                        (normal(6, 5, 7, 3), jnp.sin(9 * normal(6, 5, 7, 3)), normal(6, 5, 7, 3) ** 2)),
        "convolution": (convolution.FORMS, convolved, lambda form: form,
                        (normal(1, 5, 6, 7, 3), normal(3, 3, 3, 3, 4))),
        "convolution of many channels": (convolution.FORMS, convolved, lambda form: form,
                                         (normal(1, 5, 6, 7, 8), normal(3, 3, 3, 8, 16))),
        "convolution of every other voxel": (
            convolution.FORMS, lambda x, kernel: convolved(x, kernel, 2),
            lambda form: lambda x, kernel: form(x, kernel, 2), (normal(1, 6, 6, 8, 3), normal(3, 3, 3, 3, 4))),
        "attention": (attention.FORMS, lambda q, k, v: neighbours_attended(q, k, v, 1),
                      lambda form: lambda q, k, v: form(q, k, v, 1),
                      # jaxlib 0.10.2 ends in a crash on the definition of some other shapes.
                      tuple(scale * normal(2, 4, 3, 5, 2, 3) for scale in (1.0, 0.5, 2.0))),
        "sums over channels": (channels.FORMS, lambda a, b: [x.sum(-1) for x in products(a, b)],
                               lambda form: lambda a, b: form(products, (a, b)),
                               (normal(4, 5, 6), normal(4, 5, 6) + 1)),
    }


def stepped(d, slope, weights):
    """The damped step as its definition: a system of equations at each voxel."""
    gradients = jnp.stack(jnp.gradient(slope, axis=(0, 1, 2)), -1)
    matrix = jnp.einsum("...k,...ki,...kj->...ij", weights, gradients, gradients)
    damping = 0.1 * (weights * d * d).sum(-1) + 0.5
    right = jnp.einsum("...k,...k,...ki->...i", weights, d, gradients)
    return jnp.linalg.solve(matrix + damping[..., None, None] * jnp.eye(3), right[..., None])[..., 0]


def compare(f, definition, arrays):
    """The two have the same values and the same derivatives."""
    def value_and_gradients(f, arrays):
        value, pull = jax.vjp(f, *arrays)
        return value, pull(jax.tree.map(jnp.cos, value))

    both = (jax.jit(partial(value_and_gradients, of))(arrays) for of in (f, definition))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.fixture
def with_kernels():
    if not kernels.available():
        pytest.skip("no kernels: make compiles them where there is a C++ compiler")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(operations()))
def test_a_form_is_its_definition_and_so_is_its_derivative(name, device, compile_for, monkeypatch, request):
    monkeypatch.setattr(convolution, "SMALL", 0)
    if device == "cpu":
        request.getfixturevalue("with_kernels")
    if device == "cpu without kernels":
        monkeypatch.setattr(kernels, "available", lambda: False)
    forms, definition, as_function, arrays = operations()[name]
    compile_for(device.split()[0])
    compare(as_function(forms.get(device) or forms[device.split()[0]]), definition, arrays)


def test_kernels_join_their_blocks(with_kernels):
    compare(convolution.FORMS["cpu"], convolved, (normal(2, 9, 15, 20, 2), normal(3, 3, 3, 2, 6)))
    compare(convolution.FORMS["cpu"], convolved, (normal(1, 2, 33, 40, 9), normal(3, 3, 3, 9, 1)))
    compare(lambda *x: damped_step.FORMS["cpu"](*x, 0.1, 0.5), stepped,
            (normal(18, 2, 3, 2), jnp.sin(9 * normal(18, 2, 3, 2)), normal(18, 2, 3, 2) ** 2))
    compare(partial(attention.FORMS["cpu"], radius=1), partial(neighbours_attended, radius=1),
            tuple(normal(2, 9, 3, 4, 2, 3, scale=scale) for scale in (1.0, 0.5, 2.0)))
    for radius in (2, 3):
        compare(partial(attention.FORMS["cpu"], radius=radius),
                partial(attention._along_planes, radius=radius),
                tuple(normal(1, 5, 3, 4, 1, 2, scale=scale) for scale in (1.0, 0.5, 2.0)))
    image, u = normal(19, 4, 3, 5), normal(17, 5, 6, 3, scale=3.0)
    compare(warp.FORMS["cpu"], warp._gathered_on_cpu, (image, u))


def test_kernels_under_vmap_are_kernels_of_each(with_kernels):
    image, fields = normal(6, 5, 4, 2), normal(2, 3, 6, 5, 4, 3)
    each = jnp.stack([jnp.stack([warp.FORMS["cpu"](image, u) for u in of]) for of in fields])
    np.testing.assert_array_equal(jax.vmap(jax.vmap(warp.FORMS["cpu"], (None, 0)), (None, 0))(image, fields), each)
    x, kernel = normal(2, 1, 3, 4, 5, 2), normal(3, 3, 3, 2, 4)
    np.testing.assert_array_equal(jax.vmap(convolution.FORMS["cpu"], (0, None))(x, kernel),
                                  jnp.stack([convolution.FORMS["cpu"](one, kernel) for one in x]))


def test_a_nan_is_not_hidden_by_a_kernel(with_kernels):
    u = jnp.zeros((4, 4, 4, 3)).at[1, 2, 3, 0].set(jnp.nan)
    found, of = jax.vjp(warp.FORMS["cpu"], normal(4, 4, 4, 1), u)
    assert (jnp.isnan(found[..., 0]) == jnp.isnan(u[..., 0])).all() and jnp.isnan(of(jnp.ones((4, 4, 4, 1)))[0]).any()
    q = jnp.zeros((1, 2, 2, 2, 1, 2)).at[0, 1, 1, 1].set(jnp.nan)
    assert (jnp.isnan(attention.FORMS["cpu"](q, q, q, 1)[0]).all(-1) == 1).all()  # all are neighbours of it


def test_other_numbers_and_planes_take_the_forms_of_xla(with_kernels):
    def program(image, u):
        return str(jax.make_jaxpr(warp.FORMS["cpu"])(image, u))

    image, u = normal(4, 5, 6, 2), normal(4, 5, 6, 3)
    assert "drivenmorph_warp" in program(image, u)
    assert "drivenmorph" not in program(image.astype(jnp.bfloat16), u)
    assert "drivenmorph" not in program(image[0], u[0, ..., :2])


def test_a_library_that_cannot_be_loaded_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    assert not kernels.available.__wrapped__()
    (tmp_path / "_kernels.abi3.so").write_bytes(b"no library")
    assert not kernels.available.__wrapped__()


def test_a_machine_without_the_instructions_of_the_kernels_does_not_call_them(with_kernels, monkeypatch):
    class Old(kernels.ctypes.CDLL):
        drivenmorph_supported = staticmethod(lambda: 0)

    monkeypatch.setattr(kernels.ctypes, "CDLL", Old)
    assert not kernels.available.__wrapped__()


MESH = """
import jax, numpy as np
from drivenmorph_jax.backends import warp
from drivenmorph_jax.fields.warp import trilinear
image, u = (np.random.default_rng(k).normal(size=(8, 4, 4, c)).astype(np.float32) for k, c in ((0, 2), (1, 3)))
split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("space",)), jax.sharding.PartitionSpec("space"))
program = jax.jit(warp.FORMS["cpu"], in_shardings=split, out_shardings=split).lower(image, u).compile()
assert "drivenmorph_warp" not in program.as_text()
np.testing.assert_allclose(program(*jax.device_put((image, u), split)), trilinear(image, u), atol=1e-5)
"""


def test_several_devices_share_the_forms_of_xla():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", MESH], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_device_that_no_table_names_gets_the_definition(compile_for):
    compile_for("metal")
    assert backends.current() == "metal"
    assert backends.chosen(warp.FORMS, trilinear) is trilinear


def test_what_is_compiled_for_another_device_ends_with_the_block():
    here = backends.current()
    with pytest.raises(ZeroDivisionError), backends.compiling_for("tpu"):
        with backends.compiling_for("gpu"):
            assert backends.current() == "gpu"
        assert backends.current() == "tpu"
        raise ZeroDivisionError
    assert backends.current() == here


def test_versions_with_a_slow_scatter_are_told_on_gpus_only(compile_for):
    assert not programs.slow_scatter("0.10.2")
    compile_for("gpu")
    assert programs.slow_scatter("0.10.2") and programs.slow_scatter("0.11.0")
    assert not programs.slow_scatter("0.10.1") and not programs.slow_scatter("0.11.1")
