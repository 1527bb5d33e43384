"""The run directory: manifest, rows, typed events, and one reader of them. ``load`` gives them as data frames."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rrm_engine.runs.frames import Frames

__all__ = ["load"]


def load(*directories: "str | PathLike[str]", tokens: bool = False) -> "Frames":
    """Recorded runs as pandas data frames: see `rrm_engine.runs.frames.Frames`.

    With ``tokens`` the nodes have the ids of their tokens, which are most of a run's bytes. Raises RrmError for a
    directory that holds no run, and where pandas is missing.
    """
    from rrm_engine.runs import frames

    return frames.load(directories, tokens)
