"""Do variants compute the same? Transcripts must be the graph's, and in fp32 every decode's best logit the same."""

from dataclasses import dataclass

import torch

from rrm_engine.engine.scheduler import Work
from rrm_engine.loading.check import LARGEST
from rrm_engine.replay.graph import Graph

SHOWN = 3


class ReplayMismatch(RuntimeError):
    """A variant computed something else than it had to; its times mean nothing."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best logit of one decode step, its lead over the next one, and the spread of all."""

    token: int
    logit: float
    lead: float
    spread: float

    def differs(self, other: "Best", tolerance: float) -> bool:
        """A tie may be broken either way; anything else has to be the same within ``tolerance`` of the spread."""
        limit = tolerance * self.spread
        return abs(self.logit - other.logit) > limit or (self.token != other.token and self.lead > limit)


Places = dict[tuple[str, int], Best]  # by node and position in its tokens


class Recorder:
    """Observes a ModelRunner and notes the best logit of every row while ``places`` is a dict."""

    def __init__(self) -> None:
        self.places: Places | None = None

    def __call__(self, logits: torch.Tensor, order: list[Work]) -> None:
        if self.places is None or not order:
            return
        values, tokens = logits.float().topk(2, dim=-1)
        spreads = logits.float().std(-1)
        rows = zip(order, tokens[:, 0].tolist(), values.tolist(), spreads.tolist(), strict=True)
        for work, token, (best, second), spread in rows:
            place = work.sequence.key, work.start + work.count
            self.places[place] = Best(token, best, best - second, spread)


def check_transcripts(name: str, graph: Graph, tokens: dict[str, list[int]]) -> None:
    """Raises ReplayMismatch if a node's tokens are not those of the drawn ``graph``."""
    for node in graph.nodes:
        if tokens.get(node) != graph.transcript(node):
            raise ReplayMismatch(f"{name}: {node} of graph {graph.id} did not end with the graph's tokens")


def exact_places(places: Places, graph: Graph) -> Places:
    """Those in front of which no KV is attached where children's is."""
    return {place: best for place, best in places.items() if place[1] <= graph.exact(place[0])}


def check_logits(name: str, graph: Graph, found: Places, expected: Places) -> None:
    """Raises ReplayMismatch if fp32 logits of ``found`` are not those ``expected``."""
    if found.keys() != expected.keys():
        raise ReplayMismatch(f"{name}: graph {graph.id} was not decoded at the places where the reference decoded")
    tolerance = LARGEST[torch.float32]
    wrong = [place for place, best in expected.items() if best.differs(found[place], tolerance)]
    if wrong:
        some = ", ".join(f"{node} at token {position}" for node, position in sorted(wrong)[:SHOWN])
        raise ReplayMismatch(
            f"{name}: graph {graph.id} has other logits than the reference in {len(wrong)} of {len(expected)} decode "
            f"steps ({some}): its KV is wrong"
        )
