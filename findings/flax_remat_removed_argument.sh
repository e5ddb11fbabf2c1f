#!/usr/bin/env bash
# flax 0.12.0 and 0.12.1 with jax 0.10.0: pip installs them together without a word, since flax asks for jax 0.7.1 or
# newer, and modules initialise and apply. But nn.remat cannot be applied: flax always passes the argument `concrete` to
# jax.checkpoint, and jax 0.10.0 refuses it even where it is False. flax 0.12.2 does not pass it.
#
# So a library that rematerialises needs flax>=0.12.2 with jax>=0.10, though the ranges of both allow older ones.
#
# Output seen, of flax 0.12.1 and then of 0.12.2:
#   without remat: (2, 4)
#   with remat: NotImplementedError, True
#   without remat: (2, 4)
#   with remat: (2, 4)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet flax==0.12.1 jax==0.10.0 jaxlib==0.10.0
cat > "$folder/case.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import linen as nn

x = jnp.ones((2, 3))
plain, remat = nn.Dense(4), nn.remat(nn.Dense)(4)
params = plain.init(jax.random.key(0), x)
print("without remat:", plain.apply(params, x).shape)
try:
    print("with remat:", remat.apply(params, x).shape)
except NotImplementedError as error:
    print("with remat: NotImplementedError,", "concrete" in str(error))
PYTHON
"$folder/env/bin/python" "$folder/case.py" > "$folder/old"
"$folder/env/bin/pip" install --quiet flax==0.12.2 jax==0.10.0 jaxlib==0.10.0
"$folder/env/bin/python" "$folder/case.py" > "$folder/new"
cat "$folder/old" "$folder/new" | tee "$folder/seen"
diff "$folder/seen" <(sed -n 's/^#   \(with.*\)/\1/p' "$0")
