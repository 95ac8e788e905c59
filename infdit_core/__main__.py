"""`python -m infdit_core`, also installed as `infdit`; the commands are those of `cli.parser`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from .cli.common import UsageError
from .cli.parser import build_parser
from .errors import InfDiTError
from .memory.adaptive import is_out_of_memory

USER_ERROR, INTERRUPTED, PIPE_CLOSED = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        the exit status: 0 for success, 1 for an error that the user can mend, 130 if interrupted,
        141 if nobody reads the output.

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
    except BrokenPipeError:  # whoever read our output has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return _report(parser.prog, "interrupted", INTERRUPTED)
    except UsageError as error:
        parser.error(str(error))
    except Exception as error:
        mendable = isinstance(error, InfDiTError | OSError | ImportError)
        if args.debug or not (mendable or is_out_of_memory(error)):
            raise  # with its traceback: a bug of ours must look like one
        return _report(parser.prog, f"error: {error}", USER_ERROR)


def _report(program: str, message: str, status: int) -> int:
    sys.stderr.write(f"{program}: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
