"""The KV bookkeeping against a naive model: every sequence must read back exactly what it wrote."""

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

from rrm_engine.kv.pool import BlockPool, OutOfBlocks
from rrm_engine.kv.table import BlockTable

TOKENS = st.integers(0, 1)  # few different ones, so that prefixes meet


class Stored:
    """A sequence as a user sees it: its tokens and, for each, the history its KV must have been made from."""

    def __init__(self, table: BlockTable, tokens: list[int]) -> None:
        self.table = table
        self.tokens = tokens  # the first table.length of them have KV

    def expected(self) -> list[tuple[int, ...]]:
        return [tuple(self.tokens[: i + 1]) for i in range(self.table.length)]


class KVMachine(RuleBasedStateMachine):
    """Memory is simulated: a slot holds the whole token history its KV depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[Stored] = []

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 4), prefix_cache=st.booleans())
    def make(self, blocks: int, size: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(blocks, size, prefix_cache)
        self.memory: list[tuple[int, ...] | None] = [None] * ((blocks + 1) * size)

    def pick(self, index: int) -> Stored:
        return self.sequences[index % len(self.sequences)]

    def store(self, sequence: Stored, tokens: list[int]) -> None:
        """Append tokens the way the engine does: copies first, then the writes, then the prefix cache."""
        size, table = self.pool.block_size, sequence.table
        start = table.length
        needed, free = table.blocks_needed(len(tokens)), self.pool.num_free
        if needed > free:
            with pytest.raises(OutOfBlocks):
                table.append(len(tokens))
            assert table.length == start
            return
        copies = table.append(len(tokens))
        assert self.pool.num_free == free - needed
        assert len(copies) <= 1
        for source, destination in copies:
            for i in range(size):
                self.memory[destination * size + i] = self.memory[source * size + i]
        sequence.tokens = sequence.tokens[:start] + tokens
        for position, slot in enumerate(table.slots(start, table.length), start):
            self.memory[slot] = tuple(sequence.tokens[: position + 1])
        table.register(sequence.tokens)

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=12))
    def submit(self, tokens: list[int]) -> None:
        table = BlockTable(self.pool)
        reused = table.reuse(tokens)
        assert reused < len(tokens)
        assert reused % self.pool.block_size == 0
        sequence = Stored(table, tokens)
        self.sequences.append(sequence)
        self.check_contents()
        self.store(sequence, tokens[reused:])

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), tokens=st.lists(TOKENS, max_size=6))
    def append(self, index: int, tokens: list[int]) -> None:
        self.store(self.pick(index), tokens)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), share=st.floats(0, 1), more=st.lists(TOKENS, max_size=4))
    def fork(self, index: int, share: float, more: list[int]) -> None:
        parent = self.pick(index)
        length = round(share * parent.table.length)
        used = self.pool.num_used
        child = Stored(parent.table.fork(length), parent.tokens[:length])
        assert self.pool.num_used == used  # a fork takes no block
        self.sequences.append(child)
        self.store(child, more)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99), share=st.floats(0, 1), other=st.lists(TOKENS, max_size=5))
    def truncate(self, index: int, share: float, other: list[int]) -> None:
        """Forget an end and write something else there, as a resume after an event's boundary does."""
        sequence = self.pick(index)
        sequence.table.truncate(round(share * sequence.table.length))
        sequence.tokens = sequence.tokens[: sequence.table.length]
        self.store(sequence, other)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 99))
    def release(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        sequence.table.release()

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(s.table.blocks for s in self.sequences)

    @invariant()
    def check_contents(self) -> None:
        for sequence in self.sequences:
            table = sequence.table
            read = [self.memory[slot] for slot in table.slots(0, table.length)]
            assert read == sequence.expected()

    def teardown(self) -> None:
        for sequence in self.sequences:
            sequence.table.release()
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.pool.num_free == self.pool.num_blocks


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
