"""What the programs share: how a program ends, what it tells of many images, and how it reads a size."""

import argparse
import re
import sys
import warnings

from drivenmorph_jax.errors import InputError, InputWarning


class Once(argparse.Action):
    """A flag whose second use is refused, where argparse would forget the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice; give all files after one {option_string}")
        setattr(namespace, self.dest, values)


def run(main):
    """Call `main()`; end an `InputError` as one sentence on stderr and exit status 2, without a traceback.

    An `InputWarning` is one sentence on stderr as well.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            main()
    except InputError as error:
        sys.exit(_failed(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_failed("interrupted", 130))


def tell(results, done):
    """Print `done`, a format, of each result of several images. An `InputError` among them is told as a skipped image.

    The exit status is then 4.
    """
    made, failed = 0, 0
    for result in results:
        if isinstance(result, InputError):
            print(f"skipped: {result}", file=sys.stderr)
            failed += 1
        else:
            print(done.format(result))
            made += 1
    if failed:
        print(f"{made} images are done, {failed} failed")
        sys.exit(4)


def parser(prog, description, epilog):
    """The parser of a program; `epilog` is printed as it is, with %(prog)s for the name."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_geometry(add):
    """Add the flag --geometry by `add`, the method `add_argument` of a parser."""
    add(
        "--geometry",
        default="sform",
        metavar="sform|qform|XYZ",
        help="affine that holds where a file has a qform and a sform that differ; or three letters such as LAS, the "
        "directions of the voxel axes of files that have neither, which are refused otherwise; default: sform",
    )


def add_strip(add):
    """Add the flag --strip by `add`, the method `add_argument` of a parser."""
    add(
        "--strip",
        default="auto",
        choices=["auto", "yes", "no"],
        help="find the brain in images of whole heads. auto: in those that show a whole head; yes: in all; no: in "
        "none, which then must be skull-stripped; default: auto",
    )


def count(text):
    """The number of an argument that is 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or more")
    return int(text)


def positive(text):
    """The number of an argument that is above 0, such as one of seconds or of mm."""
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return float(text)


def size(text):
    """Bytes of an argument such as 4GB, 500MB or 2.5GiB."""
    found = re.fullmatch(r"(\d+\.?\d*) ?([MG])(i?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 4GB")
    return float(found[1]) * (1024 if found[3] else 1000) ** (2 if found[2] == "M" else 3)


def _warned(message, category, filename, lineno, file=None, line=None):
    ours = issubclass(category, InputWarning)
    text = f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)


def _failed(sentence, status):
    print(sentence, file=sys.stderr)
    return status
