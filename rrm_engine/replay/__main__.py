"""``python -m rrm_engine.replay``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.replay.cli")
