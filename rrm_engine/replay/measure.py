"""Every contender on every graph, in turns, so that a drift of the machine hits all; medians over the repeats."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter
from typing import Any

from rrm_engine.replay.check import Places, check_logits, check_transcripts, exact_places
from rrm_engine.replay.contender import Contender, Replayed
from rrm_engine.replay.driver import Memory, Ours
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.variant import Variant

NOT_COUNTERS = ("answer_s", "resume_s", "tokens", "sampled")
COUNTERS = tuple(f.name for f in fields(Replayed) if f.name not in NOT_COUNTERS)


@dataclass(slots=True)
class Row:
    """One contender on one graph: seconds of every repeat, counters of the last."""

    graph: str
    name: str
    kv_blocks: int | None  # the pool it had
    answer_s: list[float] = field(default_factory=list)
    resume_s: list[list[float]] = field(default_factory=list)
    counters: dict[str, int | None] = field(default_factory=dict)

    def add(self, replayed: Replayed) -> None:
        self.answer_s.append(replayed.answer_s)
        self.resume_s.append(replayed.resume_s)
        self.counters = {name: getattr(replayed, name) for name in COUNTERS}


def measure(
    contenders: Sequence[Contender],
    graphs: Sequence[Graph],
    repeats: int,
    done: Callable[[], None] = lambda: None,
    until: float = math.inf,
) -> list[Row]:
    """``repeats`` rounds of every contender on every drawn graph; ``done`` is called after each replay.

    Before them every variant replays the smallest graph, which does not count. After the first round none is begun
    that, if it takes as long as the longest one, would not have ended by ``until`` on ``perf_counter``'s clock.

    Raises ReplayMismatch if one of ours ends with other tokens than the graph's.
    """
    rows = {(g.id, c.name): Row(g.id, c.name, _pool(c, g)) for g in graphs for c in contenders}
    gc.collect()
    gc.freeze()  # models and modules are never rubbish: what is left to look through is small
    try:
        smallest = min(graphs, key=lambda graph: sum(map(graph.length, graph.nodes)))
        for contender in contenders:
            _replay(contender, smallest, done)
        longest = 0.0
        for turn in range(repeats):
            began = perf_counter()
            if turn and began + longest > until:
                break
            first = (turn + 1) % len(contenders)
            for graph in graphs:
                for contender in [*contenders[first:], *contenders[:first]]:
                    rows[graph.id, contender.name].add(_replay(contender, graph, done))
            longest = max(longest, perf_counter() - began)
    finally:
        gc.unfreeze()
    return list(rows.values())


def check(
    memory: Memory, variants: Sequence[Variant], graphs: Sequence[Graph], done: Callable[[], None] = lambda: None
) -> int:
    """Compare every variant's logits with those of pin on the same tokens; returns the decode steps compared.

    Those after attached KV are approximate and left out. The model has to be in fp32. Raises ReplayMismatch.
    """
    compared = 0
    for graph in graphs:
        references: dict[str, Places] = {}
        for variant in variants:
            reference = variant.reference
            if reference.name not in references:
                references[reference.name] = best_logits(memory, reference, graph)
            found, expected = best_logits(memory, variant, graph), references[reference.name]
            if variant.attach:
                found, expected = (exact_places(places, variant.graph(graph)) for places in (found, expected))
            check_logits(variant.name, graph, found, expected)
            compared += len(found)
            done()
    return compared


def _replay(contender: Contender, graph: Graph, done: Callable[[], None]) -> Replayed:
    gc.collect()
    replayed = contender.replay(graph)
    if isinstance(contender, Ours):
        check_transcripts(contender.name, contender.variant.graph(graph), replayed.tokens)
    done()
    return replayed


def best_logits(memory: Memory, variant: Variant, graph: Graph) -> Places:
    """The best logit of every decode step of ``variant`` on the drawn ``graph``. Raises ReplayMismatch on tokens."""
    memory.spoil()
    memory.recorder.places = {}
    try:
        replayed = Ours(variant, memory).replay(graph)
        places = memory.recorder.places
    finally:
        memory.recorder.places = None
    check_transcripts(variant.name, variant.graph(graph), replayed.tokens)
    return {place: best for place, best in places.items() if place[0] in graph.nodes}


def limit_pools(memory: Memory, graphs: Sequence[Graph], share: float) -> None:
    """Give every graph ``share`` of the blocks that pin takes when there are plenty."""
    for graph in graphs:
        memory.limits.pop(graph.id, None)
        peak = Ours(Variant("pin"), memory).replay(graph).peak_blocks
        assert peak is not None
        memory.limits[graph.id] = math.ceil(share * peak)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per contender over all graphs. Times are means over the graphs of medians over the repeats.

    ``ratio`` is its time to answer over that of the first contender: the geometric mean over the graphs of the median
    over the rounds. ``resume_worst_s`` is each graph's slowest resume, taken and averaged in the same way.
    """
    first = {row.graph: row for row in rows if row.name == rows[0].name}
    summary = []
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        ratios = [_ratio(row.answer_s, first[row.graph].answer_s) for row in own]
        resuming = [row for row in own if any(row.resume_s)]
        resumes = [
            _ratio(list(map(statistics.median, row.resume_s)), list(map(statistics.median, first[row.graph].resume_s)))
            for row in resuming
        ]
        entry: dict[str, Any] = {
            "name": name,
            "answer_s": statistics.mean(statistics.median(row.answer_s) for row in own),
            "ratio": statistics.geometric_mean(ratios),
            "resume_s": _mean(statistics.median(s for turn in row.resume_s for s in turn) for row in resuming),
            "resume_ratio": statistics.geometric_mean(resumes) if resumes else None,
            "approximate": any(row.counters["attached"] for row in own),
            "resume_worst_s": _mean(statistics.median(max(turn) for turn in row.resume_s) for row in resuming),
        }
        for counter in COUNTERS:
            values = [row.counters[counter] for row in own]
            known = [value for value in values if value is not None]
            combine = max if counter.startswith("peak") else sum
            entry[counter] = combine(known) if len(known) == len(values) else None
        summary.append(entry)
    return summary


def describe(graph: Graph) -> dict[str, Any]:
    """A graph in figures."""
    nodes = graph.nodes
    return {
        "id": graph.id,
        "nodes": len(nodes),
        "max_depth": max(map(graph.depth, nodes)),
        "tokens": sum(map(graph.length, nodes)),
        "decoded": sum(node.decoded for node in nodes.values()),
        "critical_path_tokens": graph.critical_path(),
        "longest_node": max(map(graph.length, nodes)),
    }


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a result file."""
    return [asdict(row) for row in rows]


def _pool(contender: Contender, graph: Graph) -> int | None:
    return contender.memory.pool_blocks(contender.variant.graph(graph)) if isinstance(contender, Ours) else None


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def _mean(values: Any) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None
