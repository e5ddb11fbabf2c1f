#!/usr/bin/env bash
# A compiled JAX program can be serialised (jax.experimental.serialize_executable), and another process runs it without
# tracing. On CPUs this holds only for a program that was compiled in this process. One that JAX found in its persistent
# compilation cache is serialised and loaded without a word, and fails when it is run: parts of it are missing. So whether a
# stored program works depends on whether the cache happened to be warm when it was stored.
#
# Output seen:
#   jax 0.10.2
#   compiled, stored, loaded in another process: runs
#   found in the cache, stored, loaded in another process: fails when run, a function is not found
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6
cat > "$folder/program.py" <<'PYTHON'
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

mode, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
x = jnp.ones((64, 64))
if mode == "store":
    program = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + jnp.maximum(x, 0).sum(0)).lower(x).compile()
    file.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
else:
    try:
        program = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
        program(x).block_until_ready()
        print("runs")
    except jax.errors.JaxRuntimeError as error:
        print("fails when run, a function is not found" if "not found" in str(error) else error)
PYTHON
run() { "$folder/env/bin/python" "$folder/program.py" "$@" "$folder" "$folder/$name" 2>/dev/null; }
{
  echo "jax $("$folder/env/bin/python" -c 'import jax; print(jax.__version__)')"
  name=compiled
  run store
  echo "compiled, stored, loaded in another process: $(run load)"
  name=cached
  run store
  echo "found in the cache, stored, loaded in another process: $(run load)"
} | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
