"""The KV bookkeeping against a naive model: every sequence must read back exactly what it wrote."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from searched import CONTROL, searched

from rrm_engine.kv.host import HostSpace, SwapOut
from rrm_engine.kv.pool import BlockPool, OutOfBlocks
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockTable

TOKENS = st.integers(0, 1)  # few different ones, so that prefixes meet
INDEX = st.integers(0, 99)  # which sequence or span, modulo how many there are
ATTACHED = -1  # stands in the history of attached KV, so that it is unlike that of any tokens
Content = tuple[int, ...] | None  # what a slot holds: the history that its KV depends on


class Stored:
    """A sequence as a user sees it: its tokens and, for each that has KV, the history that must have been made from."""

    def __init__(self, table: BlockTable, tokens: list[int], expected: list[Content]) -> None:
        self.table = table
        self.tokens = tokens  # the first table.stored of them have KV
        self.expected = expected

    def cut(self) -> None:
        """Forget what the table has forgotten."""
        del self.tokens[self.table.stored :], self.expected[self.table.stored :]


class KVMachine(RuleBasedStateMachine):
    """Memory is simulated: a slot holds the whole history that its KV depends on, and so does a block on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[Stored] = []
        self.spans: list[tuple[Span, list[Content]]] = []  # with what each was taken from

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 4), host=st.integers(0, 8), prefix_cache=st.booleans())
    def make(self, blocks: int, size: int, host: int, prefix_cache: bool) -> None:
        self.pool, self.space = BlockPool(blocks, size, prefix_cache), HostSpace(host)
        self.memory: list[Content] = [None] * ((blocks + 1) * size)

    def pick(self, index: int) -> Stored:
        return self.sequences[index % len(self.sequences)]

    def read(self, blocks: Iterable[int]) -> list[Content]:
        size = self.pool.block_size
        return [content for block in blocks for content in self.memory[block * size : (block + 1) * size]]

    def write(self, blocks: Iterable[int], contents: list[Content]) -> None:
        for i, block in enumerate(blocks):
            size = self.pool.block_size
            self.memory[block * size : (block + 1) * size] = contents[i * size : (i + 1) * size]

    def room(self, sequence: Stored, count: int, exact: bool = True) -> bool:
        """Make room for tokens the way the engine does, copies included; False, and nothing changed, if it cannot."""
        table = sequence.table
        start, needed, free = table.length, table.blocks_needed(count), self.pool.num_free
        if needed > free:
            with pytest.raises(OutOfBlocks):
                table.append(count, exact)
            assert table.length == start
            return False
        copies = table.append(count, exact)
        assert self.pool.num_free == free - needed
        assert len(copies) <= 1
        for source, destination in copies:
            self.write([destination], self.read([source]))
        return True

    def store(self, sequence: Stored, tokens: list[int]) -> None:
        """Append tokens the way the engine does: copies first, then the writes, then the prefix cache."""
        start = sequence.table.length
        if sequence.table.host or not self.room(sequence, len(tokens)):
            return
        sequence.tokens[start:] = tokens
        for token, slot in zip(tokens, sequence.table.slots(start, start + len(tokens)), strict=True):
            last = sequence.expected[-1] if sequence.expected else ()
            assert last is not None
            self.memory[slot] = (*last, token)
            sequence.expected.append(self.memory[slot])
        sequence.table.register(sequence.tokens)

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=12))
    def submit(self, tokens: list[int]) -> None:
        table = BlockTable(self.pool, self.space)
        reused = table.reuse(tokens)
        assert reused < len(tokens)
        assert reused % self.pool.block_size == 0
        sequence = Stored(table, tokens[:reused], [tuple(tokens[: i + 1]) for i in range(reused)])
        self.sequences.append(sequence)
        self.check_contents()
        self.store(sequence, tokens[reused:])

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, tokens=st.lists(TOKENS, max_size=6))
    def append(self, index: int, tokens: list[int]) -> None:
        self.store(self.pick(index), tokens)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, share=st.floats(0, 1), more=st.lists(TOKENS, max_size=4))
    def fork(self, index: int, share: float, more: list[int]) -> None:
        parent = self.pick(index)
        length = round(share * parent.table.length)
        used = self.pool.num_used
        child = Stored(parent.table.fork(length), parent.tokens[:length], parent.expected[:length])
        assert self.pool.num_used == used  # a fork takes no block
        self.sequences.append(child)
        self.store(child, more)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, share=st.floats(0, 1), other=st.lists(TOKENS, max_size=5))
    def truncate(self, index: int, share: float, other: list[int]) -> None:
        """Forget an end and write something else there, as a resume after an event's boundary does."""
        sequence = self.pick(index)
        sequence.table.truncate(round(share * sequence.table.stored))
        sequence.cut()
        self.store(sequence, other)

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX, own=st.booleans())
    def offload(self, index: int, own: bool) -> None:
        """Move a sequence to host memory: what no other table holds, or all of it."""
        table, used, free = self.pick(index).table, self.space.num_used, self.pool.num_free
        first, stored = table.first_own if own else 0, table.stored
        count = len(table.blocks) - first
        moved: SwapOut | None = table.offload(first)
        assert (moved is not None) == (0 < count <= self.space.num_blocks - used)
        if moved is not None:
            copy, blocks = moved
            copy.payload = self.read(blocks)
            assert self.space.num_used == used + count and table.stored == stored
            assert self.pool.num_free == free + count or not own

    @precondition(lambda self: any(s.table.host for s in self.sequences))
    @rule(index=INDEX)
    def restore(self, index: int) -> None:
        away = [s.table for s in self.sequences if s.table.host]
        table = away[index % len(away)]
        if sum(copy.count for copy in table.host) > self.pool.num_free:
            with pytest.raises(OutOfBlocks):
                table.restore()
            assert table.host
            return
        for copy, blocks in table.restore():
            self.write(blocks, copy.payload)

    @precondition(lambda self: any(s.table.length for s in self.sequences))
    @rule(index=INDEX, start=st.floats(0, 0.99), share=st.floats(0, 1))
    def keep(self, index: int, start: float, share: float) -> None:
        """Hold the KV of a stretch of a sequence, whatever becomes of the sequence."""
        there = [s for s in self.sequences if s.table.length]
        sequence = there[index % len(there)]
        first = int(start * sequence.table.length)
        stop = first + 1 + int(share * (sequence.table.length - first - 1))
        span = Span(sequence.table, first, stop, sequence.tokens[first:stop])
        self.spans.append((span, sequence.expected[first:stop]))

    @precondition(lambda self: self.spans and self.sequences)
    @rule(index=INDEX, which=INDEX, more=st.lists(TOKENS, max_size=4))
    def attach(self, index: int, which: int, more: list[int]) -> None:
        """Attach a span's KV at the end of a sequence, and write after it."""
        sequence, (span, source) = self.pick(index), self.spans[which % len(self.spans)]
        start = sequence.table.length
        if sequence.table.host or not self.room(sequence, len(span), exact=False):
            return
        sequence.tokens[start:] = span.tokens
        for content, slot in zip(source, sequence.table.slots(start, start + len(span)), strict=True):
            assert content is not None
            self.memory[slot] = (ATTACHED, *content)
            sequence.expected.append(self.memory[slot])
        sequence.table.register(sequence.tokens)
        self.store(sequence, more)

    @precondition(lambda self: self.spans)
    @rule(which=INDEX)
    def let_go(self, which: int) -> None:
        self.spans.pop(which % len(self.spans))[0].release()

    @precondition(lambda self: self.sequences)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        self.sequences.pop(index % len(self.sequences)).table.release()

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([*(s.table.blocks for s in self.sequences), *(span.blocks for span, _ in self.spans)])
            self.space.check(copy for s in self.sequences for copy in s.table.host)

    @invariant()
    def check_contents(self) -> None:
        for sequence in self.sequences:
            table = sequence.table
            read = [self.memory[slot] for slot in table.slots(0, table.length)]
            moved = [content for copy in table.host for content in copy.payload[: copy.count * self.pool.block_size]]
            assert [*read, *moved][: table.stored] == sequence.expected
        for span, source in self.spans:
            assert [self.memory[slot] for slot in span.slots] == source

    def teardown(self) -> None:
        for sequence in self.sequences:
            sequence.table.release()
        for span, _ in self.spans:
            span.release()
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.pool.num_free == self.pool.num_blocks and self.space.num_used == 0


