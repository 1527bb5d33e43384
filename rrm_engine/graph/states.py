"""The states of a node and the table of all its transitions; docs/graph-states.md is made from it."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class NodeState(StrEnum):
    """Where a node is in its life; RUNNING is the only state in which it decodes."""

    BLOCKED = "blocked"  # declared, not started: a dependency has not concluded
    READY = "ready"  # not started: about to be
    RUNNING = "running"
    AWAITING = "awaiting"  # paused or ended by itself: an awaited child has not concluded
    RESUMABLE = "resumable"  # paused or ended by itself: about to go on
    CONCLUDED = "concluded"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # never became a node; its failed conclusion says why


INITIAL: Final = NodeState.BLOCKED
ALIVE: Final = frozenset({NodeState.RUNNING, NodeState.AWAITING, NodeState.RESUMABLE})
OVER: Final = frozenset({NodeState.CONCLUDED, NodeState.CANCELLED, NodeState.REFUSED})

# (from, to) -> why. A READY or RESUMABLE node starts or goes on in the same answer, so it is never cancelled.
TRANSITIONS: Final[Mapping[tuple[NodeState, NodeState], str]] = MappingProxyType(
    {
        (NodeState.BLOCKED, NodeState.READY): "its dependencies have concluded",
        (NodeState.BLOCKED, NodeState.REFUSED): "a limit, or it would wait for itself",
        (NodeState.BLOCKED, NodeState.CANCELLED): "an ancestor concluded",
        (NodeState.READY, NodeState.RUNNING): "its turn (Start)",
        (NodeState.RUNNING, NodeState.AWAITING): "await, or an end with children left",
        (NodeState.RUNNING, NodeState.RESUMABLE): "atomic without an answer, or an await too many",
        (NodeState.RUNNING, NodeState.CONCLUDED): "an answer, or an end without one",
        (NodeState.RUNNING, NodeState.CANCELLED): "an ancestor concluded",
        (NodeState.AWAITING, NodeState.RESUMABLE): "its last awaited child has concluded",
        (NodeState.AWAITING, NodeState.CANCELLED): "an ancestor concluded",
        (NodeState.RESUMABLE, NodeState.RUNNING): "its turn (Resume)",
    }
)
