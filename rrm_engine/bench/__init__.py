"""Tasks, grading, the run loop and the command line ``python -m rrm_engine.bench``."""
