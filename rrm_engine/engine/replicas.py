"""Several engines over copies of one model, driven as one."""

from collections.abc import Sequence as SequenceOf
from typing import Protocol, Unpack

from rrm_engine.engine.engine import Engine, Sampled, Submission
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.sequence import Sequence

SLACK = 2  # how many more live sequences than another a replica may have and still be preferred for its cache


class Driven(Protocol):
    """What one engine and several have in common. Everything else is asked of the engine that a sequence is on."""

    steps: int  # collected so far
    began: float  # when the step collected last began, on the monotonic clock

    @property
    def engines(self) -> SequenceOf[Engine]: ...

    @property
    def plan(self) -> SchedulerOutput | None:
        """The plan of the last step, also if that step failed."""

    @property
    def has_work(self) -> bool: ...

    @property
    def left(self) -> bool:
        """Whether the last step gave more tokens than have been handed out."""

    @property
    def launched(self) -> int:
        """The number of the last step that was launched."""

    def of(self, sequence: Sequence) -> Engine:
        """The engine that a sequence is on."""

    def submit(
        self, key: str, tokens: list[int], budget: int, sampling: SamplingParams, **options: Unpack[Submission]
    ) -> Sequence: ...

    def step(self) -> list[Sampled]: ...

    def progress(self) -> dict[str, int]: ...


class Replicas:
    """Places every sequence on one of ``engines``, and steps them together.

    Where a sequence goes: a fork to its parent's replica; a root to the replica with the fewest live sequences; any
    other child to the replica whose prefix cache has the longest prefix of its prompt, on a tie to that of its graph's
    root. But if that replica has over SLACK live sequences more than the least loaded one, to the least loaded one.
    ``together``: every child goes to its root's replica, because parents will attach their children's KV.

    A step launches steps on all replicas before it collects any, so that devices work in parallel; it lasts as long as
    the slowest replica.
    """

    def __init__(self, engines: SequenceOf[Engine], together: bool = False) -> None:
        self.engines = engines
        self.together = together
        self.steps = 0
        self.began = 0.0
        self._driven = engines[0]  # the engine called last

    @property
    def plan(self) -> SchedulerOutput | None:
        return self._driven.plan

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def left(self) -> bool:
        return any(engine.left for engine in self.engines)

    @property
    def launched(self) -> int:
        return max(engine.launched for engine in self.engines)

    def progress(self) -> dict[str, int]:
        """As ``Engine.progress``, added up."""
        states = [engine.progress() for engine in self.engines]
        return {name: sum(state[name] for state in states) for name in states[0]} | {"step": self.steps}

    def of(self, sequence: Sequence) -> Engine:
        return next(engine for engine in self.engines if engine.pool is sequence.table.pool)

    def submit(
        self, key: str, tokens: list[int], budget: int, sampling: SamplingParams, **options: Unpack[Submission]
    ) -> Sequence:
        """As ``Engine.submit``, on the replica that the class's rule picks."""
        if fork_of := options.get("fork_of"):
            engine = self.of(fork_of[0])
        else:
            engine = self._place(tokens, options.get("root", 0), options.get("depth", 0))
        return engine.submit(key, tokens, budget, sampling, **options)

    def step(self) -> list[Sampled]:
        """One step of every replica that has work, or tokens of the last one not handed out yet; returns the new
        tokens.
        """
        left = [engine for engine in self.engines if engine.left]
        for engine in () if left else self.engines:
            self._driven = engine
            engine.steps = self.steps  # so that their steps have the same numbers
            engine.launch()
        sampled = []
        for engine in left or self.engines:
            self._driven = engine
            sampled += engine.collect()
        self.steps = max(engine.steps for engine in self.engines)
        self.began = min((engine.began for engine in self.engines if engine.steps == self.steps), default=self.began)
        return sampled

    def _place(self, tokens: list[int], root: int, depth: int) -> Engine:
        calm = min(self.engines, key=_load)
        if depth == 0:
            return calm
        family = [s for engine in self.engines for s in engine.sequences if s.root == root]
        top = self.of(min(family, key=lambda s: s.depth)) if family else calm
        home = max(self.engines, key=lambda engine: (len(engine.pool.match(tokens)), engine is top))
        if self.together:
            return top
        return calm if _load(home) > _load(calm) + SLACK else home


def _load(engine: Engine) -> int:
    return len(engine.scheduler.live)


def names_of(engines: SequenceOf[Engine]) -> list[str]:
    """Names of replicas: their devices, numbered where several share one."""
    devices = [str(engine.runner.device) for engine in engines]
    return [
        device if devices.count(device) == 1 else f"{device} #{devices[:i].count(device)}"
        for i, device in enumerate(devices)
    ]
