"""The sections of gpu_suite.py."""
