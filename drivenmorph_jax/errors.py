"""The one exception that reaches a user, and how a program ends with it."""

import sys


class InputError(Exception):
    """Something the user gave cannot be used: one sentence that names the file or key, and the remedy."""


def run(main):
    """Call `main()`; end an `InputError` as one sentence on stderr and exit status 2, without a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(_failed(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_failed("interrupted", 130))


def _failed(sentence, status):
    print(sentence, file=sys.stderr)
    return status
