"""What is said of a run that cannot be used."""

from rrm_engine.errors import RrmError


class RunError(RrmError):
    """A recorded run cannot be read; the message is one sentence for the user."""
