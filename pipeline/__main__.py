"""Lets `python -m pipeline` be the same as `exit-heads`."""

import sys

from .cli import main

sys.exit(main())
