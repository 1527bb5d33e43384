"""Several engines over copies of one model, to be used like one."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from rrm_engine.engine.engine import Engine, Sampled
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.sequence import Matcher, Sequence
from rrm_engine.kv.span import Span

SLACK = 2  # live sequences that a replica may have more than another before it is clearly more loaded


class Replicas:
    """Places every sequence on one of ``engines``, and steps them together.

    Where a sequence goes: a fork to its parent's blocks. A root to the replica with the fewest live sequences. Any
    other child to the replica that has the longest prefix of its prompt in the prefix cache, of equals to the one
    where the root of its graph is; but if that one has more than SLACK live sequences above the fewest, to the one
    with the fewest. ``together`` leaves the last clause out, for children whose KV their parents will attach.

    A step launches those of all replicas before it collects any, so devices work side by side; it lasts as long as
    the slowest of them.
    """

    def __init__(self, engines: SequenceOf[Engine], together: bool = False) -> None:
        self.engines = list(engines)
        self.together = together
        self.steps = 0
        self.began = 0.0
        self._driven = self.engines[0]

    # what is the same in all of them

    @property
    def ranges(self) -> Ranges:
        return self.engines[0].ranges

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.engines[0].eos_ids

    @property
    def block_size(self) -> int:
        return self.engines[0].block_size

    def announce_to(self, ranges: Ranges) -> None:
        for engine in self.engines:
            engine.announce_to(ranges)

    # what is the sum of all of them

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for engine in self.engines for sequence in engine.sequences]

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def left(self) -> bool:
        """As ``Engine.left``, of any."""
        return any(engine.left for engine in self.engines)

    @property
    def launched(self) -> int:
        return max(engine.launched for engine in self.engines)

    @property
    def used_blocks(self) -> int:
        return sum(engine.used_blocks for engine in self.engines)

    @property
    def pinned_blocks(self) -> int:
        return sum(engine.pinned_blocks for engine in self.engines)

    @property
    def offloaded_blocks(self) -> int:
        return sum(engine.offloaded_blocks for engine in self.engines)

    def progress(self) -> dict[str, int]:
        """As ``Engine.progress``, added up."""
        states = [engine.progress() for engine in self.engines]
        return {name: sum(state[name] for state in states) for name in states[0]} | {"step": self.steps}

    def check(self) -> None:
        for engine in self.engines:
            engine.check()

    # one of them

    @property
    def plan(self) -> SchedulerOutput | None:
        """Of the last replica that was driven; what was running there if that failed."""
        return self._driven.plan

    def submit(
        self,
        key: str,
        tokens: list[int],
        budget: int,
        sampling: SamplingParams,
        *,
        root: int = 0,
        depth: int = 0,
        matcher: Matcher | None = None,
        fork_of: tuple[Sequence, int] | None = None,
    ) -> Sequence:
        """As ``Engine.submit``, on the replica that the rule above says."""
        engine = self._of(fork_of[0]) if fork_of else self._place(tokens, root, depth)
        options: dict[str, Any] = {"root": root, "depth": depth, "matcher": matcher, "fork_of": fork_of}
        return engine.submit(key, tokens, budget, sampling, **options)

    def pause(self, sequence: Sequence) -> None:
        self._of(sequence).pause(sequence)

    def wait(self, sequence: Sequence) -> None:
        self._of(sequence).wait(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        self._of(sequence).truncate(sequence, length)

    def resume(
        self,
        sequence: Sequence,
        tokens: list[int],
        budget: int,
        sampling: SamplingParams | None = None,
        matcher: Matcher | None = None,
        splices: SequenceOf[tuple[int, Span]] = (),
    ) -> None:
        self._of(sequence).resume(sequence, tokens, budget, sampling, matcher, splices)

    def keep(self, keeper: Sequence, source: Sequence, start: int, stop: int) -> Span:
        """As ``Engine.keep``. Raises ValueError where the two are on different replicas."""
        if self._of(keeper) is not self._of(source):
            raise ValueError(f"{keeper.key} cannot hold KV of {source.key}, which is on another replica")
        return self._of(keeper).keep(keeper, source, start, stop)

    def finish(self, sequence: Sequence) -> None:
        self._of(sequence).finish(sequence)

    def step(self) -> list[Sampled]:
        """One step of every replica that has work, or what is left of the last one; returns all new tokens."""
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

    def _of(self, sequence: Sequence) -> Engine:
        return next(engine for engine in self.engines if engine.pool is sequence.table.pool)

    def _place(self, tokens: list[int], root: int, depth: int) -> Engine:
        calm = min(self.engines, key=_load)
        if depth == 0:
            return calm
        family = [s for s in self.sequences if s.root == root]
        top = self._of(min(family, key=lambda s: s.depth)) if family else calm
        home = max(self.engines, key=lambda engine: (len(engine.pool.match(tokens)), engine is top))
        if self.together:
            return top
        return calm if _load(home) > _load(calm) + SLACK else home


def _load(engine: Engine) -> int:
    return len(engine.scheduler.live)


AnyEngine = Engine | Replicas
