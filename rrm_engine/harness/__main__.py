"""``python -m rrm_engine.harness``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.harness.cli")
