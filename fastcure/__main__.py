"""`python -m fastcure` is the command `fastcure`."""

from fastcure.cli import entry

entry()
