"""The replicas of a model: which one takes a node, which are dead, and how many streams there are at once.

All of it runs in the thread of the event loop.
"""

import asyncio
import re
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

import httpx2

from rrm_engine.backends.http.faults import Broken
from rrm_engine.errors import RrmError

HEALTH_TIMEOUT_S = 5.0
WATCH_S = 2.0
# Requests that wait for a place in the server's batch: vLLM's and SGLang's names for it.
QUEUED = re.compile(r"^(?:vllm:num_requests_waiting|sglang:num_queue_reqs)(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.MULTILINE)


@dataclass(slots=True, eq=False)
class Replica:
    """One server. ``waiting`` is what its /metrics said last, 0 where it has none."""

    name: str  # its base URL
    client: Any
    alive: bool = True
    in_flight: int = 0
    waiting: int = 0
    attempts: "set[asyncio.Task[None]]" = field(default_factory=set)

    @property
    def load(self) -> int:
        return self.in_flight + self.waiting


class Gate:
    """Lets at most ``places`` in at once; of those that wait the lowest rank goes first, then the first to come."""

    def __init__(self, places: int) -> None:
        self.free = places
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    async def enter(self, rank: int) -> None:
        if self.free:
            self.free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (rank, next(self._order), place))
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was let in meanwhile
                self.leave()
            raise

    def leave(self) -> None:
        while self._waiting:
            place = heappop(self._waiting)[2]
            if not place.done():
                place.set_result(None)
                return
        self.free += 1

    @property
    def queued(self) -> int:
        return sum(not place.done() for _, _, place in self._waiting)


class Pool:
    """The replicas, and ``http`` to ask them for their state."""

    def __init__(self, replicas: Sequence[Replica], places: int, http: httpx2.AsyncClient) -> None:
        self.replicas = list(replicas)
        self.gate = Gate(places)
        self._http = http

    async def choose(self, home: Replica | None, avoid: Replica | None) -> Replica:
        """The replica for the next attempt: ``home`` if it lives, else the one with least to do; ``avoid``, which has
        just failed, only if there is no other. Raises RrmError if none answers.
        """
        if not any(replica.alive for replica in self.replicas):
            await asyncio.gather(*(self.check(replica) for replica in self.replicas))
        alive = [replica for replica in self.replicas if replica.alive]
        if not alive:
            names = ", ".join(replica.name for replica in self.replicas)
            raise RrmError(f"no replica answers any more: start {names} again, then go on with --resume")
        if home is not None and home.alive and home is not avoid:
            return home
        others = [replica for replica in alive if replica is not avoid] or alive
        return min(others, key=lambda replica: replica.load)

    async def attempt(self, replica: Replica, reading: Coroutine[Any, Any, None]) -> None:
        """Read a stream of ``replica``; its death ends that at once. Raises Broken for it."""
        task = asyncio.create_task(reading)
        with self._counted(replica, task):
            try:
                await task
            except asyncio.CancelledError:
                if task.cancelled() and not replica.alive and not _is_cancelled():
                    raise Broken("it does not answer any more") from None
                raise

    async def check(self, replica: Replica) -> None:
        """Ask it for a sign of life. One that gives none is taken out, and what it was doing is done elsewhere."""
        try:
            await self._http.get(f"{replica.name.rstrip('/')}/models", timeout=HEALTH_TIMEOUT_S)
        except httpx2.HTTPError:
            replica.alive = False
            for task in list(replica.attempts):
                task.cancel()
        else:
            replica.alive = True

    async def watch(self) -> None:
        """Look at the replicas again and again: how much waits there, and whether dead ones have come back."""
        while True:
            await asyncio.sleep(WATCH_S)
            await asyncio.gather(*(self._look(replica) for replica in self.replicas))

    async def _look(self, replica: Replica) -> None:
        if not replica.alive:
            await self.check(replica)
        elif replica.in_flight:
            with suppress(httpx2.HTTPError):
                answer = await self._http.get(_metrics(replica.name), timeout=HEALTH_TIMEOUT_S)
                found = QUEUED.findall(answer.text) if answer.status_code == 200 else []
                replica.waiting = int(sum(map(float, found)))

    @contextmanager
    def _counted(self, replica: Replica, task: "asyncio.Task[None]") -> Iterator[None]:
        replica.in_flight += 1
        replica.attempts.add(task)
        try:
            yield
        finally:
            replica.in_flight -= 1
            replica.attempts.discard(task)


def _is_cancelled() -> bool:
    """Whether it is the running task itself that is cancelled, not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _metrics(base: str) -> str:
    return re.sub(r"/v1/?$", "", base.rstrip("/")) + "/metrics"
