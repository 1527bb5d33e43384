"""Keyed sampling on CPU: a compiled kernel finds the few tokens that may win, so that only they need noise in torch."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from rrm_kernels.build import load_library

ROOM = 8  # candidates for each row; nearly always one is found
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64

Leaders = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor | None]


@cache
def load_leaders(variant: str | None = None) -> Leaders:
    """A function that finds in each row the columns that may have the largest score plus noise.

    It takes scores fp32 ``[rows, n]``, token ids int64 of that shape (None: 0, 1, 2 ...) and keys and positions int64
    ``[rows]``, all contiguous on CPU. It returns int64 ``[rows, ROOM]``, columns that may be repeated; None if some row
    holds only -inf, holds NaN, or has too many candidates. ``variant`` and exceptions: as ``load_library``.
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
