"""One phase of a node on the servers: a stream, and what is done when it breaks."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from rrm_engine.backends.http.faults import Broken, fault_of
from rrm_engine.backends.http.pool import Pool, Replica
from rrm_engine.backends.http.wire import Api, Ask, Delta, Received, Usage
from rrm_engine.errors import RrmError

ATTEMPTS = 4  # in a row without a new token
FIRST_DELAY_S = 0.25  # before the second attempt; twice as long before each one after that


@dataclass(slots=True, eq=False)
class Call:
    """What a phase asks for, and what became of it. ``home`` is the replica that has the node's KV.

    ``told`` takes what comes, in the event loop's thread: deltas, and the exception that ended it.
    """

    ask: Ask
    rank: int
    home: Replica | None
    told: Callable[["Call", Delta | Exception], None]
    received: Received = field(default_factory=Received)
    replicas: list[Replica] = field(default_factory=list)  # that were asked, without repetition
    attempts: int = 0
    restarts: int = 0  # attempts that went on after tokens of an earlier one
    queued_s: float = 0.0  # until it had a place
    usage: Usage | None = None
    last: Delta | None = None  # with its end
    handle: Any = None  # of its task, to cancel it

    async def run(self, pool: Pool, api: Api, model: str) -> None:
        began = monotonic()
        await pool.gate.enter(self.rank)
        try:
            self.queued_s = monotonic() - began
            await self._until_done(pool, api, model)
        except Exception as error:
            self.told(self, error)
        finally:
            pool.gate.leave()

    async def _until_done(self, pool: Pool, api: Api, model: str) -> None:
        failures, avoid = 0, None
        while True:
            replica = await pool.choose(self.home, avoid)
            if replica not in self.replicas:
                self.replicas.append(replica)
            self.attempts += 1
            self.restarts += self.received.count > 0
            before = self.received.count
            try:
                await pool.attempt(replica, self._read(replica, api, model))
                return
            except Broken as fault:
                failures = 1 if self.received.count > before else failures + 1
                await pool.check(replica)
                self._refuse_the_hopeless(replica, api, failures, fault)
                avoid = replica
                await asyncio.sleep(max(fault.delay_s, FIRST_DELAY_S * 2 ** (failures - 1)))

    def _refuse_the_hopeless(self, replica: Replica, api: Api, failures: int, fault: Broken) -> None:
        if failures >= ATTEMPTS:
            raise RrmError(f"{replica.name}: {fault} ({failures} attempts)") from fault
        if self.received.count and not api.continues:
            raise RrmError(
                f"{replica.name}: {fault}; its API cannot go on in the middle of an answer: run the row again "
                f"with --resume"
            ) from fault

    async def _read(self, replica: Replica, api: Api, model: str) -> None:
        try:
            async with aclosing(api.read(replica.client, model, self.ask, self.received)) as deltas:
                async for delta in deltas:
                    self._take(delta)
        except Exception as error:
            fault = fault_of(error)
            if self.last is None or not isinstance(fault, Broken):
                raise fault from error
        if self.last is None:
            raise Broken("its stream ended in the middle")
        self.told(self, self.last)

    def _take(self, delta: Delta) -> None:
        """The end is told when the stream is over: the usage comes after it."""
        if delta.usage is not None:
            self.usage = delta.usage
        self.received.add(delta)
        if delta.end is not None:
            self.last = delta
        elif delta.tokens or delta.text or delta.reasoning:
            self.told(self, delta)
