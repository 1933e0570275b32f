"""What the entry points share: a user's mistake ends in one line on stderr and exit status 1."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`absl.app.run` whose flag and config errors are one line each, and libraries are quiet."""
    app.run(main, flags_parser=_parse)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program in one line where what the user asked for is found to be wrong.

    Only for code that checks and reads; a ValueError from training is a fault of ours and keeps
    its traceback.
    """
    try:
        yield
    except (ValueError, KeyError, AttributeError, OSError, ImportError) as error:
        _fail(error)


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"cannot use {' '.join(rest[1:])!r}; flags are --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest
    except Exception as error:
        _fail(error)


def _fail(error):
    if "\n" in str(error):
        while cause := error.__cause__ or error.__context__:
            error = cause
    text = " ".join(str(error).split())
    if misspelt := re.search(r'Did you mean "(.*)" instead of "(.*)"\?', text):
        text = f"no setting {misspelt[2]!r}; did you mean {misspelt[1]!r}?"
    elif isinstance(error, KeyError | AttributeError):
        text = f"no setting {text.strip(chr(39) + chr(34))!r}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)
