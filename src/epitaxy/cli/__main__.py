"""``python -m epitaxy.cli``."""

import sys

from epitaxy.cli import main

sys.exit(main())
