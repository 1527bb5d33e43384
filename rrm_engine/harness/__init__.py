"""This package's solvers inside of other people's evaluation harnesses."""
