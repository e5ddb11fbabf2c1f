"""Data sets: subjects in splits, from the embedded cohort or from a folder of the user."""

from drivenmorph_jax.data.cohort import embedded_cohort, true_displacement
from drivenmorph_jax.data.folder import folder_dataset
from drivenmorph_jax.data.pipeline import training_batches
from drivenmorph_jax.data.subject import SPLITS, Dataset, Subject, ordered_pairs, padded
from drivenmorph_jax.errors import InputError

__all__ = ["SPLITS", "Dataset", "Subject", "embedded_cohort", "folder_dataset", "load", "ordered_pairs",
           "training_batches", "true_displacement"]


def load(config, splits=SPLITS, multiple=1):
    """Load the data set that `config.name` names: 'embedded' or 'folder'.

    Args:
      config: name, and the settings of `embedded_cohort` or `folder_dataset`.
      splits: the splits to load; the others stay empty.
      multiple: every side is padded with background up to a multiple of it.

    Raises InputError for another name, and the errors of `embedded_cohort` or `folder_dataset`.
    """
    makers = {"embedded": embedded_cohort, "folder": folder_dataset}
    if config.name not in makers:
        raise InputError(f"data.name is {config.name!r}: set it to one of {', '.join(makers)}")
    return padded(makers[config.name](config, splits), multiple)
