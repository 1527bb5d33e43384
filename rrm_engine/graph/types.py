"""What the graph machine is told and what it answers: plain values, no behaviour."""

from dataclasses import dataclass, field
from enum import StrEnum

from rrm_engine.graph.paths import NodePath


class Phase(StrEnum):
    """What a stretch of a node's decoding is for; each has its own token budget, thinking and sampling."""

    DIRECT = "direct"  # a direct solve of the whole task (also the fallback of an unusable graph)
    GRAPH = "graph"  # the node may split its task
    SOLVER = "solver"  # the node solves its task itself
    CONTINUATION = "continuation"  # the node goes on after conclusions were appended


class EndReason(StrEnum):
    """Why a node's decoding stopped by itself."""

    EOS = "eos"
    LENGTH = "length"  # its phase's token budget is spent
    CONTEXT = "context"  # the sequence is as long as the engine or the model allows
    ERROR = "error"


class Status(StrEnum):
    """How a run ended, as recorded in every row."""

    GRAPH = "graph"  # the root's own graph led to the answer
    ATOMIC = "atomic"  # the root answered without children
    FALLBACK = "fallback"  # the graph was unusable; a direct solve gave the answer
    INVALID = "invalid"  # no usable graph and no fallback
    FAILED = "failed"  # an error or a cancellation


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_depth`` counts levels below the root: 1 means that only the root may split. ``solves_afresh``: if the root
    does not split, a direct node with a fresh context solves its task.
    """

    max_depth: int = 2
    max_width: int = 8
    max_nodes: int = 64
    max_awaits: int = 4  # per node
    solves_afresh: bool = False


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a node hands to the nodes that wait for it.

    ``id`` is the child's id in its parent; a child that stands for siblings too has one conclusion for each id.
    ``node`` is its path, None for a child that was refused, and ``task`` its task.
    """

    id: str
    answer: str
    ok: bool = True
    node: NodePath | None = None
    task: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Start:
    """Start a new node with its own prompt, or, if ``fork``, from its parent's context at its child event."""

    node: NodePath
    phase: Phase
    task: str
    parent: NodePath | None = None
    depth: int = 0
    given: tuple[Conclusion, ...] = ()
    fork: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop decoding the node right after the event just read; keep its KV."""

    node: NodePath


@dataclass(frozen=True, slots=True)
class Resume:
    """Append conclusions (and notes about refused events) to a paused node and let it go on in ``phase``.

    ``phase`` is CONTINUATION after an await and SOLVER after an ``atomic`` without an answer.
    """

    node: NodePath
    phase: Phase
    conclusions: tuple[Conclusion, ...] = ()
    notes: tuple[str, ...] = ()
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """The node has concluded: end its sequence and release its KV."""

    node: NodePath
    conclusion: Conclusion


@dataclass(frozen=True, slots=True)
class Cancel:
    """The node's result is not needed any more: end its sequence wherever it is."""

    node: NodePath
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over. ``answer`` is the root's conclusion text."""

    status: Status
    answer: str
    error: str | None = None


Command = Start | Pause | Resume | Stop | Cancel | Finish
