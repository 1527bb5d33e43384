"""Recorded rows as data to train planners on."""
