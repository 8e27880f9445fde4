"""`python -m cl_fast` is the command `cl-fast`."""

import sys

from cl_fast.cli import main

sys.exit(main())
