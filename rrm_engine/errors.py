"""The one family of errors that are no bugs."""


class RrmError(ValueError):
    """Something was asked for that cannot be done; the message is one sentence that says what to do instead.

    Everything that this package refuses, in Python as on the command line, is an RrmError. Any other exception that
    comes out of it is a bug, or one of the caller's own.
    """


class NoRoom(RrmError):
    """A node's context would be longer than one may be."""
