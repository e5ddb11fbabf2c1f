"""The Demons forces, the updates, and the classical Demons algorithm, as plain functions without Flax."""

from drivenmorph_jax.demons import curves, forces
from drivenmorph_jax.demons.classical import (
    FORCES,
    INTENSITY,
    LNCC,
    MULTIPLE,
    Registered,
    demons,
    demons_level,
)
from drivenmorph_jax.demons.guidance import (
    FARTHEST,
    border_force,
    contradictory,
    guided,
    landmark_force,
    out_of_reach,
    remaining,
    signed_distance,
)
from drivenmorph_jax.demons.multistart import force_between, refine, registered, registered_stiffly, weighted
from drivenmorph_jax.demons.updates import (
    bch,
    compositional_update,
    inverse_update,
    lie_bracket,
    log_update,
    symmetric_log_update,
)

__all__ = ["FARTHEST", "FORCES", "INTENSITY", "LNCC", "MULTIPLE", "Registered", "bch", "border_force",
           "compositional_update", "contradictory", "curves", "demons", "demons_level", "force_between", "forces",
           "guided", "inverse_update", "landmark_force", "lie_bracket", "log_update", "out_of_reach", "refine",
           "registered", "registered_stiffly", "remaining", "signed_distance", "symmetric_log_update", "weighted"]
