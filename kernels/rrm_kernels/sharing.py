"""Which sequences of a step share leading KV blocks, and where reading those once for all of them pays."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_SHARED_QUERIES = 8  # a step with longer prefill chunks computes more than it reads; sharing would not help it

Table = Sequence[int] | npt.NDArray[np.integer]
Tables = Sequence[Table]


@dataclass(frozen=True, slots=True)
class SharingCost:
    """When a shared run pays, in tokens whose K and V need not be read again. Estimates, to be measured on the device.

    ``member``: what it costs a member that its result comes in one more part (written, read back, merged).
    ``crossover``: tokens all runs of a step must save together before the additional launches pay.
    """

    member: int = 32
    crossover: int = 4096

    def saved(self, members: int, tokens: int) -> int:
        """Tokens not read, less the members' cost, where ``members`` sequences share a run of ``tokens``."""
        return (members - 1) * tokens - members * self.member


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Blocks ``first`` to ``stop`` of the tables of ``members`` are the same physical blocks."""

    first: int
    stop: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """``private_from[i]``: the leading blocks of sequence i that runs cover; the sequence reads the rest itself."""

    runs: list[SharedRun]
    private_from: list[int]


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


def find_shared_runs(
    tables: Tables,
    lengths: Sequence[int],
    block_size: int,
    cost: SharingCost | None = None,
) -> SharingPlan:
    """The runs of leading blocks worth reading once: a prefix tree over the tables, its dear branches cut.

    ``lengths[i]`` are the leading tokens of sequence i that all its queries see; only full blocks of them are shared,
    so that a run needs no causal mask. Every block of a sequence is in exactly one run or from ``private_from`` on.
    A run that does not pay is left to the longer runs of fewer members below it, or to the members themselves.
    """
    cost = cost or SharingCost()
    usable = [np.asarray(t[: n // block_size]) for t, n in zip(tables, lengths, strict=True)]
    runs: list[SharedRun] = []
    private_from = [0] * len(usable)
    saved = 0
    # Sequences whose first `depth` blocks are equal and of whose blocks those before `start` are in runs.
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
