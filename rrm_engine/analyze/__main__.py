"""``python -m rrm_engine.analyze``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.analyze.cli")
