"""What tests break in the product on purpose, to see that it shows: each function breaks one thing for one test.

Private methods are replaced here, and by no test itself.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from rrm_kernels.staging import Staging

from rrm_engine.backends.shadow import Shadows
from rrm_engine.engine.cuda_graphs import Share
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.packing import Drawn
from rrm_engine.engine.processors import Transcripts
from rrm_engine.engine.scheduler import Scheduler
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.graph.machine import GraphMachine
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.table import BlockTable
from rrm_engine.models.attention import PagedForward
from rrm_engine.solver.job import JobRun

Patch = pytest.MonkeyPatch
Breaks = Callable[[Patch], None]

# KV on its way


def no_copies(patch: Patch) -> None:
    """A forked block is written before it is copied."""
    patch.setattr(KVCache, "copy", lambda self, copies: None)


def no_swap_ins(patch: Patch) -> None:
    """What comes back from host memory is not what went there."""
    patch.setattr(KVCache, "swap_in", lambda self, copied, blocks: None)


def swap_ins_to_one_place(patch: Patch) -> None:
    swap_in = KVCache.swap_in
    patch.setattr(KVCache, "swap_in", lambda self, copied, blocks: swap_in(self, copied, [blocks[0]] * len(blocks)))


def swap_outs_too_late(patch: Patch) -> None:
    """The copy to the host is made when it is needed again, after others wrote there."""
    swap_in, read = KVCache.swap_in, KVCache.swap_out
    sources: dict[int, Any] = {}

    def late(self: KVCache, copied: Any, blocks: Any) -> None:
        read(self, copied, sources.pop(id(copied)))
        swap_in(self, copied, blocks)

    patch.setattr(KVCache, "swap_out", lambda self, copied, blocks: sources.update({id(copied): blocks}))
    patch.setattr(KVCache, "swap_in", late)


def no_splices(patch: Patch) -> None:
    patch.setattr(KVCache, "splice", lambda *_: None)


def splices_of_one_token(patch: Patch) -> None:
    """Every attached token has the KV of the first one; to change them about would change no sum."""
    splice = KVCache.splice
    patch.setattr(KVCache, "splice", lambda self, sources, *rest: splice(self, [sources[0]] * len(sources), *rest))


# steps in flight


def tokens_of_other_rows(patch: Patch) -> None:
    """Tokens that the host does not know yet are those of other sequences."""
    fill = Drawn.fill
    patch.setattr(Drawn, "fill", lambda self, *given: fill(Drawn(self.tokens.roll(1), self.rows), *given))


def tokens_in_another_order(patch: Patch) -> None:
    """A step's tokens are handed to its sequences in another order."""
    collect = Engine.collect

    def swapped(self: Engine) -> Any:
        if self._flights and self._flights[0].tokens is not None:
            self._flights[0].order.reverse()
        return collect(self)

    patch.setattr(Engine, "collect", swapped)


def tokens_that_no_sequence_waits_for(patch: Patch) -> None:
    """Pausing in flight does not call the token off."""
    remove = Scheduler._remove

    def kept(self: Scheduler, sequence: Sequence) -> None:
        flights = list(sequence.flights)
        remove(self, sequence)
        sequence.flights = flights

    patch.setattr(Scheduler, "_remove", kept)


def kv_of_tokens_thrown_away(patch: Patch) -> None:
    """A sequence paused in flight keeps the KV of the token it did not get."""

    def kept(self: Scheduler, sequence: Sequence) -> None:
        sequence.flights.clear()
        if sequence.state is State.RUNNING:
            self._running -= 1
        self.live.remove(sequence)

    patch.setattr(Scheduler, "_remove", kept)


def batches_of_the_step_before(patch: Patch) -> None:
    """A stage takes the batch of the step before for its own, as if it had not been brought there yet."""
    right, last = PagedForward.batch_on, {}

    def stale(self: PagedForward, device: torch.device) -> Any:
        self.brought[device] = self.brought.get(device, 0) + 1
        batch = right(replace(self, brought={}), device)
        if self.brought[device] == 1:  # the first layer's
            last["now"], last["before"] = batch, last.get("now", batch)
            return batch
        before = last["before"]
        return before if [*before.query_lens] == [*batch.query_lens] == [1] * len(batch.query_lens) else batch

    patch.setattr(PagedForward, "batch_on", stale)


def buffers_of_the_first_step(patch: Patch) -> None:
    """What the second device had in the first step is all it ever has."""
    follow, seen = Staging.follow, set[int]()

    def once(self: Staging, *given: Any) -> None:
        if id(self) not in seen:
            follow(self, *given)
        seen.add(id(self))

    patch.setattr(Staging, "follow", once)


def hidden_states_of_an_earlier_step(patch: Patch) -> None:
    bring = Share._bring

    def left(self: Share, hidden: torch.Tensor, key: Any) -> torch.Tensor:
        known = key is not None and key.tokens in self._hidden
        return self._hidden[key.tokens] if known else bring(self, hidden, key)

    patch.setattr(Share, "_bring", left)


