"""What comes with the package: weights and configurations."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(*parts):
    """The path of what is shipped, such as ("weights", "brain-t1"): within an installed package, beside it in a
    checkout."""
    inside = PACKAGE.joinpath(*parts)
    return inside if inside.exists() else PACKAGE.parent.joinpath(*parts)
