"""What replays a graph, and what it says of it; nothing here needs a model."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from rrm_engine.replay.graph import Graph
from rrm_engine.replay.walk import Command, Resume


@dataclass(slots=True)
class Replayed:
    """One replay. Times in seconds; of the counters those that a contender does not know are None."""

    answer_s: float  # from the first submit to the last token of the last root
    resume_s: list[float]  # from the last token of the last one awaited to the node's next token; one per resume
    steps: int | None = None
    prefilled: int | None = None  # tokens run that were not sampled in the step before
    reused: int | None = None  # tokens whose KV was there already: prefix cache or fork
    attached: int | None = None  # tokens whose KV was attached: what follows them is approximate
    copied_blocks: int | None = None  # copy-on-write
    offloaded_blocks: int | None = None
    restored_blocks: int | None = None
    preemptions: int | None = None  # times memory ran out and a sequence lost its place or its KV
    peak_blocks: int | None = None
    peak_host_blocks: int | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)  # every node's transcript
    sampled: dict[str, list[int]] = field(default_factory=dict)  # what the model would have written


class Contender(Protocol):
    """Replays a graph in its own way; ``graph`` is drawn."""

    name: str

    def replay(self, graph: Graph) -> Replayed: ...


class Clock:
    """When the answer was there, and how long resumes took."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.answer_s: float | None = None
        self.resume_s: list[float] = []
        self._resumed: dict[str, float] = {}

    def token(self, node: str, now: float) -> None:
        """``node`` has a new token."""
        if (since := self._resumed.pop(node, None)) is not None:
            self.resume_s.append(now - since)

    def commands(self, commands: list[Command], answered: bool, now: float) -> None:
        """What followed from a token that came at ``now``."""
        self._resumed |= {command.node: now for command in commands if isinstance(command, Resume)}
        if answered and self.answer_s is None:
            self.answer_s = now - self.began
