"""`python -m fastcure` is the command `fastcure`."""

import sys

from fastcure.cli import main

sys.exit(main())
