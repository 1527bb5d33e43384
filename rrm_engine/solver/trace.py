"""What a job tells of itself while it runs: the events of trace.jsonl."""

from time import monotonic
from typing import Any

from rrm_engine.protocol.events import Atomic, Await, Child, ParsedEvent
from rrm_engine.runs.events import Event, Wrote, WroteAtomic, WroteAwait, WroteChild, WroteDone
from rrm_engine.solver.backend import Backend
from rrm_engine.solver.events import Events

Now = dict[str, Any]  # what every event says


class JobTrace:
    """The events of one job, counted whether anybody listens or not."""

    def __init__(self, backend: Backend, job: str, tell: Events) -> None:
        self.count = 0
        self._backend = backend
        self._job = job
        self._tell = tell

    def now(self, node: str, tokens: int) -> Now:
        """What an event of ``node``, whose context has ``tokens``, says of this moment; see `runs.events.Event`."""
        return self.now_of_text(node, tokens) | {
            "pinned": self._backend.pinned_blocks,
            "offloaded": self._backend.offloaded_blocks,
        }

    def now_of_text(self, node: str, tokens: int) -> Now:
        """The same for one that comes with every token, for counting takes time."""
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
    """That a node wrote ``item``; ``child`` is the path of the node that came of it, ``same_as`` of one there was."""
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
