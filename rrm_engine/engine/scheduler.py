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

    ``ahead``: it is one token, which the step before samples and the host does not know yet. ``drafted``: it is this
    one token, a guess; the sequence may come to have another one there.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    ahead: bool = False
    drafted: int | None = None

    @property
    def prefilled(self) -> int:
        """How many of its tokens were neither guessed nor sampled in the sequence's last step."""
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
    """One step: swap out, copy, swap in, splice, run ``work``; in this order, for each may overwrite what the ones
    before it read. A sequence has several work items where spans are attached between them, or drafted tokens follow
    the last one; they stand in order and side by side.
    """

    work: tuple[Work, ...]
    copies: tuple[BlockCopy, ...]
    swap_outs: tuple[SwapOut, ...] = ()
    swap_ins: tuple[SwapIn, ...] = ()
    swapped: tuple[str, ...] = ()  # keys of the sequences whose blocks are swapped
    splices: tuple[Splice, ...] = ()  # the spans are held until the step has run
    admitted: tuple[Sequence, ...] = ()  # those that were waiting before


class Scheduler:
    """Sequences are served in the order of their priority; memory is taken from the other end of that order.

    Why it cannot wedge: the first live sequence may reclaim every block that no sequence of higher priority was
    scheduled on, and none has higher priority. Kept spans are reclaimed with the table of the sequence that keeps them,
    and its own it gives up when nothing else is left. Alone it fits, because the pool holds one sequence of the
    greatest length allowed (checked at start). So it runs in every step until it pauses or ends, and then the next one
    is first. A span is attached only together with the tokens that are run after it, so a step that attaches also runs.

    With several ``stages`` as many steps are launched before the first one's tokens are there. A sequence that waits
    for a token is left out; all of the above holds for the first one that does not, and no token takes longer than the
    steps in flight. Blocks may be taken from a sequence in flight like from any other: see ``ModelRunner``.

    One that waits for a token that has been sampled and not been read may run it all the same (``schedule``), and is
    then in two consecutive steps at once. A sequence that ends or pauses with the first one's token loses the second
    one's, and the KV past the tokens it has.

    Drafts are planned last and take what is left over: nothing is reclaimed for them, and a free block is left for each
    running sequence, whose next token may need it before they have been checked. How many tokens such a step gives is
    not known, so its sequence is not run ahead.
    """

    def __init__(
        self,
        pool: BlockPool,
        settings: EngineSettings,
        space: HostSpace,
        costs: SwapCosts | None = None,
    ) -> None:
        """``costs`` decide what ``auto`` does with a waiting sequence under pressure; without them it is dropped."""
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
        self._pressed = False  # this step had to take a live sequence's blocks
        self._admitted: list[Sequence] = []  # in this step
        self._swap_outs: list[SwapOut] = []  # for the next step to carry out
        self._swap_ins: list[SwapIn] = []
        self._swapped: list[str] = []
        self._held: list[tuple[object, ...]] | None = None  # by which sequences, when ``_pinned`` was counted
        self._pinned = 0

    @property
    def running(self) -> int:
        return self._running

    @property
    def pinned_blocks(self) -> int:
        """Blocks that paused sequences hold, a shared one counted once.

        Counted anew only when it may have changed: as long as a sequence is paused its table only ever gets shorter.
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
        self._held = None  # it may hold as many blocks as when it was paused before, and others

    def wait(self, sequence: Sequence) -> None:
        """A paused sequence waits for others: its KV is kept, moved or given up as the policy says."""
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

        With several stages only their share of the decodes, so that the steps in flight do not collapse into one; a
        sequence that is left out now is in one of the next ``stages`` steps, which together take all of them. A step
        without work means that every sequence that could run is in flight. Those of ``drawn`` may run the token
        they wait for, the longest waiting first: the device has last what is sampled last.

        Raises EngineStuck if there is live work, none of it can be scheduled, and none is in flight.
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
            waiting = sequence.state is State.WAITING  # maybe only just: its blocks may have been taken in this step
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
        """Whether it can run its last token now, the one in flight if it has one."""
        if sequence.state is not State.RUNNING or sequence.pending != 1:
            return False
        if not sequence.flights:
            return True
        waits = self.drafting is not None and self.drafting.expects(sequence)
        return sequence in drawn and sequence.can_run_ahead and not waits

    def _run(
        self, sequence: Sequence, room: int, victims: Iterator[Sequence]
    ) -> tuple[list[Work], list[BlockCopy], list[Splice]]:
        """Plan up to ``room`` tokens of a sequence, the spans between them attached; nothing if they do not fit."""
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
                continue  # as text
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
        """``work`` and after each decode the tokens that are guessed to follow, as far as there is room for them."""
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
                assert not copies, "its last block was made its own for the token before"
            planned += [Work(run.sequence, run.start + i, 1, True, drafted=token) for i, token in enumerate(draft, 1)]
        return planned

    def _admit(self, sequence: Sequence, lower: list[Sequence], alone: bool) -> bool:
        """Let a waiting sequence start, if its whole prompt and one more block for each running one fit.

        When nothing else runs in this step it is let in on what one chunk takes (and on what it has in host memory):
        some sequence must make progress.
        Otherwise a step that had to preempt admits none, or the preempted ones would be admitted again at once.
        Where all places are taken, it gets that of the last running one after it, which then waits and keeps its KV.
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
        if last is not None and last.state is State.RUNNING:  # else its blocks were taken just now
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
        """Reclaim until ``count`` more tokens fit; counts only blocks that really came free."""
        while sequence.table.blocks_needed(count) + headroom > self.pool.num_free:
            victim = next(victims, None)
            if victim is None:
                return False
            self.ranges.reclaims(victim, sequence)
            self._reclaim(victim)
        return True

    def _victims(self, sequence: Sequence, lower: list[Sequence], siblings: bool) -> Iterator[Sequence]:
        """Whose blocks to take, cheapest loss first: younger roots, then paused sequences, then later siblings.

        ``lower`` are the live sequences of lower priority; none of them is scheduled in this step yet.
        """
        if sequence.probe.best_effort and sequence is not self.live[0]:
            return
        holders = [s for s in reversed(lower) if s.holds_blocks]
        yield from (s for s in holders if s.root > sequence.root)
        yield from sorted((s for s in self.paused.values() if s.holds_blocks), key=lambda s: s.priority, reverse=True)
        if siblings:
            yield from (s for s in holders if s.root == sequence.root)

    def _reclaim(self, victim: Sequence) -> None:
        """Give up a sequence's KV, to be recomputed from its tokens; a waiting one's may go to host memory instead."""
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
        """Move a paused sequence's blocks from index ``first`` on; False if host memory has no room for them."""
        swap_out = sequence.table.offload(first)
        if swap_out is None:
            return False
        sequence.counters.offloaded_blocks += len(swap_out[1])
        self._swap_outs.append(swap_out)
        self._swapped.append(sequence.key)
        return True

    def _remove(self, sequence: Sequence) -> None:
        sequence.flights.clear()  # the tokens it may be waiting for are thrown away
        if sequence.table.stored > len(sequence.tokens):
            sequence.table.truncate(len(sequence.tokens))
        if sequence.state is State.RUNNING:
            self._running -= 1
        if sequence.state in (State.WAITING, State.RUNNING):
            self.live.remove(sequence)


def _ahead(sequence: Sequence) -> tuple[Span | None, int]:
    """The span to attach where the sequence's KV ends, if any, and where the tokens to run next end."""
    attach, following = None, sequence.next_splice()
    if following is not None and following[0] == sequence.table.length:
        attach = following[1]
        following = next(((p, s) for p, s in sequence.splices[1:] if s.live), None)
    return attach, following[0] if following is not None else sequence.length
