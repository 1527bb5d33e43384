"""``python -m rrm_engine.bench``."""

import sys

from rrm_engine.bench.cli import main

sys.exit(main())
