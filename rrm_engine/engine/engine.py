"""Tokens in, tokens out: submit, fork, pause, resume and finish sequences between steps; ``step`` runs them all."""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from time import monotonic

import torch

from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams, draw, noise_key
from rrm_engine.engine.scheduler import Scheduler, SchedulerOutput, WaitPolicy
from rrm_engine.engine.sequence import Matcher, Sequence, Stop
from rrm_engine.kv.host import HostSpace
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockTable
from rrm_engine.kv.transfer import Readback


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sequence's new token. With ``stop`` the sequence is paused: finish or resume it."""

    sequence: Sequence
    token: int
    stop: Stop | None


@dataclass(slots=True)
class Flight:
    """A launched step. ``tokens`` are those of ``sequences``, None if nobody samples in it."""

    number: int
    began: float
    plan: SchedulerOutput
    sequences: list[Sequence]
    tokens: Readback | None = None
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # by row, where they are to be kept


class Engine:
    """A continuous batch over one block pool.

    Between steps every sequence may be paused, truncated, forked, resumed or finished. A paused sequence keeps its
    blocks unless memory runs out, and goes on with exactly the tokens it had.

    With several ``stages`` (a model whose layers lie on several devices) as many steps are in flight, of different
    sequences, and a call of ``step`` hands out the tokens of the oldest. What is said about "between steps" holds for
    sequences in flight too: one that is paused or finished does not get the token that is being computed.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        *,
        max_sequences: int,
        step_tokens: int,
        max_sequence_tokens: int,
        eos_ids: frozenset[int],
        seed: int = 0,
        wait_policy: WaitPolicy = "pin",
        host_blocks: int = 0,
        stages: int = 1,
    ) -> None:
        """``wait_policy`` is what becomes of a waiting sequence's KV, ``host_blocks`` the room for what is offloaded.

        Raises ValueError if the pool cannot hold one sequence of ``max_sequence_tokens``.
        """
        blocks = -(-max_sequence_tokens // pool.block_size)
        if blocks > pool.num_blocks:
            raise ValueError(
                f"one sequence of {max_sequence_tokens} tokens takes {blocks} KV blocks of {pool.block_size}, the pool "
                f"has {pool.num_blocks}: raise --kv-blocks to at least {blocks}, or lower --max-sequence-tokens or the "
                f"phases' token budgets"
            )
        self.runner = runner
        self.pool = pool
        self.space = HostSpace(host_blocks)
        self.scheduler = Scheduler(pool, max_sequences, step_tokens, wait_policy, self.space, stages=stages)
        self.max_sequence_tokens = max_sequence_tokens
        self.eos_ids = eos_ids
        self.seed = seed
        self.steps = 0  # collected
        self.began = 0.0  # when the last one of them did, on the monotonic clock
        self.ranges = Ranges()
        self.plan: SchedulerOutput | None = None  # of the last step; what was running if that failed
        self._flights: deque[Flight] = deque()
        self._arrivals = 0

    def announce_to(self, ranges: Ranges) -> None:
        """From now on ``ranges`` is told what each part of a step does."""
        self.ranges = self.runner.ranges = ranges

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that is not finished."""
        return [*self.scheduler.live, *self.scheduler.paused.values()]

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live)

    @property
    def launched(self) -> int:
        """Steps collected and in flight: the number of the last one that was launched."""
        return self.steps + len(self._flights)

    @property
    def block_size(self) -> int:
        return self.pool.block_size

    @property
    def used_blocks(self) -> int:
        return self.pool.num_used

    @property
    def pinned_blocks(self) -> int:
        """Blocks that paused sequences hold."""
        return self.scheduler.pinned_blocks

    @property
    def offloaded_blocks(self) -> int:
        return self.space.num_used

    def progress(self) -> dict[str, int]:
        """How many sequences and blocks there are now in which state."""
        scheduler, pool = self.scheduler, self.pool
        return {
            "step": self.steps,
            "running": scheduler.running,
            "waiting": len(scheduler.paused),
            "queued": len(scheduler.live) - scheduler.running,
            "blocks_used": pool.num_used,
            "blocks_total": pool.num_blocks,
        }

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
        """Add a sequence that may sample ``budget`` tokens; its first token comes with the next step.

        ``fork_of`` is (parent, n): ``tokens`` starts with the parent's first n tokens, whose blocks are shared.
        Raises ValueError, with the numbers, if ``tokens`` leaves no room for a single new one.
        """
        self._check_room(key, len(tokens))
        table = BlockTable(self.pool, self.space)
        self._arrivals += 1
        sequence = Sequence(
            key,
            tokens,
            table,
            sampling,
            noise_key(self.seed, key),
            budget,
            root,
            depth,
            self._arrivals,
            matcher,
        )
        if fork_of is not None:
            parent, length = fork_of
            # The last token is run again even where its KV is there, for its logits are needed.
            sequence.table = parent.table.fork(min(length, parent.table.length, len(tokens) - 1))
            sequence.counters.reused = sequence.table.length
            sequence.counters.forked_blocks = len(sequence.table.blocks)
        self.scheduler.add(sequence)
        return sequence

    def pause(self, sequence: Sequence) -> None:
        self.scheduler.pause(sequence)

    def wait(self, sequence: Sequence) -> None:
        """Say that a paused sequence waits for others: its KV is kept, moved or given up as the wait policy says."""
        self.scheduler.wait(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Make a paused sequence forget its tokens behind ``length``."""
        dropped = len(sequence.tokens) - length
        del sequence.tokens[length:]
        sequence.splices = [(at, span) for at, span in sequence.splices if at + len(span) < length]
        sequence.spliced = [(start, min(stop, length)) for start, stop in sequence.spliced if start < length]
        sequence.table.truncate(min(length, sequence.table.stored))
        if dropped:
            sequence.unrun_samples = 0

    def resume(
        self,
        sequence: Sequence,
        tokens: list[int],
        budget: int,
        sampling: SamplingParams | None = None,
        matcher: Matcher | None = None,
        splices: SequenceOf[tuple[int, Span]] = (),
    ) -> None:
        """Append ``tokens`` to a paused sequence and let it sample ``budget`` more; only what is new is prefilled.

        ``splices`` are (index in ``tokens``, kept span): there the span's KV is attached instead of being computed,
        moved to its new positions, unless it was reclaimed until then. In between and behind there are tokens to run.

        Raises ValueError, with the numbers, if they leave no room for a single new token.
        """
        self._check_room(sequence.key, len(sequence.tokens) + len(tokens))
        sequence.splices += _placed(sequence, tokens, splices)
        sequence.tokens += tokens
        sequence.table.truncate(min(sequence.table.stored, len(sequence.tokens) - 1))  # its logits are needed
        sequence.budget = budget
        sequence.sampling = sampling or sequence.sampling
        sequence.matcher = matcher
        self.scheduler.add(sequence)

    def keep(self, keeper: Sequence, source: Sequence, start: int, stop: int) -> Span:
        """Hold the KV of the tokens ``start`` to ``stop`` of ``source`` until ``keeper`` ends or memory runs out.

        Raises ValueError where there is no KV of them.
        """
        span = Span(source.table, start, stop, source.tokens[start:stop])
        keeper.kept.append(span)
        return span

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)

    def step(self) -> list[Sampled]:
        """Launch what can be and collect the oldest step in flight; returns its new tokens.

        Raises EngineStuck, never spins.
        """
        self.launch()
        return self.collect()

    def launch(self) -> None:
        """Launch steps until there are as many in flight as stages, or all who could run are."""
        while self.has_work and len(self._flights) < self.scheduler.stages and self._launch():
            pass

    def collect(self) -> list[Sampled]:
        """Wait for the oldest step in flight; returns its new tokens, none if nothing is in flight."""
        if not self._flights:
            return []
        flight = self._flights.popleft()
        self.steps, self.began, self.plan = flight.number, flight.began, flight.plan
        if flight.tokens is None:
            return []
        with self.ranges("collect", flight.sequences):
            tokens = flight.tokens.tolist()
        # Who was paused or ended meanwhile does not wait for this token any more.
        landed = [row for row, sequence in enumerate(flight.sequences) if sequence.launch == flight.number]
        for row in landed:
            if row in flight.logits:
                flight.sequences[row].logits = flight.logits[row]
        return [self._update(flight.sequences[row], tokens[row]) for row in landed]

    def _launch(self) -> bool:
        """Plan a step and give it to the devices; False if there was nothing to run."""
        self.plan, began, number = None, monotonic(), self.launched + 1
        with self.ranges("schedule", self.scheduler.live):
            self.plan = plan = self.scheduler.schedule()
        for sequence in plan.admitted:
            sequence.admitted = (began, number)
        logits, order = self.runner.run(plan)
        for splice in plan.splices:
            splice.sequence.attached(splice.span, splice.position)
        for work in plan.work:
            sequence = work.sequence
            sequence.counters.prefilled += work.count - sequence.unrun_samples
            sequence.unrun_samples = 0
            if not sequence.modest:
                sequence.table.register(sequence.tokens)
        if not plan.work:
            return False
        flight = Flight(number, began, plan, [work.sequence for work in order])
        self._flights.append(flight)
        for row, sequence in enumerate(flight.sequences):
            sequence.launch = number
            if sequence.keep_logits:  # grammars change them in place
                flight.logits[row], sequence.keep_logits = logits[row].to(torch.float32, copy=True), False
        if order:
            with self.ranges("sample", flight.sequences):
                flight.tokens = Readback(draw(logits, flight.sequences))
        return True

    def check(self) -> None:
        """Recount every block reference from scratch; raises AssertionError on any difference."""
        tables = [s.table.blocks for s in self.sequences]
        self.pool.check([*tables, *(span.blocks for s in self.sequences for span in s.kept)])
        self.space.check(copy for s in self.sequences for copy in s.table.host)

    def _update(self, sequence: Sequence, token: int) -> Sampled:
        sequence.launch = 0
        sequence.tokens.append(token)
        sequence.unrun_samples = 1
        sequence.counters.decoded += 1
        sequence.budget -= 1
        stop = None
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        if token in self.eos_ids:
            stop = Stop.EOS
        elif sequence.budget <= 0:
            stop = Stop.LENGTH
        elif len(sequence.tokens) >= self.max_sequence_tokens:
            stop = Stop.CONTEXT
        if stop is not None:
            self.scheduler.pause(sequence)
        return Sampled(sequence, token, stop)

    def _check_room(self, key: str, length: int) -> None:
        if length < 1:
            raise ValueError(f"{key} has no tokens to start from")
        if length >= self.max_sequence_tokens:
            raise ValueError(
                f"{key} has {length} tokens and a sequence may have {self.max_sequence_tokens}: "
                f"raise --max-sequence-tokens (and --kv-blocks), or shorten the task or the budgets"
            )


def _placed(sequence: Sequence, tokens: list[int], splices: SequenceOf[tuple[int, Span]]) -> list[tuple[int, Span]]:
    """``splices`` by their positions in the sequence that ``tokens`` is appended to. Raises ValueError."""
    free, base = 0, len(sequence.tokens)
    if sequence.splices:
        position, span = sequence.splices[-1]
        free = max(0, position + len(span) + 1 - base)
    for index, span in splices:
        stop = index + len(span)
        if not free <= index < stop < len(tokens) or tuple(tokens[index:stop]) != span.tokens:
            raise ValueError(f"{sequence.key}: a span cannot go to tokens {index} to {stop} of {len(tokens)}")
        free = stop + 1
    return [(base + index, span) for index, span in splices]
