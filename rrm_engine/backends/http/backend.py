"""Servers as a backend: every phase of a node is a stream, and a step is what has come since the last one."""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from rrm_engine.backends.http.call import Call
from rrm_engine.backends.http.pool import Pool, Replica
from rrm_engine.backends.http.session import Asking, HttpNode, HttpSession
from rrm_engine.backends.http.transport import Transport
from rrm_engine.backends.http.wire import Api, Ask, Delta
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.thinking import Marks
from rrm_engine.solver.backend import Capabilities, Written

RATE_WINDOW_S = 2.0  # of the tokens per second shown live


class Streams:
    """The streams of all nodes. They are begun and ended here; what they bring waits in ``inbox``."""

    def __init__(self, transport: Transport, pool: Pool, api: Api, model: str) -> None:
        self.pool = pool
        self.inbox: SimpleQueue[tuple[Call, Delta | Exception]] = SimpleQueue()
        self.open: dict[Call, HttpNode] = {}
        self._transport, self._api, self._model = transport, api, model

    def begin(self, node: HttpNode, ask: Ask, home: Replica | None, rank: int) -> Call:
        call = Call(ask, rank, home, lambda call, item: self.inbox.put((call, item)))
        call.handle = self._transport.start(call.run(self.pool, self._api, self._model))
        self.open[call] = node
        return call

    def end(self, call: Call) -> None:
        """Hang up, so that the server stops working for it."""
        self.open.pop(call, None)
        call.handle.cancel()


class HttpBackend:
    """See `solver.backend.Backend`."""

    used_blocks = pinned_blocks = offloaded_blocks = 0  # only the servers know
    capabilities = Capabilities(forks=True)

    def __init__(self, asking: Asking, streams: Streams) -> None:
        self.asking = asking
        self.streams = streams
        self.steps = 0
        self._sessions: dict[str, HttpSession] = {}
        self._recent: deque[tuple[float, int]] = deque()  # when tokens came, and how many

    @property
    def marks(self) -> Marks:
        return self.asking.contexts.marks

    def opens_thinking(self, phase: Phase) -> bool:
        return self.asking.contexts.opens_thinking(self.asking.plans[phase].thinking)

    def session(self, job: str, rank: int) -> HttpSession:
        session = self._sessions[job] = HttpSession(self.asking, job, rank, self._forget)
        return session

    def step(self) -> Generator[Written, None, None]:
        """Waits for at least one chunk."""
        self.steps += 1
        assert self.streams.open, "a step without a stream would wait for ever"
        items = [self.streams.inbox.get()]
        try:
            while True:
                items.append(self.streams.inbox.get_nowait())
        except Empty:
            pass
        for call, item in items:
            for part in (item,) if isinstance(item, Exception) else item.by_token():
                node = self.streams.open.get(call)
                if node is None:  # it was paused, or is over
                    break
                written = node.take(part)
                if not node.running:
                    del self.streams.open[call]
                self._count(written.tokens)
                yield written

    def explain(self, error: Exception, job: str) -> str:
        return f"{type(error).__name__} while the servers' answers were read: {error}"

    def ranges(self, name: str, of: Iterable[str] = ()) -> AbstractContextManager[Any]:
        return nullcontext()

    def progress(self) -> dict[str, Any]:
        """Streams that run and wait, replicas that live, tokens per second over the last seconds."""
        pool = self.streams.pool
        recent = list(self._recent)
        span = monotonic() - recent[0][0] if recent else 0.0
        return {
            "running": len(self.streams.open),
            "queued": pool.gate.queued,
            "replicas": sum(replica.alive for replica in pool.replicas),
            "tokens_per_s": sum(n for _, n in recent) / span if span > 0 else 0.0,
        }

    def _count(self, tokens: int) -> None:
        now = monotonic()
        self._recent.append((now, tokens))
        while now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()

    def _forget(self, job: str) -> None:
        self._sessions.pop(job, None)
