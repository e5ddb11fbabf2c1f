#!/usr/bin/env bash
# NumPy 2.2.6, CPython 3.11. By protocol 2 to 4 a pickled array names `numpy._core.multiarray._reconstruct`. By protocol 5,
# the default since Python 3.14, an array that is one block of memory, in C or in Fortran order, names
# `numpy._core.numeric._frombuffer` in its place, and neither `_reconstruct` nor `numpy.ndarray`. An array with strides
# names `_reconstruct` by every protocol. An unpickler that allows the former names alone, as those of data sets shared as
# pickles do, refuses files that the same program wrote under a newer Python.
#
# Output seen:
#   4 C _reconstruct
#   4 F _reconstruct
#   4 strided _reconstruct
#   5 C _frombuffer
#   5 F _frombuffer
#   5 strided _reconstruct
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import pickle
import pickletools

import numpy as np

arrays = {"C": np.zeros((3, 4)), "F": np.zeros((3, 4), order="F"), "strided": np.zeros((6, 4))[::2]}
for protocol in (4, 5):
    for name, array in arrays.items():
        words = {word for _, word, _ in pickletools.genops(pickle.dumps(array, protocol)) if isinstance(word, str)}
        print(protocol, name, *sorted(words & {"_reconstruct", "_frombuffer"}))
PYTHON
diff "$folder/seen" <(sed -n 's/^#   \([45] .*\)/\1/p' "$0")
