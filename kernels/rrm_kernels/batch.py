"""The inputs of attention, the same for every backend: one ragged batch per step, and how scores are computed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from rrm_kernels.sharing import SharingCost
from rrm_kernels.staging import Arrays, Staging

INT = torch.int32


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest step that buffers or launches are made for. Launch grids depend on it alone, so that a launch can be
    captured once and replayed.
    """

    seqs: int
    tokens: int
    queries: int  # query tokens of one sequence
    blocks: int  # of one sequence
    pieces: int = 0  # parts of shared runs (see sharing.py) that are attended one by one
    members: int = 0  # query tokens of all shared runs together
    run_members: int = 0  # query tokens of one shared run
    partials: int = 0  # pieces that one query token attends to

    def holds(self, step: "Capacity") -> bool:
        return all(wanted <= most for wanted, most in zip(asdict(step).values(), asdict(self).values(), strict=True))

    def arrays(self) -> Arrays:
        """The arrays of a batch in a ``Staging``. The block table is last, because only its live rows are uploaded."""
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
    """A step's packed tokens, of prefill chunks and decodes alike, and what each of them attends to.

    Sequence i has the packed query tokens ``query_start[i]`` to ``query_start[i + 1]``, the last ones of its context.
    Their keys and values go to ``slots`` int64 ``[tokens]``; padding has a negative slot.

    All others are int32 on the device: ``num_seqs`` ``[1]``, ``query_start`` ``[seqs + 1]``, ``context_len`` ``[seqs]``
    (with the query tokens), ``context_start`` ``[seqs + 1]`` (cumulative sums of these), ``first_key`` ``[seqs]`` (keys
    before it are covered by shared runs), ``block_table`` ``[seqs, blocks]``. After the live sequences there are empty
    ones, without queries or context. ``pieces`` ``[pieces, 6]`` of shared runs have the columns: first member, number
    of members, sequence whose table to read, first key, stop key, number of the partial result to write. ``members``
    ``[members]`` are indices of packed query tokens. ``num_pieces`` ``[1]``.

    ``query_lens`` and ``context_lens`` are those of the live sequences, on the host. Work that is captured and replayed
    must not depend on them, only on ``capacity`` and the device's buffers.
    """

    capacity: Capacity  # of kernel launches; the buffers may be larger
    block_size: int
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    longest: int  # every token's position is less
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
    decodes: int = 0  # how many sequences at the beginning have one query token each
    derived: dict[Any, Any] = field(default_factory=dict)  # what a backend has computed from it once for all layers

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
        """A batch of ``rows`` packed tokens over a staging area that has the arrays of a capacity."""
        there = staging.device
        decodes = next((i for i, queries in enumerate(query_lens) if queries != 1), len(query_lens))
        arrays = {name: there[name] for name in capacity.arrays()} | {"slots": there["slots"][:rows]}
        lens = query_lens, context_lens
        return cls(capacity, block_size, *lens, longest, staging, **arrays, decodes=decodes)  # type: ignore[arg-type]

    def on(self, device: torch.device, move: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> "PagedBatch":
        """The batch on another device, to which ``move`` copies a tensor."""
        there = self.staging.on(device, move)
        lens = self.query_lens, self.context_lens
        return PagedBatch.over(there, self.capacity, self.block_size, *lens, rows=len(self.slots), longest=self.longest)


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer computes scores: q . k times ``scale``. With ``window`` a token attends to that many, itself
    included.

    ``softcap``: scores become ``softcap * tanh(score / softcap)``. ``sinks`` ``[query heads]``: one extra score for
    each head that takes part in the softmax, with a value of zero.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def fp32_sinks(self) -> torch.Tensor | None:
        """``sinks`` as kernels read them: fp32 and contiguous."""
        return None if self.sinks is None else self.sinks.float().contiguous()


class PagedAttention(Protocol):
    """An attention backend: causal grouped-query attention of packed queries over their sequences' blocks.

    The attributes declare what it requires and what else it can do.
    """

    name: str = "custom"  # what ``--attention`` calls it
    block_multiple: int = 1  # the block size must be a multiple of this many tokens
    capturable: bool = False  # may be captured and replayed: it depends on capacity and device buffers alone
    sharing: SharingCost | None = None  # when blocks that several sequences share are read once for all; None: never

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        """``query`` is ``[tokens, query heads, width]``; the result ``[tokens, query heads, value width]``.

        Caches are ``[blocks, block_size, kv heads, width]``; K and V may differ in width. A token at position i attends
        to positions j <= i, with a window to j > i - window.
        """
        ...
