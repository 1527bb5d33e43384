"""Lives on the bookkeeping: an engine whose model is a memory, and the checks of every step.

The engine is the real one; its model is a memory in which a slot holds the whole token history its KV would have
been made from. Each step is packed as for a model, and every packed query must find, over the block table it is
given, exactly the tokens of its own sequence. That covers copies, preemption and reuse of blocks within one step.
Where a span was attached it must find the histories of the sequence the span was taken from, moved to that place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.draft import MOST, SIZES, Drafting
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.packing import Drawn, pack
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput, Splice, Work
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.host import SwapCosts
from rrm_engine.kv.span import Span

GREEDY = SamplingParams()
CPU = torch.device("cpu")
EOS = 2
VOCABULARY = 3  # few tokens, so that prefixes meet
History = tuple[int, ...]
Moved = tuple[History, int]  # attached KV: the history it was made from, and the position it was moved to
Content = History | Moved | None


class Memory:
    """Stands where the model runner is: stores histories instead of KV, and checks what attention would read."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.slots: list[Content] = [None] * ((blocks + 1) * size)
        self.device = CPU
        self.ranges = Ranges()
        self.copied = 0
        self.queries = 0  # packed rows, each of which has been checked
        self.kept: dict[Span, list[History]] = {}  # what each span was taken from
        self.moved: dict[str, dict[int, Moved]] = {}  # by sequence: what it may read where instead of its own

    def run(self, step: SchedulerOutput, drawn: Drawn | None = None) -> tuple[torch.Tensor, list[Work]]:
        for copy, blocks in step.swap_outs:
            copy.payload = self.read(blocks)
        self.copy(step.copies)
        for copy, blocks in step.swap_ins:
            self.write(blocks, copy.payload[: len(blocks)])
        self.splice(step.splices)
        if not step.work:
            return torch.zeros(0, VOCABULARY), []
        packed = pack(step.work, self.size, CPU, drawn)
        owners = self.rows(step)
        self.queries += len(owners)
        assert packed.positions.tolist() == [len(tokens) - 1 for _, tokens in owners]
        for slot, (_, tokens) in zip(packed.batch.slots.tolist(), owners, strict=True):
            assert slot >= self.size, "the null block is written"
            self.slots[slot] = tuple(tokens)
        assert packed.token_ids.tolist() == [tokens[-1] for _, tokens in owners], "not the sequence's token"
        batch = packed.batch
        starts, lengths, tables = (t.tolist() for t in (batch.query_start, batch.context_len, batch.block_table))
        for (start, stop), length, table in zip(pairwise(starts), lengths, tables, strict=True):
            for row in range(start, stop):
                self.attend(table, length - (stop - 1 - row), *owners[row])
        logits = torch.zeros(len(packed.order), VOCABULARY)
        for row, owner in enumerate(packed.sampled.tolist()):
            logits[row, made_up(owners[owner][1])] = 1
        return logits, packed.order

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        """As the KV cache does: every source is read before any destination is written."""
        assert len({destination for _, destination in copies}) == len(copies), "one block is copied to twice"
        self.write([destination for _, destination in copies], self.read([source for source, _ in copies]))
        self.copied += len(copies)

    def splice(self, splices: tuple[Splice, ...]) -> None:
        for splice in splices:
            assert splice.span.live, "the source was given back before the step has run"
            at = range(splice.position, splice.position + len(splice.span))
            for position, source in zip(at, self.kept[splice.span], strict=True):
                self.moved.setdefault(splice.sequence.key, {})[position] = (source, position)
            self.attach(splice.span.slots, splice.sequence.table.slots(at.start, at.stop), list(at))

    def attach(self, sources: list[int], destinations: list[int], positions: list[int]) -> None:
        """As the KV cache does: read all sources, move them, write them."""
        read = [self.slots[source] for source in sources]
        for content, destination, position in zip(read, destinations, positions, strict=True):
            assert content is not None
            self.slots[destination] = (base(content), position)

    def read(self, blocks: Iterable[int]) -> list[list[Content]]:
        return [self.slots[block * self.size : (block + 1) * self.size] for block in blocks]

    def write(self, blocks: Iterable[int], contents: list[list[Content]]) -> None:
        for block, content in zip(blocks, contents, strict=True):
            self.slots[block * self.size : (block + 1) * self.size] = content

    @staticmethod
    def rows(step: SchedulerOutput) -> list[tuple[Sequence, list[int]]]:
        """Of each packed row whose it is, and the tokens up to its own."""
        decodes = sorted((w for w in step.work if w.count == 1), key=lambda w: w.start)
        ordered = [*decodes, *(w for w in step.work if w.count > 1)]
        guessed: dict[Sequence, list[int]] = {}
        rows = []
        for work in ordered:
            draft = guessed.setdefault(work.sequence, [])
            if work.drafted is not None:
                draft.append(work.drafted)
            known = foreseen(work.sequence, work.start + work.count - len(draft))
            rows += [(work.sequence, [*known, *draft][: at + 1]) for at in range(work.start, work.start + work.count)]
        return rows

    def attend(self, table: list[int], length: int, sequence: Sequence, tokens: list[int]) -> None:
        """The query of the last of ``tokens`` attends to ``length`` tokens over ``table``: they must be these."""
        assert length == len(tokens)
        read = [self.slots[table[i // self.size] * self.size + i % self.size] for i in range(length)]
        assert self.owns(sequence, tokens, read), f"{sequence.key} reads what is not its own"

    def owns(self, sequence: Sequence, tokens: list[int], read: list[Content]) -> bool:
        """Whether that is the KV of a sequence's first ``tokens``: made from them, or attached and moved there."""
        moved, first = self.moved.get(sequence.key, {}), sequence.table.approximate_from
        owned = history(tokens, len(read))
        for i, (content, own) in enumerate(zip(read, owned, strict=True)):
            attached = first is not None and i >= first and content == moved.get(i) and base(content)[-1] == own[-1]
            if content != own and not attached:
                return False
        return True


def base(content: Content) -> History:
    """The history that KV was made from, wherever it was moved to."""
    assert content
    return content[0] if isinstance(content[0], tuple) else content


def history(tokens: list[int], length: int) -> list[History]:
    return [tuple(tokens[: i + 1]) for i in range(length)]


def foreseen(sequence: Sequence, length: int) -> list[int]:
    """Its tokens, and the one that is being sampled where ``length`` asks for it."""
    tokens = sequence.tokens
    return tokens if length <= len(tokens) else [*tokens, made_up(tokens)]


def made_up(tokens: list[int]) -> int:
    """The "model": a token that depends on everything before it."""
    return (sum(tokens) * 7 + len(tokens) * 3 + tokens[-1] * 5) % 11 % VOCABULARY


class Guesses(Drafting):
    """Drafts whose tokens come true as a script says: ``right`` of each, by turns, before a wrong one."""

    def __init__(self, right: tuple[int, ...], eos: bool) -> None:
        super().__init__(MOST, {EOS} if eos else set())
        self.right = right

    def guess(self, sequence: Sequence) -> list[tuple[int, int]]:
        tokens, most = list(sequence.tokens), max(self.room(sequence), 0)
        right = self.right[len(tokens) % len(self.right)]
        for i in range(most):
            tokens.append(made_up(tokens) if i != right else (made_up(tokens) + 1) % VOCABULARY)
        allowed = self._allowed(None, tokens[len(sequence.tokens) :])
        return [(token, SIZES[0]) for token in allowed]


class Plans(Ranges):
    """Looks at every plan as it is made, and at whose KV is taken for it."""

    def __init__(self, life: "Life") -> None:
        self.life = life
        self.reclaimed: list[Sequence] = []  # in the last plan
        self.in_flight = 0  # times that a sequence lost its KV while a step of it was under way

    def __call__(self, name: str, of: Any = ()) -> AbstractContextManager[Any]:
        return self.schedule() if name == "schedule" else super().__call__(name, of)

    @contextmanager
    def schedule(self) -> Iterator[None]:
        life, engine = self.life, self.life.engine
        live = list(life.scheduler.live)
        flying = {id(s) for s in live if s.flights}
        before = {id(s): s.table.length for s in live}
        decoding = [s for s in live if s.state is State.RUNNING and s.pending == 1]
        ready = {
            id(s): s.flights[-1] if s.flights else 0
            for s in decoding
            if not s.flights
            or (engine.settings.lookahead and len(s.flights) == 1 and life.goes_on(s) and not self.waits(s))
        }
        self.reclaimed.clear()
        yield
        assert engine.plan is not None
        life.plan = engine.plan
        life.check_plan(engine.plan, live, flying, ready, before)

    def waits(self, sequence: Sequence) -> bool:
        drafting = self.life.engine.drafting
        return drafting is not None and drafting.expects(sequence)

    def reclaims(self, victim: Sequence, needy: Sequence) -> None:
        assert victim is not needy
        after = victim.priority > needy.priority
        assert after or victim.state is State.PAUSED, "memory is taken from the wrong end"
        self.reclaimed.append(victim)
        self.in_flight += bool(victim.flights)


class Life:
    """An engine over a memory, and the checks of every step."""

    def __init__(
        self,
        blocks: int,
        size: int,
        longest: int,
        *,
        max_sequences: int = 64,
        step_tokens: int = 8,
        prefix_cache: bool = True,
        eos: bool = False,
        wait_policy: WaitPolicy = "pin",
        host_blocks: int = 0,
        costs: SwapCosts | None = None,
        stages: int = 1,
        lookahead: bool = False,
        right: tuple[int, ...] | None = None,
    ) -> None:
        """``right``: tokens are drafted, by look-up if it is empty, else see ``Guesses``."""
        self.memory = Memory(blocks, size)
        look_up = Drafting(MOST, {EOS} if eos else set())
        self.right, drafting = right, None if right is None else Guesses(right, eos) if right else look_up
        settings = EngineSettings(
            blocks=blocks,
            block_size=size,
            prefix_cache=prefix_cache,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            max_sequence_tokens=longest,
            eos_ids=frozenset({EOS}) if eos else frozenset(),
            wait_policy=wait_policy,
            host_blocks=host_blocks,
            stages=stages,
            lookahead=lookahead,
        )
        self.engine = Engine(self.memory, settings, costs)  # type: ignore[arg-type]
        if drafting is not None:
            self.engine.draft(drafting)
        self.scheduler = self.engine.scheduler
        self.longest = longest
        self.sequences: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.plan: SchedulerOutput | None = None  # of the step launched last
        self.run_for_nothing = 0  # tokens that were in flight, had been run ahead, and were thrown away
        self.never_run = 0  # tokens that were sampled last, and then their sequence ended or was truncated
        self.plans = Plans(self)
        self.engine.announce_to(self.plans)
        self._watch()

    def __repr__(self) -> str:
        pool, scheduler = self.engine.pool, self.scheduler
        return (
            f"Life({pool.num_blocks}, {pool.block_size}, {self.longest}, max_sequences={scheduler.max_sequences}, "
            f"step_tokens={scheduler.step_tokens}, prefix_cache={pool.prefix_cache}, eos={bool(self.engine.eos_ids)}, "
            f"wait_policy={scheduler.wait_policy!r}, host_blocks={scheduler.space.num_blocks}, "
            f"costs={scheduler.costs}, stages={scheduler.stages}, lookahead={self.engine.settings.lookahead}, "
            f"right={self.right})"
        )

    def _watch(self) -> None:
        """Note what is thrown away: tokens that were sampled or run and are in no sequence."""
        engine, scheduler = self.engine, self.scheduler
        truncate, pause, finish = engine.truncate, scheduler.pause, scheduler.finish

        def watched_truncate(sequence: Sequence, length: int) -> None:
            self.never_run += sequence.unrun_samples if length < len(sequence.tokens) else 0
            truncate(sequence, length)

        def watched(end: Callable[[Sequence], None]) -> Callable[[Sequence], None]:
            def ending(sequence: Sequence) -> None:
                self.run_for_nothing += len(sequence.flights[1:])  # each ran the token of the one before
                end(sequence)

            return ending

        engine.truncate = watched_truncate  # type: ignore[method-assign]
        scheduler.pause, scheduler.finish = watched(pause), watched(finish)  # type: ignore[method-assign, assignment]

    # what a driver may do between steps

    def submit(self, tokens: list[int], budget: int, **options: Any) -> Sequence | None:
        key = f"s{len(self.sequences) + len(self.finished)}"
        if len(tokens) >= self.longest:
            with pytest.raises(ValueError, match=f"{len(tokens)} tokens"):
                self.engine.submit(key, tokens, budget, GREEDY, **options)
            return None
        self.sequences.append(self.engine.submit(key, tokens, budget, GREEDY, **options))
        if fork_of := options.get("fork_of"):
            self.memory.moved[key] = dict(self.memory.moved.get(fork_of[0].key, {}))
        return self.sequences[-1]

    def resume(self, sequence: Sequence, tokens: list[int], budget: int) -> None:
        if len(sequence.tokens) + len(tokens) >= self.longest:
            with pytest.raises(ValueError, match=f"{len(sequence.tokens) + len(tokens)} tokens"):
                self.engine.resume(sequence, tokens, budget)
        else:
            self.engine.resume(sequence, tokens, budget)

    def keep(self, keeper: Sequence, source: Sequence, start: int, stop: int) -> Span:
        span = self.engine.keep(keeper, source, start, stop)
        moved, first = self.memory.moved.get(source.key, {}), source.table.approximate_from
        read = [self.memory.slots[slot] for slot in source.table.slots(start, stop)]
        own = history(source.tokens, stop)[start:]
        self.memory.kept[span] = [
            moved[i][0] if content != h and first is not None and i >= first else h
            for i, h, content in zip(range(start, stop), own, read, strict=True)
        ]
        return span

    def join(self, keeper: Sequence, between: list[int], budget: int) -> None:
        """Resume a sequence with everything it keeps, ``between`` before each of them and after the last."""
        tokens, splices = list(between), []
        for span in keeper.kept:
            splices.append((len(tokens), span))
            tokens += [*span.tokens, *between]
        if len(keeper.tokens) + len(tokens) < self.longest:
            self.engine.resume(keeper, tokens, budget, splices=splices)

    def finish(self, sequence: Sequence) -> None:
        self.never_run += sequence.unrun_samples
        self.engine.finish(sequence)
        self.sequences.remove(sequence)
        self.finished.append(sequence)

    # steps and their checks

    def step(self) -> None:
        if not self.engine.has_work:
            return
        live, left = list(self.scheduler.live), self.engine.left
        assert live == sorted(live, key=lambda s: s.priority)
        sampled = self.engine.step()
        assert [s.sequence.key for s in sampled] == list(dict.fromkeys(s.sequence.key for s in sampled))
        for one in sampled:
            assert one.token == one.sequence.tokens[-1] == made_up(one.sequence.tokens[:-1]), "not the sequence's token"
        assert self.engine.plan is not None
        samples = [w.sequence for w in self.engine.plan.work if w.samples and w.drafted is None]
        assert {s.sequence.key for s in sampled} <= {s.key for s in samples}
        if self.scheduler.stages == 1 and not self.engine.settings.lookahead and not left:
            assert len(sampled) == len(samples)
        self.check()

    def goes_on(self, sequence: Sequence) -> bool:
        """Whether only the token in flight could keep a sequence from writing another one."""
        return sequence.budget > 1 and len(sequence.tokens) + 1 < self.longest

    def check_plan(
        self,
        plan: SchedulerOutput,
        live: list[Sequence],
        flying: set[int],
        ready: dict[int, int],
        before: dict[int, int],
    ) -> None:
        """``flying`` waited for their token when the step was planned, ``ready`` were to run one: launched when."""
        scheduled = list(dict.fromkeys(w.sequence for w in plan.work))
        again = flying & {id(s) for s in scheduled}
        assert again <= ready.keys(), "a sequence in flight is run again"
        assert again == {id(w.sequence) for w in plan.work if w.ahead and w.count == 1 and w.samples}
        assert id(live[0]) in flying or scheduled[0] is live[0], "the first sequence runs in every step"
        by_sequence = [[w for w in plan.work if w.sequence is s] for s in scheduled]
        assert [w for works in by_sequence for w in works] == list(plan.work), "a sequence is run twice in one step"
        assert {id(s.sequence) for s in plan.splices} <= {id(s) for s in scheduled}, "a step attaches and does not run"
        for works in by_sequence:
            holes = {(s.position, s.position + len(s.span)) for s in plan.splices if s.sequence is works[0].sequence}
            gaps = {(a.start + a.count, b.start) for a, b in pairwise(works) if b.drafted is None}
            assert all(a.start + a.count == b.start for a, b in pairwise(works) if b.drafted is not None)
            front = {h for h in holes if h[0] >= before[id(works[0].sequence)] and h[1] == works[0].start}
            assert gaps <= holes == gaps | front, "something between the work items was neither run nor attached"
        assert scheduled == sorted(scheduled, key=lambda s: s.priority)
        taken = {id(s) for s in self.plans.reclaimed}
        assert not {id(s) for s in scheduled} & taken, "a scheduled sequence lost its blocks"
        assert sum(w.count for w in plan.work) <= max(self.scheduler.step_tokens, len(ready) + 1)
        for work in plan.work:
            assert work.count >= 1, "a work item with no query"
            assert work.start >= before[id(work.sequence)], "KV that was there is computed again"
            assert work.start + work.count <= work.sequence.table.length
        for works in by_sequence:
            assert works[-1].start + works[-1].count == works[0].sequence.table.length
            told = [w for w in works if w.drafted is None]
            assert not any(w.samples for w in told[:-1])
            assert works[: len(told)] == told and (told[-1].samples or works == told), "drafted after nothing"
            assert len(works) == len(told) or not told[-1].ahead, "drafted after a token that is not known"
        if any(w.drafted is not None for w in plan.work):
            assert sum(w.count for w in plan.work) <= self.scheduler.step_tokens, "drafted beyond the step's tokens"
            assert self.engine.pool.num_free >= self.scheduler.running, "drafts leave no block free"
        if not self.plans.reclaimed and self.engine.pool.num_free:
            share = -(-len(live) // self.scheduler.stages)
            runs = ready.keys() & {id(s) for s in scheduled}
            lost = [s for s in live if id(s) in ready and s.state is State.WAITING]  # in this step
            full = len(runs) + len(lost) >= share < len(live)
            passed = [s for s in live if id(s) in ready.keys() - runs]
            last = max((ready[i] for i in runs), default=0)
            assert all(ready[id(s)] >= last for s in passed if s.state is not State.WAITING), "others waited longer"
            assert full or all(s.state is State.WAITING for s in passed), "a running sequence was passed over"
            running = {id(s) for s in live if s.state is State.RUNNING}
            used = running & (flying | {id(s) for s in scheduled})
            # Others, before them in line, prefilled all that a step may.
            prefills = [w for w in plan.work if id(w.sequence) not in ready and w.drafted is None]
            left = self.scheduler.step_tokens - min(share, len(ready)) - sum(w.count for w in prefills)
            priorities = [w.sequence.priority for w in prefills]
            later = {id(s) for s in live if priorities and s.priority > max(priorities)}
            starved = (running - used - ready.keys()) & later if left <= 0 else set()
            assert full or not passed or len(used | starved) == self.scheduler.max_sequences, (
                "a place was taken and not used"
            )

    def check(self) -> None:
        """Every reference counted anew, every table readable, no more sequences running than allowed."""
        self.engine.check()
        assert not {s.key for s in self.scheduler.live} & self.scheduler.paused.keys()
        running = [s for s in self.scheduler.live if s.state is State.RUNNING]
        assert self.scheduler.running == len(running) <= self.scheduler.max_sequences
        paused = self.scheduler.paused.values()
        held = {b for s in paused for blocks in (s.table.blocks, *(k.blocks for k in s.kept)) for b in blocks}
        assert self.scheduler.pinned_blocks == len(held), "a wrong number of pinned blocks"
        size = self.memory.size
        for sequence in self.sequences:
            table = sequence.table
            known = self.known(sequence)
            assert table.stored <= len(known), "KV of a token that is not known"
            assert len(table.blocks) == -(-table.length // size)
            read = [self.memory.slots[slot] for slot in table.slots(0, table.length)]
            assert self.memory.owns(sequence, known, read)

    def known(self, sequence: Sequence) -> list[int]:
        """A sequence's tokens, and those that were run in steps in flight or are still to be handed out."""
        given = self.engine._given.get(sequence)
        if given and self.engine._number in sequence.flights:
            return [*sequence.tokens, *given][:-1]
        flights = (flight for flight in self.engine._flights if flight.number in sequence.flights)
        drafted = [w.drafted for flight in flights for w in flight.order if w.sequence is sequence]
        draft = [token for token in drafted if token is not None]
        return (
            [*sequence.tokens, *draft]
            if draft
            else foreseen(sequence, len(sequence.tokens) + len(sequence.flights) - 1)
        )

    def drain(self) -> None:
        """Run what is live to its end. While none is added, the first sequence only ever gains tokens: a bound."""
        steps = (self.scheduler.stages + self.engine.settings.lookahead) * sum(
            len(s.tokens) + s.budget for s in self.scheduler.live
        )
        while self.engine.has_work:
            assert steps > 0, "not finished in the steps it may take"
            steps -= 1
            self.step()

    def end(self) -> None:
        """Nothing runs, no sequence is left, nothing is held, and every query that was run is told of."""
        self.drain()
        for sequence in list(self.sequences):
            assert sequence.state is State.PAUSED
            self.finish(sequence)
        self.engine.pool.check([])
        assert self.engine.pool.num_used == self.engine.space.num_used == 0
        assert not self.scheduler.paused and not self.engine.has_work
        assert self.scheduler.running == 0
        assert {s.state for s in self.finished} <= {State.FINISHED}
        counters = [s.counters for s in self.finished]
        counted = sum(c.prefilled + c.decoded + c.drafted - c.accepted for c in counters)
        assert self.memory.queries == counted - self.never_run + self.run_for_nothing, "queries run and counted differ"
        assert self.engine.launched <= self.memory.queries, "a step without a query"


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(i * i + salt * i + salt) % 5 % 2 for i in range(length)]


def submitted(sequence: Sequence | None) -> Sequence:
    assert sequence is not None
    return sequence


def two_waiting_parents(life: Life, wait: bool) -> list[Sequence]:
    """Hold and wait: both parents hold half the pool (8 blocks of 2) and wait for children that need blocks."""
    parents = [submitted(life.submit(prompt(7, i), 1, root=i)) for i in range(2)]
    life.drain()
    assert life.engine.pool.num_free == 0
    for parent in parents if wait else []:
        life.engine.wait(parent)
    children = [submitted(life.submit(prompt(9, 5 + i), 5, root=i, depth=1)) for i in range(2)]
    life.drain()
    assert all(len(c.tokens) == 14 for c in children)
    for child, parent in zip(children, parents, strict=True):
        life.finish(child)
        life.resume(parent, prompt(3), 4)
    life.drain()
    assert all(len(p.tokens) == 8 + 3 + 4 for p in parents)
    life.end()
    return parents
