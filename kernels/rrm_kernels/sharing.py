"""Which sequences of a step share leading KV blocks, and where it pays to read these once for all of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SHARED_QUERIES = 8  # steps with longer prefill chunks are bound by computing, not by reading, so sharing is no gain

Table = Sequence[int] | npt.NDArray[np.integer]
Tables = Sequence[Table]


@dataclass(frozen=True, slots=True)
class SharingCost:
    """When a shared run pays, in tokens whose K and V need not be read again. Estimates, to be measured on the device.

    ``member``: cost for each member of writing, reading and merging one more partial result.
    ``crossover``: tokens that all runs of a step must save together to pay for the additional launches.
    """

    member: int = 32
    crossover: int = 4096

    def saved(self, members: int, tokens: int) -> int:
        """Tokens saved, minus the cost, if ``members`` sequences share a run of ``tokens``."""
        return (members - 1) * tokens - members * self.member


@dataclass(frozen=True, slots=True)
class SharedRun:
    """The tables of ``members`` have the same physical blocks at indices ``first`` to ``stop``."""

    first: int
    stop: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """``private_from[i]``: how many leading blocks of sequence i are in ``runs``; it reads the others itself."""

    runs: list[SharedRun]
    private_from: list[int]


def plan_sharing(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tables,
    block_size: int,
    cost: SharingCost | None,
) -> SharingPlan | None:
    """The shared runs of a step; None if there is no ``cost``, or the chunks are too long for sharing to pay."""
    if cost is None or len(tables) < 2 or max(query_lens) > MAX_SHARED_QUERIES:
        return None
    seen = [context - queries for context, queries in zip(context_lens, query_lens, strict=True)]
    return find_shared_runs(tables, seen, block_size, cost)


def find_shared_runs(
    tables: Tables,
    lengths: Sequence[int],
    block_size: int,
    cost: SharingCost | None = None,
) -> SharingPlan:
    """The runs of leading blocks worth reading once: the nodes of a prefix tree over the tables that pay.

    ``lengths[i]``: how many leading tokens of sequence i all its queries attend to. Only full blocks of these are
    shared, so that a run needs no causal mask. Each block of a sequence is either in exactly one run, or at
    ``private_from`` or later. A run that does not pay is merged into runs of fewer members further down the tree, or is
    read by the members themselves.
    """
    cost = cost or SharingCost()
    usable = [np.asarray(t[: n // block_size]) for t, n in zip(tables, lengths, strict=True)]
    runs: list[SharedRun] = []
    private_from = [0] * len(usable)
    saved = 0
    # (start, depth, sequences): their first `depth` blocks are equal, and those before `start` are in runs already.
    open_nodes: list[tuple[int, int, list[int]]] = [(0, 0, list(range(len(usable))))]
    while open_nodes:
        start, depth, candidates = open_nodes.pop()
        for members in _split(usable, depth, candidates):
            stop = _common(usable, depth, members)
            gain = cost.saved(len(members), (stop - start) * block_size)
            if gain > 0:
                saved += gain
                runs.append(SharedRun(start, stop, tuple(members)))
                for member in members:
                    private_from[member] = stop
            open_nodes.append((stop if gain > 0 else start, stop, members))
    if saved < cost.crossover:
        return SharingPlan([], [0] * len(usable))
    return SharingPlan(runs, private_from)


def _split(tables: list[npt.NDArray[np.integer]], depth: int, candidates: list[int]) -> list[list[int]]:
    """Groups of at least two candidates whose block at ``depth`` is the same."""
    groups = defaultdict(list)
    for i in candidates:
        if len(tables[i]) > depth:
            groups[int(tables[i][depth])].append(i)
    return [members for members in groups.values() if len(members) > 1]


def _common(tables: list[npt.NDArray[np.integer]], depth: int, members: list[int]) -> int:
    """How many leading blocks all members share, given that they share the first ``depth``."""
    shortest = min(len(tables[i]) for i in members)
    rows = np.stack([tables[i][depth:shortest] for i in members])
    differs = (rows != rows[0]).any(0)
    return depth + int(differs.argmax()) if differs.any() else shortest
