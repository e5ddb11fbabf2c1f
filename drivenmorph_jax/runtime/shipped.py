"""What comes with the package: its version, the weights, the configurations."""

from pathlib import Path

VERSION = "0.1.0"
PACKAGE = Path(__file__).resolve().parents[1]


def shipped(*parts):
    """The path of what is shipped, such as ("weights", "brain-t1"): within an installed package, beside it in a
    checkout."""
    inside = PACKAGE.joinpath(*parts)
    return inside if inside.exists() else PACKAGE.parent.joinpath(*parts)
