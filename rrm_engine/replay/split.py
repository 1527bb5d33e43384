"""What made a recorded recursive run faster than the direct one: its graph replayed serially and without reuse."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rrm_engine.errors import RrmError
from rrm_engine.replay.check import check_transcripts
from rrm_engine.replay.driver import Memory, Ours
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.variant import parse_variant

PARALLEL, NO_REUSE, SERIAL = "pin", "no-reuse", "serial+no-reuse"


@dataclass(frozen=True, slots=True)
class Split:
    """Factors of one task's speed-up: ``tokens * parallelism * reuse``, each a ratio of replayed times to answer.

    ``tokens``: direct to the graph run one node at a time without reuse; below 1 the graph is more work.
    ``parallelism``: from that to nodes side by side. ``reuse``: from that to KV kept and prefixes shared.
    """

    task: str
    tokens: float
    parallelism: float
    reuse: float

    @property
    def speedup(self) -> float:
        return self.tokens * self.parallelism * self.reuse


def recorded_pairs(graphs: Sequence[Graph]) -> list[tuple[str, Graph, Graph]]:
    """(task and sample, direct, recursive) of the tasks that were solved in both modes and did split."""
    by_key = {graph.id: graph for graph in graphs}
    found = []
    for key, graph in by_key.items():
        task, mode, sample = key.rsplit("/", 2)
        direct = by_key.get(f"{task}/direct/{sample}")
        if mode == "rrm" and direct is not None and len(graph.nodes) > 1:
            found.append((f"{task}/{sample}", direct, graph))
    return found


def split(
    memory: Memory, graphs: Sequence[Graph], repeats: int, done: Callable[[], None] = lambda: None
) -> list[Split]:
    """The factors of every pair in the recorded ``graphs``; medians over interleaved ``repeats``.

    The first round does not count. Raises RrmError if no task was recorded in both modes with a graph that splits,
    and ReplayMismatch if a replay ends with other tokens than were recorded.
    """
    pairs = recorded_pairs(graphs)
    if not pairs:
        raise RrmError("--split: no task of this run was solved directly and by a graph; record --modes direct,rrm")
    parallel, no_reuse, serial = (Ours(parse_variant(name), memory) for name in (PARALLEL, NO_REUSE, SERIAL))
    splits = []
    for task, direct, graph in pairs:
        runs = [(parallel, direct), (parallel, graph), (no_reuse, graph), (serial, graph)]
        rounds = []
        for _ in range(repeats + 1):
            rounds.append([_answer_s(contender, of, done) for contender, of in runs])
        alone, reusing, without, one_by_one = map(statistics.median, zip(*rounds[1:], strict=True))
        splits.append(Split(task, alone / one_by_one, one_by_one / without, without / reusing))
    return splits


def _answer_s(contender: Ours, graph: Graph, done: Callable[[], None]) -> float:
    replayed = contender.replay(graph)
    check_transcripts(contender.name, contender.variant.graph(graph), replayed.tokens)
    done()
    return replayed.answer_s


def sentence(splits: Sequence[Split]) -> str:
    """The geometric means in words."""
    speedup, tokens, parallelism, reuse = (
        statistics.geometric_mean(getattr(one, name) for one in splits)
        for name in ("speedup", "tokens", "parallelism", "reuse")
    )
    return (
        f"{len(splits)} tasks, {speedup:.2f}x faster than direct = {parallelism:.2f}x by parallelism * {reuse:.2f}x by "
        f"KV reuse * {tokens:.2f}x for the graph's other tokens (geometric means)."
    )
