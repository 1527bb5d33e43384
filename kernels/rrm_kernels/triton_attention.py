"""Attention on the Triton kernels. Importable without triton; ``load_triton`` says what is missing."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rrm_kernels.batch import PagedAttention, PagedBatch, Scores
from rrm_kernels.sharing import SharingCost

if TYPE_CHECKING:
    from rrm_kernels.triton_layer import TritonLayer


class TritonUnavailable(RuntimeError):
    """The kernels cannot run here; the message says what to install or to use."""


class TritonAttention(PagedAttention):
    """``sharing`` decides where shared-prefix attention pays; None: never. ``interpreted``: in Triton's slow
    interpreter, without a GPU.
    """

    name = "triton"
    capturable = True

    def __init__(
        self, kernel: Callable[..., torch.Tensor], sharing: SharingCost | None, interpreted: bool = False
    ) -> None:
        self._kernel = kernel
        self.sharing = sharing
        self.interpreted = interpreted

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        query = query if query.stride(-1) == 1 else query.contiguous()
        return self._kernel(query, key_cache, value_cache, batch, scores)


def load_triton(device: torch.device, sharing: SharingCost | None = None) -> TritonAttention:
    """The kernels for ``device``. ``sharing`` defaults to the estimated ``SharingCost``.

    Raises TritonUnavailable with the reason.
    """
    interpreted = _check_triton(device)
    from rrm_kernels.ragged import ragged_attention

    return TritonAttention(ragged_attention, sharing or SharingCost(), interpreted)


def load_triton_layer(device: torch.device) -> "TritonLayer":
    """A layer's operations between its matrix products. Raises TritonUnavailable with the reason."""
    _check_triton(device)
    from rrm_kernels.triton_layer import TritonLayer

    return TritonLayer()


def _check_triton(device: torch.device) -> bool:
    """Whether Triton runs in its interpreter. Raises TritonUnavailable if it cannot run on ``device`` at all."""
    try:
        from rrm_kernels.ragged import ragged_attention  # noqa: F401
        from rrm_kernels.tile import INTERPRETED
    except ImportError as error:
        raise TritonUnavailable(f"triton cannot be imported ({error}); pip install triton") from error
    if device.type != "cuda" and not INTERPRETED:
        raise TritonUnavailable(
            f"its kernels run on CUDA, not on {device} (unless TRITON_INTERPRET=1 is set, for the slow interpreter)"
        )
    return bool(INTERPRETED)
