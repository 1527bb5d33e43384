"""The events that a job emits while it runs; they are the lines of trace.jsonl."""

from time import monotonic
from typing import Any

from rrm_engine.protocol.events import Atomic, Await, Child, ParsedEvent
from rrm_engine.runs.events import Event, Wrote, WroteAtomic, WroteAwait, WroteChild, WroteDone
from rrm_engine.solver.backend import Backend
from rrm_engine.solver.events import Events

Now = dict[str, Any]  # the fields that every event has


class JobTrace:
    """Emits the events of one job and counts them, whether anybody listens or not."""

    def __init__(self, backend: Backend, job: str, tell: Events) -> None:
        self.count = 0
        self._backend = backend
        self._job = job
        self._tell = tell

    def now(self, node: str, tokens: int) -> Now:
        """The common fields of an event of ``node``, whose context has ``tokens``, as of now: `runs.events.Event`."""
        return self.now_of_text(node, tokens) | {
            "pinned": self._backend.pinned_blocks,
            "offloaded": self._backend.offloaded_blocks,
        }

    def now_of_text(self, node: str, tokens: int) -> Now:
        """The same without counts that take time, for events that come with every token."""
        backend = self._backend
        return {
            "t": monotonic(),
            "job": self._job,
            "node": node,
            "step": backend.steps,
            "tokens": tokens,
            "blocks": backend.used_blocks,
        }

    def __call__(self, event: Event) -> None:
        self.count += 1
        if self._tell.wanted:
            self._tell(event.as_json())


def wrote(item: ParsedEvent, child: str | None, same_as: str | None, now: Now) -> Wrote:
    """The event that a node wrote ``item``. ``child`` is the path of the child that it declared, ``same_as`` that of
    the sibling which already had its task.
    """
    now, event = now | {"repairs": item.repairs}, item.event
    match event:
        case Child():
            now |= {"child": child, "same_as": same_as}
            return WroteChild(**now, id=event.id, task=event.task, depends_on=event.depends_on)
        case Await():
            return WroteAwait(**now, children=event.children, rule=event.rule)
        case Atomic():
            return WroteAtomic(**now, answer=event.answer)
    return WroteDone(**now)
