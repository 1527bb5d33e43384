"""What a step's attention is given, whichever backend computes it: one ragged batch, and how scores are made."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from rrm_kernels.sharing import SharingCost
from rrm_kernels.staging import Arrays, Staging

INT = torch.int32


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most a step may hold. Launch grids are sized by it, so a launch can be captured once and replayed."""

    seqs: int
    tokens: int
    queries: int  # query tokens of one sequence
    blocks: int  # of one sequence
    pieces: int = 0  # of shared runs
    members: int = 0  # query tokens of all shared runs together
    run_members: int = 0  # query tokens of one shared run
    partials: int = 0  # pieces that cover one query token

    def holds(self, step: "Capacity") -> bool:
        return all(wanted <= most for wanted, most in zip(asdict(step).values(), asdict(self).values(), strict=True))

    def arrays(self) -> Arrays:
        """What a batch needs of a ``Staging``; the block table last, for it is uploaded as far as it is live."""
        return {
            "slots": ((self.tokens,), torch.int64),
            "num_seqs": ((1,), INT),
            "num_pieces": ((1,), INT),
            "query_start": ((self.seqs + 1,), INT),
            "context_len": ((self.seqs,), INT),
            "context_start": ((self.seqs + 1,), INT),
            "first_key": ((self.seqs,), INT),
            "pieces": ((self.pieces, 6), INT),
            "members": ((self.members,), INT),
            "block_table": ((self.seqs, self.blocks), INT),
        }


@dataclass(slots=True)
class PagedBatch:
    """A step's tokens side by side, prefill chunks and decodes alike, and what each of them attends to.

    Sequence i has the packed query tokens ``query_start[i]`` to ``query_start[i + 1]``, the last of its context. Their
    keys and values go to ``slots`` int64 ``[tokens]``; padding has a negative one.

    All others int32 on the device: ``num_seqs`` ``[1]``, ``query_start`` ``[seqs + 1]``, ``context_len`` ``[seqs]``
    (its query tokens included), ``context_start`` ``[seqs + 1]`` (their sums), ``first_key`` ``[seqs]`` (keys before it
    are in shared runs), ``block_table`` ``[seqs, blocks]``. After the live sequences there are empty ones: no queries,
    no context. ``pieces`` ``[pieces, 6]`` of shared runs: first member, members, sequence whose table to read, first
    key, stop key, partial result to write. ``members`` ``[members]`` are packed query tokens. ``num_pieces`` ``[1]``.

    ``query_lens`` and ``context_lens`` are the live sequences' on the host. What is captured and replayed must not
    depend on them, nor on anything but ``capacity`` and the device's buffers.
    """

    capacity: Capacity  # of the launches; the buffers may hold more
    block_size: int
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    longest: int  # no token's position is this or more
    staging: Staging
    slots: torch.Tensor
    num_seqs: torch.Tensor
    num_pieces: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    context_start: torch.Tensor
    first_key: torch.Tensor
    pieces: torch.Tensor
    members: torch.Tensor
    block_table: torch.Tensor
    decodes: int = 0  # sequences at the front with one query token each
    derived: dict[Any, Any] = field(default_factory=dict)  # what a backend has made of it, for all layers

    @classmethod
    def over(
        cls,
        staging: Staging,
        capacity: Capacity,
        block_size: int,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        *,
        rows: int,
        longest: int,
    ) -> "PagedBatch":
        """A batch of that many packed ``rows`` in a staging area that has a capacity's ``arrays``."""
        there = staging.device
        decodes = next((i for i, queries in enumerate(query_lens) if queries != 1), len(query_lens))
        arrays = {name: there[name] for name in capacity.arrays()} | {"slots": there["slots"][:rows]}
        lens = query_lens, context_lens
        return cls(capacity, block_size, *lens, longest, staging, **arrays, decodes=decodes)  # type: ignore[arg-type]

    def on(self, device: torch.device, move: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> "PagedBatch":
        """What is there now, on another device; ``move`` brings a tensor there."""
        there = self.staging.on(device, move)
        lens = self.query_lens, self.context_lens
        return PagedBatch.over(there, self.capacity, self.block_size, *lens, rows=len(self.slots), longest=self.longest)


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's scores are made: products times ``scale``, with a ``window`` of keys less than so many tokens back.

    ``softcap`` is tanh capping, ``sinks`` ``[query heads]`` one extra score a head that takes part in the softmax and
    adds no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def fp32_sinks(self) -> torch.Tensor | None:
        """``sinks`` as kernels read them."""
        return None if self.sinks is None else self.sinks.float().contiguous()


class PagedAttention(Protocol):
    """An attention backend: causal grouped-query attention of packed queries over their sequences' blocks.

    What it can do beyond that it says in the attributes.
    """

    name: str = "custom"  # what ``--attention`` calls it
    block_multiple: int = 1  # tokens that KV blocks must be a multiple of
    capturable: bool = False  # launches depend on the batch's capacity and device buffers alone, and may be replayed
    sharing: SharingCost | None = None  # when it reads what several sequences share once for all; None: never

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        """``query`` is ``[tokens, query heads, width]``; the result ``[tokens, query heads, value width]``.

        Caches are ``[blocks, block_size, kv heads, width]``; K and V may differ in width. A token at position i attends
        to positions j <= i, with a window to j > i - window.
        """
        ...
