"""`InputError` and `InputWarning`: an input that a user can correct, and one that a user should look at."""


class InputError(Exception):
    """An input of the user cannot be used. The message is one sentence that names the file or key and the remedy."""


class InputWarning(UserWarning):
    """An input of the user is used, but other tools would use it in another way. One sentence, which names the file."""
