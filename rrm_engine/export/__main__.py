"""``python -m rrm_engine.export``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.export.cli")
