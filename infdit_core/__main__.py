"""`python -m infdit_core` (also installed as `infdit`): upscale, convert and inspect."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from torch import OutOfMemoryError

from .cli import build_parser
from .commands import UsageError

USER_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        the exit status: 0 for success, 1 for an error that the user can mend, 130 if interrupted.

    Raises:
        SystemExit: with 2 for arguments that make no sense, with 0 after --help.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A file name that the terminal cannot show must not fail a finished picture.
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=f"{parser.prog}: %(message)s")
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return _report(parser.prog, "interrupted", INTERRUPTED)
    except UsageError as error:
        parser.error(str(error))
    # Every module reports what a user can mend by a ValueError; OSError is the file system's.
    except (ValueError, OSError, ImportError, OutOfMemoryError) as error:
        if args.debug:
            raise
        return _report(parser.prog, f"error: {error}", USER_ERROR)


def _report(program: str, message: str, status: int) -> int:
    sys.stderr.write(f"{program}: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
