"""Tokens in, tokens out: submit, fork, pause, resume and finish sequences between steps; ``step`` runs them all."""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import monotonic
from typing import TypedDict, Unpack

import torch

from rrm_engine.device.transfer import Readback
from rrm_engine.engine.draft import Drafting
from rrm_engine.engine.draw import draw
from rrm_engine.engine.flight import Flight
from rrm_engine.engine.packing import Drawn
from rrm_engine.engine.processors import Processed, Processors
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams, noise_key
from rrm_engine.engine.scheduler import Scheduler, SchedulerOutput
from rrm_engine.engine.sequence import Matcher, Sequence, Stop
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.errors import NoRoom, RrmError
from rrm_engine.kv.host import HostSpace, SwapCosts
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockTable


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sequence's new token, as it was sampled. With ``stop`` the sequence is paused: finish or resume it.

    ``error`` is what its grammar raised when it was told of the token, with ``Stop.ERROR``: others are not concerned.
    """

    sequence: Sequence
    token: int
    stop: Stop | None
    error: Exception | None = None


class Submission(TypedDict, total=False):
    """Options of a submission. ``root`` and ``depth`` (default 0) are the sequence's priority: see ``Sequence``.

    ``fork_of`` is (parent, n): the first n tokens are the parent's, and share its blocks.
    """

    root: int
    depth: int
    matcher: Matcher | None
    fork_of: tuple[Sequence, int] | None


class Engine:
    """A continuous batch over one block pool.

    Between steps every sequence may be paused, truncated, forked, resumed or finished. A paused sequence keeps its
    blocks unless memory runs out, and goes on with exactly the tokens it had.

    With several ``stages`` (a model whose layers lie on several devices) up to that many steps are in flight, each with
    other sequences, and a call of ``step`` hands out the tokens of the oldest. A sequence in flight may be paused or
    finished too; it then does not get the token that is being computed.

    With ``lookahead`` one more step is launched before the tokens of the oldest are read, so that the host handles
    those tokens, and plans and packs the next step, while the devices compute.

    With drafts (see ``draft``) a step may give a sequence several tokens. They are handed out one by one, by as many
    calls of ``step``. A caller that pauses or ends the sequence after one of them discards the rest.
    """

    def __init__(
        self,
        runner: ModelRunner,
        settings: EngineSettings,
        costs: SwapCosts | None = None,
    ) -> None:
        """``costs``: what the wait policy ``auto`` compares to choose between offloading and dropping KV.

        Raises RrmError if the pool cannot hold one sequence of ``max_sequence_tokens``.
        """
        blocks = -(-settings.max_sequence_tokens // settings.block_size)
        if blocks > settings.blocks:
            raise RrmError(
                f"one sequence of {settings.max_sequence_tokens} tokens takes {blocks} KV blocks of "
                f"{settings.block_size}, the pool has {settings.blocks}: raise --kv-blocks to at least {blocks}, or "
                f"lower --max-sequence-tokens or the phases' token budgets"
            )
        self.runner = runner
        self.settings = settings
        self.pool = BlockPool(settings.blocks, settings.block_size, settings.prefix_cache)
        self.space = HostSpace(settings.host_blocks)
        self.scheduler = Scheduler(self.pool, settings, self.space, costs)
        self.drafting: Drafting | None = None
        self.eos_ids = settings.eos_ids
        self.steps = 0  # collected so far
        self.began = 0.0  # when the step collected last began, on the monotonic clock
        self.ranges = Ranges()
        self.plan: SchedulerOutput | None = None  # of the last step; what was running if that failed
        self._flights: deque[Flight] = deque()
        self._number = 0  # of the step collected last
        self._given: dict[Sequence, deque[int]] = {}  # of that step: the tokens not handed out yet
        self._processors = Processors(settings.eos_ids)
        self._arrivals = 0

    def announce_to(self, ranges: Ranges) -> None:
        """From now on report each part of a step, and each reclaim of KV, to ``ranges``."""
        self.ranges = self.runner.ranges = self.scheduler.ranges = ranges

    def draft(self, drafting: Drafting) -> None:
        """From now on run the tokens that ``drafting`` guesses together with the last token of each sequence."""
        self.drafting = self.scheduler.drafting = drafting

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that is not finished."""
        return [*self.scheduler.live, *self.scheduler.paused.values()]

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live)

    @property
    def launched(self) -> int:
        """The number of the step launched last: those collected and those in flight, counted."""
        return self.steps + len(self._flights)

    @property
    def left(self) -> bool:
        """Whether the last step gave more tokens than have been handed out."""
        return any(self._number in sequence.flights for sequence in self._given)

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

    @property
    def engines(self) -> SequenceOf["Engine"]:
        """Only itself; ``Replicas`` has several."""
        return (self,)

    def of(self, sequence: Sequence) -> "Engine":
        """The engine that a sequence is on: itself."""
        return self

    def progress(self) -> dict[str, int]:
        """How many sequences and blocks are in each state now."""
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
        **options: Unpack[Submission],
    ) -> Sequence:
        """Add a sequence that may sample ``budget`` tokens; its first token comes with the next step.

        Raises NoRoom, with the numbers, if ``tokens`` leaves no room for a single new one, RrmError if it holds one
        that the model does not know.
        """
        self._check_room(key, len(tokens))
        self._check_known(key, tokens)
        table = BlockTable(self.pool, self.space)
        self._arrivals += 1
        sequence = Sequence(
            key,
            tokens,
            table,
            sampling,
            noise_key(self.settings.seed, key),
            budget,
            self.settings.max_sequence_tokens,
            options.get("root", 0),
            options.get("depth", 0),
            self._arrivals,
            options.get("matcher"),
            first=len(tokens),
        )
        if (fork_of := options.get("fork_of")) is not None:
            parent, length = fork_of
            # The last token is always run, even if its KV is there: its logits are needed.
            sequence.table = parent.table.fork(min(length, parent.table.length, len(tokens) - 1))
            sequence.counters.reused = sequence.table.length
            sequence.counters.forked_blocks = len(sequence.table.blocks)
        self.scheduler.add(sequence)
        return sequence

    def pause(self, sequence: Sequence) -> None:
        self.scheduler.pause(sequence)
        self._processors.forget(sequence)

    def wait(self, sequence: Sequence) -> None:
        """Apply the wait policy to a paused sequence that waits for others: keep, move or give up its KV."""
        self.scheduler.wait(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Make a paused sequence forget its tokens from ``length`` on, and the spans that were to be attached there."""
        dropped = len(sequence.tokens) - length
        del sequence.tokens[length:]
        sequence.drop_splices(length)
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
        """Append ``tokens`` to a paused sequence and let it sample ``budget`` more; only new tokens are prefilled.

        ``splices`` are (index in ``tokens``, kept span): the KV of those tokens is not computed but attached from the
        span, rotated to its new positions. A span reclaimed by then is prefilled as text. At least one token to run
        follows each span.

        Raises NoRoom, with the numbers, if they leave no room for a single new token, RrmError if they hold one that
        the model does not know.
        """
        self._check_room(sequence.key, len(sequence.tokens) + len(tokens))
        self._check_known(sequence.key, tokens)
        sequence.splices += _placed(sequence, tokens, splices)
        sequence.tokens += tokens
        # The last token is always run: its logits are needed.
        sequence.table.truncate(min(sequence.table.stored, len(sequence.tokens) - 1))
        sequence.budget = budget
        sequence.sampling = sampling or sequence.sampling
        sequence.matcher = matcher
        sequence.first = len(sequence.tokens)
        self.scheduler.add(sequence)

    def keep(self, keeper: Sequence, source: Sequence, start: int, stop: int) -> Span:
        """Hold the KV of the tokens ``start`` to ``stop`` of ``source`` until ``keeper`` ends or memory runs out.

        Raises RrmError where there is no KV of them, ValueError where the two are on different engines.
        """
        if not keeper.table.pool is source.table.pool is self.pool:
            raise ValueError(f"{keeper.key} cannot hold KV of {source.key}, which is on another replica")
        span = Span(source.table, start, stop, source.tokens[start:stop])
        keeper.kept.append(span)
        return span

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._processors.forget(sequence)
        if self.drafting is not None:
            self.drafting.forget(sequence)

    def step(self) -> list[Sampled]:
        """Launch steps, then collect the oldest one in flight; returns its new tokens, one for each sequence.

        While the last step's tokens are not all handed out, hand out the next of them instead. Raises EngineStuck
        where nothing can run.
        """
        if not self.left:
            self.launch()
        return self.collect()

    def launch(self) -> None:
        """Launch steps until the allowed number is in flight, or every sequence that can run is in one."""
        most = self.settings.stages + self.settings.lookahead
        while self.has_work and len(self._flights) < most and self._launch():
            pass

    def collect(self) -> list[Sampled]:
        """The next token of each sequence: one not handed out yet, else from the oldest step in flight, which is waited
        for. Empty if nothing is in flight.
        """
        if not self.left:
            self._given = self._collected()
        sampled = []
        for sequence, tokens in list(self._given.items()):
            # One that was paused or ended meanwhile has cleared its flights: it does not get this token.
            if self._number in sequence.flights:
                sampled.append(self._update(sequence, tokens.popleft(), more=bool(tokens)))
            if not tokens:
                del self._given[sequence]
        return sampled

    def _collected(self) -> dict[Sequence, deque[int]]:
        """The tokens of the oldest step in flight, for the sequences that still wait for them."""
        if not self._flights:
            return {}
        flight = self._flights.popleft()
        self.steps, self.began, self.plan, self._number = flight.number, flight.began, flight.plan, flight.number
        self._draw(flight)
        if flight.tokens is None:
            return {}
        with self.ranges("collect", flight.order):
            tokens = flight.tokens.tolist()
        rows: dict[Sequence, list[tuple[int | None, int]]] = {}
        for work, token in zip(flight.order, tokens, strict=True):
            if flight.number in work.sequence.flights:
                rows.setdefault(work.sequence, []).append((work.drafted, token))
        for sequence in rows.keys() & flight.kept.keys():
            sequence.probe.logits = flight.kept[sequence]
        return {sequence: self._accepted(sequence, drawn) for sequence, drawn in rows.items()}

    def _accepted(self, sequence: Sequence, drawn: list[tuple[int | None, int]]) -> deque[int]:
        """The tokens that a step gave a sequence. ``drawn`` are its rows in order: the drafted token that the row ran
        (None for the first row, which ran a real one), and the token sampled from the row.

        A drafted row is valid only if its token is the one sampled from the row before; KV of the others is dropped.
        """
        tokens = deque([drawn[0][1]])
        for drafted, token in drawn[1:]:
            if drafted != tokens[-1]:
                break
            tokens.append(token)
        if self.drafting is not None and len(drawn) > 1:
            self.drafting.checked(sequence, len(drawn) - 1, len(tokens) - 1)
            known = len(sequence.tokens) + len(tokens) - 1
            if sequence.table.length > known:  # it may have lost its blocks since the launch
                sequence.table.truncate(known)
        return tokens

    def _launch(self) -> bool:
        """Plan a step and launch it; False if there was nothing to run."""
        for earlier in self._flights:
            self._draw(earlier)
        self.plan, began, number = None, monotonic(), self.launched + 1
        with self.ranges("schedule", self.scheduler.live):
            self.plan = plan = self.scheduler.schedule(self._drawn() if self.settings.lookahead else ())
        for sequence in plan.admitted:
            sequence.admitted = (began, number)
        logits, order = self.runner.run(plan, self._unread(plan))
        for splice in plan.splices:
            splice.sequence.attached(splice.span, splice.position)
        for work in plan.work:
            sequence = work.sequence
            sequence.counters.prefilled += work.prefilled
            sequence.counters.drafted += work.drafted is not None
            sequence.unrun_samples = 0
            if not sequence.probe.best_effort:
                sequence.table.register(sequence.tokens)
        if not plan.work:
            return False
        flight = Flight(number, began, plan, order, logits if order else None)
        self._flights.append(flight)
        for row, work in enumerate(order):
            sequence = work.sequence
            if work.drafted is None:
                sequence.flights.append(number)
            if sequence.probe.keep_logits:  # a copy, for grammars write into the logits
                flight.kept[sequence], sequence.probe.keep_logits = logits[row].to(torch.float32, copy=True), False
        self._draw(flight)
        if flight.logits is not None:
            flight.logits = logits.clone()  # the next step overwrites them
        return True

    def _drawn(self) -> set[Sequence]:
        """The sequences whose only token in flight has been sampled on the device but not read by the host."""
        there = (flight for flight in self._flights if flight.tokens is not None)
        return {w.sequence for flight in there for w in flight.order if w.sequence.flights == [flight.number]}

    def _unread(self, plan: SchedulerOutput) -> Drawn | None:
        """The tokens that this step runs although the host has not read them yet."""
        return self._tokens_of({work.sequence.flights[-1] for work in plan.work if work.ahead}, self.runner.device)

    def _tokens_of(self, numbers: set[int], device: torch.device) -> Drawn | None:
        """The tokens sampled in the steps in flight with these ``numbers``."""
        flights = [flight for flight in self._flights if flight.number in numbers]
        tokens = [flight.tokens.on(device) for flight in flights if flight.tokens is not None]
        if not tokens:
            return None
        # A sequence may be in several of them: its last row is the one that counts.
        order = (work.sequence for flight in flights for work in flight.order)
        return Drawn(tokens[0] if len(tokens) == 1 else torch.cat(tokens), {s: row for row, s in enumerate(order)})

    def _draw(self, flight: Flight) -> None:
        """Sample a step's tokens, unless that was done or a grammar still has to be told of an earlier token.

        The token of a sequence that was paused or ended meanwhile is never read, so it may be any.
        """
        if flight.logits is None or flight.waits_for_tokens:
            return
        sequences = [work.sequence for work in flight.order]
        positions = [work.start + work.count for work in flight.order]
        with self.ranges("sample", sequences):
            processed, matchers = self._processed(flight, sequences, positions), flight.matchers()
            tokens = draw(flight.logits, sequences, positions, processed, matchers)
            flight.tokens, flight.logits = Readback(tokens), None

    def _processed(self, flight: Flight, sequences: list[Sequence], positions: list[int]) -> Processed | None:
        """The rows of a step that have logits processors. Rows whose sequence was paused or ended are left out."""
        rows = [row for row, s in enumerate(sequences) if s.sampling.further and flight.number in s.flights]
        if not rows:
            return None
        assert flight.logits is not None
        later = (sequences[row] for row in rows if sequences[row].flights[0] != flight.number)
        unread = self._tokens_of({s.flights[s.flights.index(flight.number) - 1] for s in later}, flight.logits.device)
        drafted = [work.drafted for work in flight.order]
        return self._processors.of(rows, sequences, positions, unread, drafted)

    def check(self) -> None:
        """Recount every block reference from the tables and spans; raises AssertionError on any difference."""
        tables = [s.table.blocks for s in self.sequences]
        self.pool.check([*tables, *(span.blocks for s in self.sequences for span in s.kept)])
        self.space.check(copy for s in self.sequences for copy in s.table.host)

    def _update(self, sequence: Sequence, token: int, more: bool) -> Sampled:
        """Hand out a token. ``more``: it is an accepted draft, and the step gave another token after it."""
        if more:
            sequence.counters.accepted += 1
        else:
            del sequence.flights[0]
        sequence.tokens.append(sequence.probe.forced.popleft() if sequence.probe.forced else token)
        sequence.unrun_samples = 0 if sequence.flights else 1
        sequence.counters.decoded += 1
        sequence.budget -= 1
        stop, error = None, _told(sequence, token)
        if error is not None:
            stop = Stop.ERROR
        elif token in self.eos_ids:
            stop = Stop.EOS
        elif sequence.budget <= 0:
            stop = Stop.LENGTH
        elif len(sequence.tokens) >= sequence.longest:
            stop = Stop.CONTEXT
        if stop is not None:
            self.pause(sequence)
        return Sampled(sequence, token, stop, error)

    def _check_room(self, key: str, length: int) -> None:
        if length < 1:
            raise RrmError(f"{key} has no tokens to start from")
        if length >= (most := self.settings.max_sequence_tokens):
            raise NoRoom(
                f"{key} has {length} tokens and a sequence may have {most}: "
                f"raise --max-sequence-tokens (and --kv-blocks), or shorten the task or the budgets"
            )

    def _check_known(self, key: str, tokens: list[int]) -> None:
        vocabulary = self.settings.vocabulary
        if (unknown := next((t for t in tokens if not 0 <= t < vocabulary), None)) is not None:
            raise RrmError(
                f"{key} has token {unknown} and the model's vocabulary has {vocabulary}: its tokenizer is another "
                f"model's, or was added to; use the one that belongs to it"
            )


def _told(sequence: Sequence, token: int) -> Exception | None:
    """Tell the sequence's grammar of a token; returns the exception that it raised, if any."""
    try:
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
    except Exception as error:
        return error
    return None


def _placed(sequence: Sequence, tokens: list[int], splices: SequenceOf[tuple[int, Span]]) -> list[tuple[int, Span]]:
    """``splices`` by position in the whole sequence, to which ``tokens`` are appended.

    Raises ValueError where a span's tokens are not there, overlap another's, or have no token to run after them.
    """
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
