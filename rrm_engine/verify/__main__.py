"""``python -m rrm_engine.verify``."""

from rrm_engine.command import run

if __name__ == "__main__":
    run("rrm_engine.verify.cli")
