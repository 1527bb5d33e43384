"""One node of a job: its handle, which has its text, and what the run keeps besides."""

from dataclasses import dataclass, field

from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.parser import EventParser
from rrm_engine.solver.backend import NodeHandle, Place
from rrm_engine.solver.metering import Chain


@dataclass(slots=True)
class NodeRun:
    """A node that was opened. ``turn`` counts its resumes. ``forks``: by child, the place where a fork of this node's
    context ends, and the chain up to there.
    """

    path: NodePath
    handle: NodeHandle
    phase: Phase
    parser: EventParser | None
    running: bool = True
    turn: int = 0
    events: list[tuple[int, int]] = field(default_factory=list)  # (start, stop) of each in the phase's text
    forks: dict[str, tuple[Place | None, Chain]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)  # why it stopped decoding, each time
    phases: list[Phase] = field(default_factory=list)  # the phase that it stopped in, each time

    @property
    def boundary(self) -> int:
        """The end of the last event in the phase's text."""
        return self.events[-1][1]

    def enter(self, phase: Phase, parser: EventParser) -> None:
        """Begin another phase."""
        self.phase, self.parser, self.running, self.turn = phase, parser, True, self.turn + 1
        self.events = []

    def text(self, end: int | None = None) -> str:
        """The phase's text up to ``end``, without events."""
        whole = self.handle.text[:end]
        parts, last = [], 0
        for start, stop in self.events:
            parts.append(whole[last:start])
            last = stop
        return "".join([*parts, whole[last:]])
