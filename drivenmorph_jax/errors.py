"""The one exception that reaches a user, how a program ends with it, and how it reads an argument."""



class InputError(Exception):
    """Something the user gave cannot be used: one sentence that names the file or key, and the remedy."""
