"""Registration of two images, in stages: read, strip, align, plan, prepare, deform, transfer, score.

With landmarks, `guide` follows `deform`.

Each stage is a function. It takes the frozen dataclass that the stage before returned, and returns one of its own,
which adds fields to those of the former. `register` runs all stages in order:

    request = Request(fixed="a.nii.gz", moving="b.nii.gz")
    result = result_of(score(transfer(deform(prepare(plan(align(strip(read(request)))))))))
"""

from drivenmorph_jax.registration.align import Aligned, align
from drivenmorph_jax.registration.deform import Deformed, deform
from drivenmorph_jax.registration.guide import guide
from drivenmorph_jax.registration.plan import Planned, plan
from drivenmorph_jax.registration.prepare import Prepared, prepare
from drivenmorph_jax.registration.read import Pair, Request, read
from drivenmorph_jax.registration.register import register
from drivenmorph_jax.registration.result import Result, result_of
from drivenmorph_jax.registration.score import Scored, score
from drivenmorph_jax.registration.strip import Stripped, strip
from drivenmorph_jax.registration.transfer import Transferred, transfer

__all__ = ["Aligned", "Deformed", "Pair", "Planned", "Prepared", "Request", "Result", "Scored", "Stripped",
           "Transferred", "align", "deform", "guide", "plan", "prepare", "read", "register", "result_of", "score",
           "strip", "transfer"]
