"""``python -m mythoslab`` is the command ``mythoslab``."""

import sys

from .cli import main

sys.exit(main())
