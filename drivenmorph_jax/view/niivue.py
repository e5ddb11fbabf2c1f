"""NiiVue, which draws the page: its code comes with the package ipyniivue.

That package carries NiiVue as one module of JavaScript, made for notebooks. The module exports what a notebook needs,
not the class Niivue itself. One line is added at its end, which exports the class as well. The rest stays as it is.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from drivenmorph_jax.errors import InputError

INSTALL = "pip install --no-deps ipyniivue==2.4.4"
# The one place of the module that makes an instance, in code whose names were shortened.
MADE = re.compile(r'"Creating new Niivue instance"\).{0,200}?=new ([\w$]+)\(', re.DOTALL)


@cache
def module():
    """The text of a module of JavaScript that exports the class Niivue.

    Raises InputError where the package is missing or is one whose module is another.
    """
    found = find_spec("ipyniivue")  # found, not imported: that would need what notebooks need
    if found is None:
        raise InputError(f"the page needs NiiVue: {INSTALL}")
    text = (Path(found.origin).parent / "static" / "widget.js").read_text(encoding="utf-8")
    made = MADE.search(text)
    if not made:
        raise InputError(f"this version of ipyniivue has no NiiVue that the page can use: {INSTALL}")
    return f"{text}\nexport {{ {made[1]} as Niivue }};\n"
