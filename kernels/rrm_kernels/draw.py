"""Keyed sampling on CPU by the compiled kernels: which tokens' noise has to be looked at."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from rrm_kernels.build import load_library

ROOM = 8  # places a row; nearly always one is taken
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64

Leaders = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor | None]


@cache
def load_leaders(variant: str | None = None) -> Leaders:
    """A function that finds the places in each row that may have the largest score plus noise.

    It takes scores fp32 ``[rows, n]``, token ids int64 of that shape (None: 0, 1, 2 ...) and keys and positions int64
    ``[rows]``, all contiguous on CPU, and returns int64 ``[rows, places]``, of which some may be named twice; None
    where rows have nothing but -inf, not-a-numbers or too many alike. ``variant`` and what is raised: as
    ``load_library``.
    """
    function = load_library(variant).rrm_leaders
    function.restype = ctypes.c_bool
    function.argtypes = [*[POINTER] * 5, *[NUMBER] * 3]

    def leaders(
        scores: torch.Tensor, ids: torch.Tensor | None, keys: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor | None:
        rows, count = scores.shape
        places = torch.empty(rows, ROOM, dtype=torch.int64)
        ids_at = None if ids is None else ids.data_ptr()
        given = scores.data_ptr(), ids_at, keys.data_ptr(), positions.data_ptr(), places.data_ptr()
        return places if function(*given, rows, count, ROOM) else None

    return leaders
