"""``python -m rrm_engine.trace``."""

import sys

from rrm_engine.trace.cli import main

sys.exit(main())
