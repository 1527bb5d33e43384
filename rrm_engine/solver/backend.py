"""The seam between a task's run and what decodes for it: what the run asks for, and what it is told.

A run opens nodes, reads what they write as it comes, has one stop after a place in its text, lets it go on with what
the user says next, and ends it. How text becomes tokens, what happens to the KV of a node that waits, and where it is
computed, is the backend's own affair.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import Conclusion, EndReason, Phase
from rrm_engine.protocol.thinking import Marks
from rrm_engine.runs.events import Transcript

Grammar = tuple[int, bool]  # children the node has had, whether it may split
Place = object  # in a node's context; only the backend that gave it looks inside


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do beyond text. ``forks``: a child may start from its parent's context. ``joins``: what a
    child computed may come back to its parent, so it is told of each conclusion (``Session.keep``).
    """

    forks: bool = False
    joins: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """How a node starts: with a ``system`` text and what the user says, or at a place of its parent (``fork``) with
    what the user says next. Its answer begins with ``opens``, unless it thinks first. Backends that hold phases to a
    grammar make it from ``grammar``.
    """

    phase: Phase
    user: str
    system: str = ""
    opens: str = ""
    depth: int = 0
    grammar: Grammar | None = None
    fork: Place | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a node goes on: with what the user says next, and an answer that begins with ``opens`` unless it thinks
    first. It hands over ``conclusions`` of children; ``render`` writes the same text with others in their places.
    """

    phase: Phase
    user: str
    conclusions: tuple[Conclusion, ...]
    render: Callable[[Sequence[Conclusion]], str]
    opens: str = ""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a phase began with: the number of ``tokens`` that the prompt or turn took, those of ``opens``, with which
    the node's text begins, included; which ranges of the node's
    tokens are ``spliced``; ``settings`` are those it decodes with, for the trace.
    """

    tokens: int = 0
    opens: str = ""
    spliced: list[tuple[int, int]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Waited:
    """Seconds that a node was ready and had no place: before its phase's first token, or, if ``ran_s`` is given, since
    its last one; ``ran_s`` is what it took from then on to the new one.
    """

    queued_s: float
    ran_s: float | None = None


@dataclass(slots=True)
class Written:
    """What a node wrote in a step: the ``text`` that is certain by now, of ``tokens`` tokens. With ``end`` it stopped
    by itself. ``error`` is what went wrong with this node alone.
    """

    job: str
    node: str
    text: str = ""
    tokens: int = 1
    end: EndReason | None = None
    waited: Waited | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Costs:
    """What a job took, by the names of `JobResult`'s fields."""

    forward_prefilled: int = 0
    forward_decoded: int = 0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    total_tokens: int = 0
    forked_blocks: int = 0
    copied_blocks: int = 0
    peak_kv_blocks: int = 0
    preemptions: int = 0
    offloaded_blocks: int = 0
    restored_blocks: int = 0
    spliced_tokens: int = 0
    splice_report: list[dict[str, Any]] = field(default_factory=list)
    text_joins: int = 0
    servers: dict[str, Any] = field(default_factory=dict)


class NodeHandle(Protocol):
    """A node that was opened."""

    @property
    def begun(self) -> Begun:
        """What its phase began with."""

    @property
    def text(self) -> str:
        """What it wrote in its phase, as far as that is certain, after what its answer was made to begin with."""

    @property
    def length(self) -> int:
        """Tokens of its context; 0 where the backend does not know."""

    @property
    def thinking_cut(self) -> bool:
        """Whether its phase's thinking was ended for it."""

    def place(self, at: int) -> Place:
        """Where in its context the character ``at`` of its phase's text is, for a fork that is opened later."""

    def pause(self, at: int) -> None:
        """Stop it, and forget what it wrote after the character ``at`` of its phase's text, white space aside."""

    def halt(self) -> None:
        """Its phase is over, for whatever reason, and nothing more is read of it; what it holds stays."""

    def resume(self, continuation: Continuation) -> None:
        """Let it go on in another phase. Raises NoRoom if its context would be too long, else RrmError."""

    def finish(self) -> Transcript:
        """It is over, wherever it is: what it holds is free when this returns. A second call changes nothing."""


class Session(Protocol):
    """The nodes of one job."""

    def open(self, node: NodePath, opening: Opening) -> NodeHandle:
        """Start a node. Raises NoRoom if its prompt is too long, else RrmError."""

    def keep(self, parent: NodePath, child: NodePath, conclusion: Conclusion) -> None:
        """A child has concluded and is about to be finished: hold what its parent will need of it (``joins``)."""

    def costs(self) -> Costs: ...

    def close(self) -> None:
        """End every node of the job; what the finished ones took can still be asked for."""


class Backend(Protocol):
    """Who decodes for all jobs of a run, in steps."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def marks(self) -> Marks:
        """What thinking stands between."""

    @property
    def steps(self) -> int:
        """How many were taken."""

    @property
    def used_blocks(self) -> int: ...

    @property
    def pinned_blocks(self) -> int:
        """Blocks of nodes that wait."""

    @property
    def offloaded_blocks(self) -> int: ...

    def opens_thinking(self, phase: Phase) -> bool:
        """Whether what a node writes in ``phase`` begins inside thinking."""

    def session(self, job: str, rank: int) -> Session:
        """Begin a job, by its key; jobs of lower rank go first."""

    def step(self) -> Generator[Written, None, None]:
        """One step of all nodes that decode. Nodes may be opened, paused and ended while it is read.

        Raises what makes all jobs fail; what concerns one node is in what it wrote.
        """

    def explain(self, error: Exception, job: str) -> str:
        """What the row of ``job`` says about an error of ``step``, and what to do."""

    def ranges(self, name: str, of: Iterable[str] = ()) -> AbstractContextManager[Any]:
        """A part of a step and the keys of the nodes it works for, for a profiler."""
