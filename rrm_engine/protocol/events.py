"""The events a node may write, one JSON object per line.

``child``   a self-contained subproblem that starts as soon as its object is complete
``await``   the node pauses until the named children have concluded
``atomic``  the node's own answer; without an answer: "this does not split, let me solve it"
``done``    the node has nothing more to write
"""

from dataclasses import dataclass
from typing import Final

MAX_TASK_CHARS: Final = 1200  # of a child, where a grammar holds and the style does not say otherwise
COUNT_LINE: Final = "Parts: "  # and a number, in front of the events of a plan that counts its parts


@dataclass(frozen=True, slots=True)
class PlanShape:
    """What a style asks of plans: a child's task has at most ``max_task_chars`` characters where a grammar holds;
    ``counts_parts``: a plan begins with the number of its parts, 1 for a task that stays whole.
    """

    max_task_chars: int = MAX_TASK_CHARS
    counts_parts: bool = False


PLAIN_SHAPE: Final = PlanShape()


@dataclass(frozen=True, slots=True)
class Form:
    """What a style has written otherwise than as events with all their fields, and what therefore needs no repair.

    ``working``: lines of working may stand in front of an atomic event that is the first one. ``bare_children``: a
    child that depends on nothing is written without ``depends_on``.
    """

    working: bool = False
    bare_children: bool = False


PLAIN_FORM: Final = Form()


@dataclass(frozen=True, slots=True)
class Child:
    id: str
    task: str
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Await:
    """``children`` empty means every child declared so far that has not been awaited."""

    children: tuple[str, ...] = ()
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Atomic:
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    pass


Event = Child | Await | Atomic | Done


@dataclass(frozen=True, slots=True)
class ParsedEvent:
    """An event with its place in the node's text.

    ``start`` and ``end`` are character offsets into everything fed to the parser; ``end`` is the offset
    just after the closing brace. ``repairs`` names each leniency that was needed, e.g. ``trailing_comma``.
    """

    event: Event
    start: int
    end: int
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Malformed:
    """Text that looked like an event but could not be read as one."""

    text: str
    reason: str
    start: int
    end: int
