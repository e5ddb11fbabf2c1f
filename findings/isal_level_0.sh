#!/usr/bin/env bash
# Level 0 of ISA-L's Python package isal is not zlib's level 0, which stores. It compresses by codes that suit text: float32
# data of a smooth field come out a fifth larger than they went in. Level 1 makes them smaller than the input, and zlib's own
# level 0 leaves their size. A file of fields is therefore written with level 1, never with the "fastest" level 0.
#
# Output seen:
#   isal 1.8.0
#   isal, level 0: more than a tenth larger than the input
#   isal, level 1: smaller than the input
#   zlib, level 0: the size of the input
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet isal==1.8.0 numpy==2.2.6
cat > "$folder/sizes.py" <<'PYTHON'
import zlib
from importlib.metadata import version

import numpy as np
from isal import isal_zlib

print("isal", version("isal"))
field = np.cumsum(np.random.default_rng(0).normal(size=(200, 200, 50)), 0).astype(np.float32).tobytes()
for name, library, level in (("isal", isal_zlib, 0), ("isal", isal_zlib, 1), ("zlib", zlib, 0)):
    part = len(library.compress(field, level)) / len(field)
    said = ("more than a tenth larger than the input" if part > 1.1 else "smaller than the input" if part < 0.99
            else "the size of the input" if part < 1.01 else f"{part} of the input")
    assert library.decompress(library.compress(field, level)) == field
    print(f"{name}, level {level}: {said}")
PYTHON
"$folder/env/bin/python" "$folder/sizes.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
