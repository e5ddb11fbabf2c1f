"""`InputError`, the exception for an input that a user can correct."""


class InputError(Exception):
    """An input of the user cannot be used. The message is one sentence that names the file or key and the remedy."""
