"""Attention and cache kernels with their torch references."""
