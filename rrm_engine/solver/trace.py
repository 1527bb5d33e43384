"""What a job tells of itself while it runs: the events of trace.jsonl."""

from time import monotonic
from typing import Any

from rrm_engine.solver.backend import Backend
from rrm_engine.solver.events import Events


class JobTrace:
    """The events of one job, counted whether anybody listens or not."""

    def __init__(self, backend: Backend, job: str, tell: Events) -> None:
        self.count = 0
        self._backend = backend
        self._job = job
        self._tell = tell

    def __call__(self, event: str, node: str, tokens: int, **fields: Any) -> None:
        """``tokens`` are those of the node's context."""
        self.count += 1
        if not self._tell.wanted:
            return
        backend = self._backend
        if event != "text":  # one a token, and counting takes time
            fields |= {"pinned": backend.pinned_blocks, "offloaded": backend.offloaded_blocks}
        self._tell(
            {
                "t": monotonic(),
                "job": self._job,
                "node": node,
                "step": backend.steps,
                "event": event,
                "tokens": tokens,
                "blocks": backend.used_blocks,
                **fields,
            }
        )
