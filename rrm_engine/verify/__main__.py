"""``python -m rrm_engine.verify``."""

import sys

from rrm_engine.verify.cli import main

sys.exit(main())
