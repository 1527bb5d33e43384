"""Which sequences run in the next step, on which blocks. Policy only: no model, no tensors, no clock."""

from bisect import insort
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import chain

from rrm_engine.engine.draft import Drafting
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.host import HostSpace, SwapCosts, SwapIn, SwapOut
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockCopy


class EngineStuck(RuntimeError):
    """Unfinished work and an empty schedule: a bug, reported instead of spinning."""


@dataclass(frozen=True, slots=True)
class Work:
    """Run ``sequence.tokens[start : start + count]``; ``samples`` if that reaches the sequence's end.

    ``ahead``: it is a single token, sampled by an earlier step and not known to the host yet. ``drafted``: it is a
    single token, this guess, and the sequence may turn out to have another one there.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    ahead: bool = False
    drafted: int | None = None

    @property
    def prefilled(self) -> int:
        """How many of its tokens are prefill: neither guessed nor sampled in the sequence's last step."""
        if self.drafted is not None:
            return 0
        return self.count - (1 if self.ahead else self.sequence.unrun_samples)


@dataclass(frozen=True, slots=True)
class Splice:
    """Attach the KV of ``span`` to ``sequence`` as that of its tokens from ``position`` on."""

    sequence: Sequence
    span: Span
    position: int


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: swap out, copy, swap in, splice, run ``work``, in this order, because each of these may overwrite what
    the ones before it read. A sequence has several work items where spans are attached between them, and one more for
    each drafted token; they are consecutive and in order.
    """

    work: tuple[Work, ...]
    copies: tuple[BlockCopy, ...]
    swap_outs: tuple[SwapOut, ...] = ()
    swap_ins: tuple[SwapIn, ...] = ()
    swapped: tuple[str, ...] = ()  # keys of the sequences whose blocks are swapped
    splices: tuple[Splice, ...] = ()  # their spans are held until the step has been launched
    admitted: tuple[Sequence, ...] = ()  # sequences that went from waiting to running


class Scheduler:
    """Sequences are scheduled in order of priority; memory is reclaimed in the opposite order.

    Why it cannot deadlock: a sequence may reclaim all blocks but those of live sequences of higher priority, and no
    live sequence has higher priority than the first. Reclaiming from a sequence also frees the spans it keeps, and as a
    last resort a sequence gives up its own spans. Alone it fits, because the pool holds one sequence of the greatest
    length allowed (checked at start). So the first one runs in every step until it pauses or ends, and then the next is
    first. A span is attached only together with tokens to run after it, so a step that attaches also runs tokens.

    With several ``stages`` that many steps are launched before the tokens of the first are known. A sequence whose
    token is in flight is left out; the above then holds for the first sequence without one, and every step in flight
    ends by itself. Blocks may be reclaimed from a sequence in flight as from any other: see ``ModelRunner``.

    With lookahead a sequence whose token has been sampled on the device, but not read by the host, may run that token
    (``drawn`` in ``schedule``), and is then in two consecutive steps. If it ends or pauses with the first step's token,
    the second's is discarded, and the KV beyond the tokens it has.

    Drafts are planned last, in what room is left: nothing is reclaimed for them, and one free block for each running
    sequence is left, because its next token may need one before the drafts have been checked. How many tokens a step
    with drafts gives a sequence is unknown until it is collected, so the sequence does not run ahead of it.
    """

    def __init__(
        self,
        pool: BlockPool,
        settings: EngineSettings,
        space: HostSpace,
        costs: SwapCosts | None = None,
    ) -> None:
        """``costs``: by what the wait policy ``auto`` chooses, out of blocks, between offloading and dropping the KV of
        a waiting sequence. Without them it drops.
        """
        self.pool = pool
        self.space = space
        self.costs = costs
        self.wait_policy = settings.wait_policy
        self.max_sequences = settings.max_sequences
        self.step_tokens = settings.step_tokens
        self.stages = settings.stages
        self.drafting: Drafting | None = None
        self.ranges = Ranges()
        self.live: list[Sequence] = []  # waiting and running, by priority
        self.paused: dict[str, Sequence] = {}
        self._running = 0
        self._pressed = False  # a live sequence's blocks were reclaimed in this step
        self._admitted: list[Sequence] = []  # in this step
        self._swap_outs: list[SwapOut] = []  # for the next step to carry out
        self._swap_ins: list[SwapIn] = []
        self._swapped: list[str] = []
        self._held: list[tuple[object, ...]] | None = None  # what paused sequences held when ``_pinned`` was counted
        self._pinned = 0

    @property
    def running(self) -> int:
        return self._running

    @property
    def pinned_blocks(self) -> int:
        """Blocks that paused sequences hold, a shared one counted once.

        Recounted only when it may have changed: while a sequence is paused its table can only get shorter, so equal
        lengths mean equal blocks.
        """
        paused = self.paused.values()
        held = [(s, len(s.table.blocks), *s.kept) for s in paused]
        if held != self._held:
            blocks = (s.table.blocks for s in paused), (k.blocks for s in paused for k in s.kept)
            self._held, self._pinned = held, len(set[int]().union(*chain(*blocks)))
        return self._pinned

    def add(self, sequence: Sequence) -> None:
        """Let a new or paused sequence take part."""
        self.paused.pop(sequence.key, None)
        sequence.state = State.WAITING
        insort(self.live, sequence, key=lambda s: s.priority)

    def pause(self, sequence: Sequence) -> None:
        """Take a sequence out of the steps; it keeps its blocks until memory runs out."""
        self._remove(sequence)
        sequence.state = State.PAUSED
        self.paused[sequence.key] = sequence
        self._held = None  # paused again, it may hold other blocks than before, though equally many

    def wait(self, sequence: Sequence) -> None:
        """A paused sequence waits for others: keep, move or give up its KV, by the wait policy."""
        match self.wait_policy:
            case "offload":
                self._offload(sequence, sequence.table.first_own)
            case "drop":
                sequence.table.discard()
            case "lru":
                sequence.table.release()

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in any state and give its blocks back."""
        if sequence.state is State.FINISHED:
            return
        self._remove(sequence)
        self.paused.pop(sequence.key, None)
        sequence.state = State.FINISHED
        sequence.table.release()
        for span in list(sequence.kept):
            sequence.let_go(span)

    def schedule(self, drawn: Container[Sequence] = ()) -> SchedulerOutput:
        """Choose the next step's work: decodes of all running sequences, prefill chunks up to the token budget.

        With several stages a step takes only its share of the decodes, or all sequences would be in one of the steps in
        flight and the other stages idle; the next ``stages`` steps together take all of them. A step without work means
        that every sequence that can run is in flight. Sequences of ``drawn`` may run the token they wait for, those
        whose token was launched earliest first, because it is ready first.

        Raises EngineStuck if there are live sequences, none of them can be scheduled, and none is in flight.
        """
        order = list(self.live)
        share = -(-len(order) // self.stages)
        ready = sorted((s for s in order if self._decodes(s, drawn)), key=lambda s: s.launched)
        decodes, left_out = {*ready[:share]}, {*ready[share:]}
        room = max(self.step_tokens - len(decodes), 1)
        work: list[Work] = []
        copies: list[BlockCopy] = []
        splices: list[Splice] = []
        self._pressed, self._admitted, flying = False, [], False
        for index, sequence in enumerate(order):
            flying = flying or bool(sequence.flights)
            waiting = sequence.state is State.WAITING  # perhaps only since its blocks were reclaimed in this step
            decode = sequence in decodes and not waiting
            if not decode and (sequence.flights or room <= 0 or sequence in left_out):
                continue
            lower = order[index + 1 :]
            if waiting and not self._admit(sequence, lower, alone=not work and not flying):
                continue
            victims = self._victims(sequence, lower, siblings=True)
            runs, new_copies, new_splices = self._run(sequence, 1 if decode else room, victims)
            if not decode:
                room -= sum(run.count for run in runs)
            sequence.counters.copied_blocks += len(new_copies)
            work += runs
            copies += new_copies
            splices += new_splices
        if order and not work and not flying:
            raise EngineStuck(f"{len(self.live)} live sequences, {self.pool.num_free} free blocks, nothing to run")
        work = self._with_drafts(work)
        swaps = tuple(self._swap_outs), tuple(self._swap_ins), tuple(self._swapped)
        output = SchedulerOutput(tuple(work), tuple(copies), *swaps, tuple(splices), tuple(self._admitted))
        self._swap_outs, self._swap_ins, self._swapped = [], [], []
        return output

    def _decodes(self, sequence: Sequence, drawn: Container[Sequence]) -> bool:
        """Whether it can decode now: run its last token, which may still be in flight."""
        if sequence.state is not State.RUNNING or sequence.pending != 1:
            return False
        if not sequence.flights:
            return True
        waits = self.drafting is not None and self.drafting.expects(sequence)
        return sequence in drawn and sequence.can_run_ahead and not waits

    def _run(
        self, sequence: Sequence, room: int, victims: Iterator[Sequence]
    ) -> tuple[list[Work], list[BlockCopy], list[Splice]]:
        """Plan up to ``room`` tokens of a sequence and attach the spans between them; nothing if blocks run out."""
        table = sequence.table
        runs: list[Work] = []
        copies: list[BlockCopy] = []
        splices: list[Splice] = []
        while sequence.pending and room:
            attach, stop = _ahead(sequence)
            skip = len(attach) if attach else 0
            count = min(stop - table.length - skip, room)
            if not self._make_room(sequence, skip + count, victims):
                if runs or not sequence.give_up_spans():
                    break
                continue  # now their tokens are to be run
            if attach is not None:
                splices.append(Splice(sequence, attach, table.length))
                del sequence.splices[0]
                copies += table.append(skip, exact=False)
            start = table.length
            copies += table.append(count)
            runs.append(Work(sequence, start, count, sequence.pending == 0, ahead=bool(sequence.flights)))
            room -= count
        return runs, copies, splices

    def _with_drafts(self, work: list[Work]) -> list[Work]:
        """``work``, each decode followed by the tokens guessed to come next, as far as free blocks allow."""
        decodes = [run for run in work if run.count == 1 and run.samples and not run.ahead]
        if self.drafting is None or not decodes:
            return work
        rows = sum(run.count for run in work)
        drafts = self.drafting.choose([run.sequence for run in decodes], rows, self.step_tokens - rows)
        planned = []
        for run in work:
            planned.append(run)
            table, draft = run.sequence.table, drafts.get(run.sequence, []) if run.samples else []
            while draft and table.blocks_needed(len(draft)) + self._running > self.pool.num_free:
                draft.pop()
            if draft:
                copies = table.append(len(draft))
                assert not copies, "a partial last block was copied for the token before, so it is not shared"
            planned += [Work(run.sequence, run.start + i, 1, True, drafted=token) for i, token in enumerate(draft, 1)]
        return planned

    def _admit(self, sequence: Sequence, lower: list[Sequence], alone: bool) -> bool:
        """Admit a waiting sequence if all its pending tokens fit, and one more block for each running sequence.

        With ``alone`` (nothing else runs in this step) its first chunk, and what it has in host memory, is enough: some
        sequence must make progress. Otherwise a step that preempted admits none, or it would at once admit again what
        it preempted. Where ``max_sequences`` are running, it takes the place of the last running sequence of lower
        priority, which then waits and keeps its KV.
        """
        full = self._running >= self.max_sequences
        last = next((s for s in reversed(lower) if s.state is State.RUNNING), None) if full else None
        if (full and last is None) or (self._pressed and not alone):
            return False
        table = sequence.table
        reused = table.reuse(sequence.tokens) if not (table.stored or sequence.probe.best_effort) else 0
        if alone:
            moved = table.stored - table.length
            victims = self._victims(sequence, lower, siblings=True)
            fits = self._make_room(sequence, moved, victims)
            if not fits and not (sequence.give_up_spans() and self._make_room(sequence, moved, victims)):
                return False
        else:
            victims = self._victims(sequence, lower, siblings=False)
            if not self._make_room(sequence, sequence.pending, victims, headroom=self._running):
                if reused:
                    table.release()
                return False
        if last is not None and last.state is State.RUNNING:  # else it was preempted just now, to make room
            self._running -= 1
            last.state = State.WAITING
        sequence.counters.reused += reused
        if table.host:
            swap_ins = table.restore()
            sequence.counters.restored_blocks += sum(len(blocks) for _, blocks in swap_ins)
            self._swap_ins += swap_ins
            self._swapped.append(sequence.key)
        sequence.state = State.RUNNING
        self._running += 1
        self._admitted.append(sequence)
        return True

    def _make_room(self, sequence: Sequence, count: int, victims: Iterator[Sequence], headroom: int = 0) -> bool:
        """Reclaim from ``victims`` until ``count`` more tokens fit; False if that is not enough. Blocks that others
        share do not come free, so what is free is checked again after each victim.
        """
        while sequence.table.blocks_needed(count) + headroom > self.pool.num_free:
            victim = next(victims, None)
            if victim is None:
                return False
            self.ranges.reclaims(victim, sequence)
            self._reclaim(victim)
        return True

    def _victims(self, sequence: Sequence, lower: list[Sequence], siblings: bool) -> Iterator[Sequence]:
        """Whose blocks to reclaim, in this order: live sequences of younger roots, paused sequences, and with
        ``siblings`` live sequences of the same root. ``lower`` are the live sequences of lower priority, none of which
        is scheduled in this step yet.
        """
        if sequence.probe.best_effort and sequence is not self.live[0]:
            return
        holders = [s for s in reversed(lower) if s.holds_blocks]
        yield from (s for s in holders if s.root > sequence.root)
        yield from sorted((s for s in self.paused.values() if s.holds_blocks), key=lambda s: s.priority, reverse=True)
        if siblings:
            yield from (s for s in holders if s.root == sequence.root)

    def _reclaim(self, victim: Sequence) -> None:
        """Give up a sequence's KV, to be recomputed from its tokens. That of a paused one may go to host memory
        instead.
        """
        victim.give_up_spans()
        held = bool(victim.table.blocks)
        if victim.state is State.PAUSED:
            if held and not (self._worth_moving(victim) and self._offload(victim, 0)):
                victim.table.release()
                victim.counters.dropped += 1
            return
        if held:
            victim.table.release()
            victim.counters.preemptions += 1
        self._pressed = True
        if victim.state is State.RUNNING:
            self._running -= 1
            victim.state = State.WAITING

    def _worth_moving(self, sequence: Sequence) -> bool:
        if self.wait_policy == "auto" and self.costs is not None:
            return self.costs.offload_is_cheaper(len(sequence.table.blocks), sequence.table.length)
        return self.wait_policy == "offload"

    def _offload(self, sequence: Sequence, first: int) -> bool:
        """Move a paused sequence's blocks, from index ``first`` on, to the host; False if there is no room for them."""
        swap_out = sequence.table.offload(first)
        if swap_out is None:
            return False
        sequence.counters.offloaded_blocks += len(swap_out[1])
        self._swap_outs.append(swap_out)
        self._swapped.append(sequence.key)
        return True

    def _remove(self, sequence: Sequence) -> None:
        sequence.flights.clear()  # tokens in flight are discarded
        if sequence.table.stored > len(sequence.tokens):
            sequence.table.truncate(len(sequence.tokens))
        if sequence.state is State.RUNNING:
            self._running -= 1
        if sequence.state in (State.WAITING, State.RUNNING):
            self.live.remove(sequence)


def _ahead(sequence: Sequence) -> tuple[Span | None, int]:
    """The span to attach right where the sequence's KV ends, if any, and the end of the tokens to run next: where the
    next span begins, or the sequence's own end.
    """
    attach, following = None, sequence.next_splice()
    if following is not None and following[0] == sequence.table.length:
        attach = following[1]
        following = next(((p, s) for p, s in sequence.splices[1:] if s.live), None)
    return attach, following[0] if following is not None else sequence.length