KVMachine.TestCase.settings = settings(searched(300), stateful_step_count=30)
TestKV = KVMachine.TestCase


def assert_noticed() -> None:
    with pytest.raises((AssertionError, ValueError, FlakyFailure, ExceptionGroup)):
        run_state_machine_as_test(KVMachine, settings=settings(CONTROL, stateful_step_count=30))


def test_writing_a_shared_block_in_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without copy-on-write a fork's tokens turn up in its parent."""
    monkeypatch.setattr(BlockPool, "take_for_writing", lambda self, block: True)
    assert_noticed()


def test_a_stale_cache_entry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a cached block that is rewritten without leaving the cache is found with other content."""
    monkeypatch.setattr(BlockPool, "take_for_writing", lambda self, block: self.refs(block) == 1)
    assert_noticed()


def test_a_lost_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a fork that forgets to count its references."""
    monkeypatch.setattr(BlockPool, "share", lambda self, block: None)
    assert_noticed()


def test_a_span_without_references_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a span that does not count its references."""

    class Uncounted(Span):
        def __init__(self, table: BlockTable, *stretch: Any) -> None:
            super().__init__(table, *stretch)
            for block in self.blocks:
                table.pool.release(block)

    monkeypatch.setitem(globals(), "Span", Uncounted)
    assert_noticed()


def test_attached_kv_in_the_prefix_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: KV that was computed elsewhere is found by its tokens."""
    append = BlockTable.append
    monkeypatch.setattr(BlockTable, "append", lambda self, count, exact=True: append(self, count))
    assert_noticed()


def test_blocks_that_come_back_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what was offloaded is brought back into the wrong blocks."""
    restore = BlockTable.restore
    monkeypatch.setattr(BlockTable, "restore", lambda self: [(copy, ids[::-1]) for copy, ids in restore(self)])
    assert_noticed()


def test_what_follows_a_cut_is_not_found_after_the_tokens_cut_off() -> None:
    pool = BlockPool(10, 2)
    table = BlockTable(pool)
    table.append(4)
    table.register([1, 2, 3, 4])
    table.truncate(2)
    table.append(4)
    table.register([1, 2, 5, 6, 7, 8])
    assert len(pool.match([1, 2, 5, 6, 7, 8, 0])) == 3
    assert len(pool.match([1, 2, 3, 4, 7, 8, 0])) == 2, "7 and 8 were computed after 5 and 6"
