"""Recursive reasoning in one process."""
