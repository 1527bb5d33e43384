"""The interface between a task's run and the backend that decodes for it.

A run opens nodes, reads their text as it comes, pauses a node at a place in its text, lets it go on with a further user
message, and ends it. Tokens, the KV of waiting nodes and the devices are the backend's business alone.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import Conclusion, EndReason, Phase
from rrm_engine.protocol.thinking import Marks
from rrm_engine.runs.events import Transcript

Grammar = tuple[int, bool]  # children that the node has had, whether it may split again
Place = object  # a position in a node's context; only the backend that made it looks inside


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do beyond text. ``forks``: a child may start from its parent's context. ``joins``: KV of a
    child may be handed to its parent, so the backend is told of each conclusion (``Session.keep``).
    """

    forks: bool = False
    joins: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """How a node starts: with the messages ``system`` and ``user``, or, if ``fork`` is given, at that place of its
    parent's context with the message ``user``. Its answer begins with ``opens``, unless it thinks first. A backend that
    constrains phases by grammars makes one from ``grammar``.
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
    """How a node goes on: with the message ``user``, and an answer that begins with ``opens`` unless it thinks first.
    The message holds the ``conclusions`` of children; ``render`` writes it with other conclusions in their places.
    """

    phase: Phase
    user: str
    conclusions: tuple[Conclusion, ...]
    render: Callable[[Sequence[Conclusion]], str]
    opens: str = ""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """How a phase began: the number of ``tokens`` of the prompt or turn, with those of ``opens``, by which the node's
    text begins; the ranges of the node's tokens that are ``spliced``; the ``settings`` it decodes with, for the trace.
    """

    tokens: int = 0
    opens: str = ""
    spliced: list[tuple[int, int]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Waited:
    """``queued_s``: seconds that a node was ready but not admitted, before its phase's first token or, if ``ran_s`` is
    given, since its last token. ``ran_s``: seconds from its admission to the new token.
    """

    queued_s: float
    ran_s: float | None = None


@dataclass(slots=True)
class Written:
    """What a node wrote in a step: ``tokens`` tokens, and the ``text`` that has become certain with them. With ``end``
    it stopped by itself. ``error`` is one that concerns this node alone.
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
    """What a job cost; the fields are those of `JobResult`."""

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
        """How its phase began."""

    @property
    def text(self) -> str:
        """The text of its phase as far as it is certain, from ``Begun.opens`` on."""

    @property
    def length(self) -> int:
        """Number of tokens in its context; 0 if the backend does not know."""

    @property
    def thinking_cut(self) -> bool:
        """Whether the thinking of its phase was cut off by a limit."""

    def place(self, at: int) -> Place:
        """The place in its context of the character ``at`` of its phase's text, for a fork that is opened later."""

    def pause(self, at: int) -> None:
        """Stop it, and forget what it wrote after the character ``at`` of its phase's text, white space aside."""

    def halt(self) -> None:
        """Its phase is over, for whatever reason, and nothing more of it is read. Its KV stays."""

    def resume(self, continuation: Continuation) -> None:
        """Let it go on in another phase. Raises NoRoom if its context would be too long, else RrmError."""

    def finish(self) -> Transcript:
        """End it in whatever state it is; all it holds is free when this returns. A second call changes nothing."""


class Session(Protocol):
    """The nodes of one job."""

    def open(self, node: NodePath, opening: Opening) -> NodeHandle:
        """Start a node. Raises NoRoom if its prompt is too long, else RrmError."""

    def keep(self, parent: NodePath, child: NodePath, conclusion: Conclusion) -> None:
        """A child has concluded and is about to be finished: hold the KV that its parent will need (``joins``)."""

    def costs(self) -> Costs: ...

    def close(self) -> None:
        """End every node of the job. ``costs`` can be asked for afterwards."""


class Backend(Protocol):
    """Decodes for all jobs of a run, in steps."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def marks(self) -> Marks:
        """The marks around thinking."""

    @property
    def steps(self) -> int:
        """Number of steps taken."""

    @property
    def used_blocks(self) -> int: ...

    @property
    def pinned_blocks(self) -> int:
        """Blocks held by waiting nodes."""

    @property
    def offloaded_blocks(self) -> int: ...

    def opens_thinking(self, phase: Phase) -> bool:
        """Whether what a node writes in ``phase`` begins inside thinking."""

    def session(self, job: str, rank: int) -> Session:
        """Begin the job with the key ``job``; jobs of lower rank have higher priority."""

    def step(self) -> Generator[Written, None, None]:
        """One step of all nodes that decode. Nodes may be opened, paused and ended while the generator is read.

        Raises errors that make all jobs fail; those of a single node are in its ``Written``.
        """

    def explain(self, error: Exception, job: str) -> str:
        """A sentence for the row of ``job`` about an error of ``step``, and what to do about it."""

    def ranges(self, name: str, of: Iterable[str] = ()) -> AbstractContextManager[Any]:
        """Announce to a profiler a part of a step and the keys of the nodes that it works for."""
