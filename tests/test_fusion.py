import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drivenmorph_jax.backends import current
from drivenmorph_jax.backends.fusion import alone

X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap, jax.grad], ids=["plain", "vmap", "grad"])
def test_what_stands_alone_is_a_branch_that_the_compiler_keeps_and_nothing_else_changes(transform):
    def program(around):
        return transform(lambda x: (around(jnp.tanh, jnp.sin(x)) + 1).sum())

    compiled = jax.jit(program(alone)).lower(X).compile()
    np.testing.assert_allclose(compiled(X), program(lambda f, *args: f(*args))(X), atol=1e-6)
    assert (" conditional(" in compiled.as_text()) == (current() == "cpu")