def processors_that_guess(patch: Patch) -> None:
    """Processors see a made-up token where the last one is in flight, and where one is drafted."""
    extend = Transcripts.extend

    def guessing(self: Any, sequences: Any, lengths: Any, drawn: Drawn | None, drafted: Any, device: Any) -> None:
        made_up = drawn and Drawn(torch.full_like(drawn.tokens, 3), drawn.rows)
        extend(self, sequences, lengths, made_up, [None if one is None else 3 for one in drafted], device)

    patch.setattr(Transcripts, "extend", guessing)


# drafts


def drafts_are_believed(patch: Patch) -> None:
    def credulous(self: Engine, sequence: Sequence, drawn: list[tuple[int | None, int]]) -> deque[int]:
        return deque([*(drafted for drafted, _ in drawn[1:] if drafted is not None), drawn[-1][1]])

    patch.setattr(Engine, "_accepted", credulous)


def kv_of_wrong_drafts(patch: Patch) -> None:
    """The first token that was not drafted is thought to have KV, that of the guess in its place."""
    truncate, accepted = BlockTable.truncate, Engine._accepted

    def kept(self: Engine, sequence: Sequence, drawn: list[tuple[int | None, int]]) -> deque[int]:
        with patch.context() as patched:
            patched.setattr(
                BlockTable, "truncate", lambda table, length: truncate(table, min(length + 1, table.stored))
            )
            return accepted(self, sequence, drawn)

    patch.setattr(Engine, "_accepted", kept)


# which sequences run, and whose memory is reclaimed


def victims_are_anybody(patch: Patch) -> None:
    """Any sequence may be a victim, even one already in this step."""

    def anybody(self: Scheduler, sequence: Sequence, lower: list[Sequence], siblings: bool) -> Iterator[Sequence]:
        yield from (s for s in [*self.live, *self.paused.values()] if s.table.blocks and s is not sequence)

    patch.setattr(Scheduler, "_victims", anybody)


def paused_are_spared(patch: Patch) -> None:
    """Without reclaiming from paused sequences, waiting parents starve their children."""
    victims = Scheduler._victims

    def sparing(self: Scheduler, *args: Any, **kwargs: Any) -> Iterator[Sequence]:
        return (s for s in victims(self, *args, **kwargs) if s.state is not State.PAUSED)

    patch.setattr(Scheduler, "_victims", sparing)


def newcomers_run_nothing(patch: Patch) -> None:
    """A child gets the place of its parent, and nothing to run in that step."""
    run = Scheduler._run

    def late(self: Scheduler, sequence: Sequence, *rest: Any) -> Any:
        newcomer = sequence in self._admitted and sequence.depth > 0
        return ([], [], []) if newcomer else run(self, sequence, *rest)

    patch.setattr(Scheduler, "_run", late)


def spans_go_before_the_step(patch: Patch) -> None:
    """Other sequences could get their blocks in that very step."""
    plan = Scheduler._run

    def hasty(self: Scheduler, sequence: Sequence, *args: Any) -> Any:
        planned = plan(self, sequence, *args)
        for splice in planned[2]:
            sequence.let_go(splice.span)
        return planned

    patch.setattr(Scheduler, "_run", hasty)


def pinned_blocks_are_old(name: str) -> Breaks:
    """After this method the blocks that paused sequences held before are taken for those they hold now."""

    def breaks(patch: Patch) -> None:
        method = getattr(Scheduler, name)

        def stale(self: Scheduler, sequence: Sequence) -> None:
            before = self.pinned_blocks
            method(self, sequence)
            self._held, self._pinned = [(s, len(s.table.blocks), *s.kept) for s in self.paused.values()], before

        patch.setattr(Scheduler, name, stale)

    return breaks


def blocks_of_sequences_that_end_paused(patch: Patch) -> None:
    """A sequence that ends while it is paused loses its blocks without giving them back."""
    finish = Scheduler.finish

    def forgetful(self: Scheduler, sequence: Sequence) -> None:
        if sequence.state is State.PAUSED:
            sequence.table = BlockTable(self.pool, self.space)
        finish(self, sequence)

    patch.setattr(Scheduler, "finish", forgetful)


def spans_of_sequences_that_end(patch: Patch) -> None:
    finish = Scheduler.finish

    def forgetful(self: Scheduler, sequence: Sequence) -> None:
        sequence.kept = []
        finish(self, sequence)

    patch.setattr(Scheduler, "finish", forgetful)


# the graph and its reports


def descendants_are_forgotten(patch: Patch) -> None:
    """A cancelled node's children are not cancelled, and the job does not end what is left of it."""
    abandon = GraphMachine._abandon

    def shallow(self: GraphMachine, nodes: Any, reason: str) -> None:
        for node in nodes:
            node.children, kept = {}, node.children
            abandon(self, [node], reason)
            node.children = kept

    patch.setattr(GraphMachine, "_abandon", shallow)
    patch.setattr(JobRun, "release", lambda self: None)


def shadows_lead_themselves(patch: Patch) -> None:
    """The shadow that a splice report compares with goes on with its own tokens instead of the node's."""
    lead = Shadows._lead

    def own(self: Shadows, shadow: Any) -> None:
        token = shadow.sequence.tokens[-1]
        lead(self, shadow)
        shadow.sequence.tokens[-1] = token

    patch.setattr(Shadows, "_lead", own)
