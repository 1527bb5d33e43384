"""``python -m rrm_engine.bench``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.bench.cli", kept=True)
