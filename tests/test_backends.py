"""Every form of an operation against its definition: values and derivatives, whatever device this is."""

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
                        (normal(6, 5, 7, 3), normal(5, 6, 7, 3)[:5].reshape(6, 5, 7, 3), normal(6, 5, 7, 3) ** 2)),
        "convolution": (convolution.FORMS, convolved, lambda form: form,
                        (normal(1, 5, 6, 7, 3), normal(3, 3, 3, 3, 4))),
        "convolution of many channels": (convolution.FORMS, convolved, lambda form: form,
                                         (normal(1, 5, 6, 7, 8), normal(3, 3, 3, 8, 16))),
        "convolution of every other voxel": (
            convolution.FORMS, lambda x, kernel: convolved(x, kernel, 2),
            lambda form: lambda x, kernel: form(x, kernel, 2), (normal(1, 6, 6, 8, 3), normal(3, 3, 3, 3, 4))),
        "attention": (attention.FORMS, lambda q, k, v: neighbours_attended(q, k, v, 1),
                      lambda form: lambda q, k, v: form(q, k, v, 1),
                      tuple(scale * normal(1, 4, 3, 5, 2, 3) for scale in (1.0, 0.5, 2.0))),
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(operations()))
def test_a_form_is_its_definition_and_so_is_its_derivative(name, device, compile_for, monkeypatch):
    monkeypatch.setattr(convolution, "SMALL", 0)
    forms, definition, as_function, arrays = operations()[name]
    wanted, theirs = jax.vjp(definition, *arrays)
    if device == "cpu" and not kernels.available():
        pytest.skip("no kernels: they are compiled by make, where there is a C++ compiler")
    if device == "cpu without kernels":
        monkeypatch.setattr(kernels, "available", lambda: False)
        device = "cpu"
    compile_for(device)
    found, ours = jax.vjp(as_function(forms[device]), *arrays)
    g = jax.tree.map(jnp.cos, wanted)
    for a, b in zip(*map(jax.tree.leaves, ((found, ours(g)), (wanted, theirs(g)))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


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
