"""The command line as a process of its own: its streams, and the status with which it ends."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

import fastcure.cli

CLOSED_PIPE = 141
"""What a shell reports of a process that SIGPIPE ended."""


def entry() -> NoReturn:
    """Run the command line as a process of its own, and end it with the right status.

    Under torchrun the process skips the interpreter's clean-up, in which torch's threads sometimes abort it: torchrun
    would then end the other processes and report a failure.
    """
    _open_streams()
    torchrun, status = "TORCHELASTIC_RUN_ID" in os.environ, 1
    try:
        status = fastcure.cli.main()
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    except BaseException:
        if not torchrun:
            raise
        sys.excepthook(*sys.exc_info())
    status = _flush_streams(said=status != 0) or status
    if not torchrun:
        sys.exit(status)
    logging.shutdown()
    os._exit(status)


def _open_streams() -> None:
    """Give the process those of its three streams that the caller has closed (`2>&-`).

    Otherwise the next file to be opened takes the number of the stream, and what libraries print goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be UTF-8; who reads a pipe sees each line at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


def _flush_streams(said: bool) -> int:
    """Write what is still in the streams; return a status other than 0 where that fails, and let nothing fail later.

    Args:
        said: whether an error has been printed: what a line could not be written for is not said again.
    """
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # as of `| head`
            status = CLOSED_PIPE
        except (OSError, ValueError) as error:
            status = 2 if said else fail(error, 2)
        else:
            continue
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def fail(error: BaseException, status: int) -> int:
    """Print an error as one line; return `status`."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    text = text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"
    with suppress(OSError, ValueError):  # of a closed stream
        print(f"fastcure: error: {text}", file=sys.stderr)
    return status
