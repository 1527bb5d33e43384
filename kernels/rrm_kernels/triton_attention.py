"""``paged_attention`` on the Triton kernels: metadata and shared runs of a step, made once for all its layers.

Importable without triton; ``load_triton`` says what is missing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from rrm_kernels.metadata import RaggedMetadata, Tables
from rrm_kernels.reference import PagedBatch, Scores
from rrm_kernels.sharing import SharingCost, SharingPlan, find_shared_runs

if TYPE_CHECKING:
    from rrm_kernels.triton_layer import TritonLayer

MAX_SHARED_QUERIES = 8  # a step with longer prefill chunks computes more than it reads; sharing would not help it


class TritonUnavailable(RuntimeError):
    """The kernels cannot run here; the message says what to install or to use."""


class TritonAttention:
    """As ``reference.paged_attention``. ``sharing`` decides where shared-prefix attention pays; None: never.

    ``name`` says in words what it is. It takes a step as a whole (``ragged``), and its launches depend on nothing but
    the metadata's capacity (``capturable``).
    """

    ragged = True
    capturable = True

    def __init__(
        self, kernel: Callable[..., torch.Tensor], sharing: SharingCost | None, name: str = "Triton kernels"
    ) -> None:
        self._kernel = kernel
        self.sharing = sharing
        self.name = name

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        if batch.ragged is None:
            batch.ragged = describe(batch, key_cache.shape[1], query.device, self.sharing)
        query = query if query.stride(-1) == 1 else query.contiguous()
        return self._kernel(query, key_cache, value_cache, batch.ragged, scores)


def plan_sharing(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tables,
    block_size: int,
    cost: SharingCost | None,
) -> SharingPlan | None:
    """The shared runs of a step, or None where no ``cost`` is given or its chunks are too long for any to pay."""
    if cost is None or len(tables) < 2 or max(query_lens) > MAX_SHARED_QUERIES:
        return None
    seen = [context - queries for context, queries in zip(context_lens, query_lens, strict=True)]
    return find_shared_runs(tables, seen, block_size, cost)


def describe(
    batch: PagedBatch, block_size: int, device: torch.device, sharing: SharingCost | None = None
) -> RaggedMetadata:
    """The metadata of a step that was packed for other backends; reads it back from the device if that is all there is.

    The engine's steps come with their metadata; this is for calling a kernel with a batch of one's own.
    """
    batch = batch.host or batch
    tables: list[npt.NDArray[np.integer]] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    for group in batch.groups:
        query_lens += [1] * (group.stop - group.start)
        context_lens += group.lengths.tolist()
        tables += list(group.tables.cpu().numpy())
    for chunk in batch.chunks:
        query_lens.append(chunk.stop - chunk.start)
        context_lens.append(chunk.length)
        tables.append(chunk.table.cpu().numpy())
    tables = [table[: -(-length // block_size)] for table, length in zip(tables, context_lens, strict=True)]
    plan = plan_sharing(query_lens, context_lens, tables, block_size, sharing)
    return RaggedMetadata.of(query_lens, context_lens, tables, block_size, device, plan)


def load_triton(device: torch.device, sharing: SharingCost | None = None) -> TritonAttention:
    """The kernels for ``device``; shared runs by the estimated ``SharingCost`` if none is given.

    Raises TritonUnavailable with the reason.
    """
    interpreted = _check_triton(device)
    from rrm_kernels.ragged import ragged_attention

    name = "Triton kernels, interpreted" if interpreted else "Triton kernels"
    return TritonAttention(ragged_attention, sharing or SharingCost(), name)


def load_triton_layer(device: torch.device) -> "TritonLayer":
    """What lies between a layer's products. Raises TritonUnavailable with the reason."""
    _check_triton(device)
    from rrm_kernels.triton_layer import TritonLayer

    return TritonLayer()


def _check_triton(device: torch.device) -> bool:
    """Whether Triton runs on ``device`` in its interpreter. Raises TritonUnavailable if it does not run at all."""
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
