"""A child's KV attached to its parent: where it must equal the text, and what becomes of it under pressure."""

from collections.abc import Callable
from typing import Any

import broken
import pytest
import torch
from graph_scripts import GREEDY
from hypothesis import given
from hypothesis import strategies as st
from lives import Life, Memory, base, prompt, submitted
from oracle import FAMILIES, engine_for, plain_model, prepared
from oracle import prompt as tokens
from random_lives import MORE, SETTINGS, SHARE, WHO, assert_noticed, live_through, lives
from transformers import DynamicCache

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv import cache as kv_cache
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockTable
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.loading.rotary import find_rotary

REFUSED = {"opt", "gpt2", "deepseek_v3", "cohere2"}  # learned positions, MLA, interleaved
SPLICED = sorted(FAMILIES.keys() - REFUSED)
EXACT = 2e-3  # between logits of tiny models; their spread is 3 and more
PARENT, CHILD, TAIL = tokens(1, 21), tokens(2, 30), tokens(3, 3)


def splice_engine(model: LoadedModel, blocks: int = 200, **changes: Any) -> Engine:
    return engine_for(model, blocks, splices=True, **changes)


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check()


def waiting(engine: Engine, key: str, prompt: list[int], budget: int = 4, **options: Any) -> Sequence:
    """A sequence that has spent its budget."""
    sequence = engine.submit(key, list(prompt), budget, GREEDY, **options)
    run(engine)
    return sequence


def go_on(engine: Engine, sequence: Sequence, appended: list[int], *splices: tuple[int, Span]) -> torch.Tensor:
    """Resume for five tokens; the first one's logits."""
    sequence.probe.keep_logits = True
    engine.resume(sequence, appended, 5, splices=splices)
    run(engine)
    assert sequence.probe.logits is not None
    return sequence.probe.logits


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.inference_mode()
def plain_logits(plain: Any, ids: list[int]) -> torch.Tensor:
    """Plain transformers' logits for the token after ``ids``."""
    return plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


# which models


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_whose_keys_can_be_moved(family: str) -> None:
    model = prepared(plain_model(family))
    if family in REFUSED:
        with pytest.raises(ValueError, match=rf"{family}: KV of layer 0 cannot be moved.*--join text"):
            find_rotary(model)
    else:
        width = {"gpt_neox": 2}.get(family, 8)  # rotates a quarter of each head
        assert {index: len(freq) for index, freq in find_rotary(model).items()} == {0: width, 1: width}


def test_layers_with_frequencies_of_their_own() -> None:
    types = ["sliding_attention", "full_attention"]
    thetas = {t: {"rope_type": "default", "rope_theta": b} for t, b in zip(types, (1e3, 1e6), strict=True)}
    found = find_rotary(prepared(plain_model("gemma3_text", layer_types=types, rope_parameters=thetas)))
    assert [round(float(found[layer][-1] ** (-8 / 7))) for layer in (0, 1)] == [1000, 1_000_000]


# where it must equal the text


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", SPLICED)
def test_kv_copied_to_where_it_is_equals_the_text(family: str, attention: str) -> None:
    """The child forks its parent and begins with the very tokens the parent gets: same context, same positions."""
    plain = plain_model(family)
    engine = splice_engine(prepared(plain, attention))
    parent = waiting(engine, "root", PARENT)
    at = len(parent.tokens)
    child = waiting(engine, "root.a", [*parent.tokens, *CHILD], fork_of=(parent, at), depth=1)
    elsewhere = waiting(engine, "other", CHILD[19:])
    halves = [engine.keep(parent, child, at, at + 11), engine.keep(parent, child, at + 12, at + 30)]
    engine.finish(child)
    logits = go_on(engine, parent, [*CHILD, *TAIL], (0, halves[0]), (12, halves[1]))
    assert parent.counters.spliced == 29
    assert parent.spliced == [(at, at + 11), (at + 12, at + 30)]
    assert apart(logits, plain_logits(plain, parent.tokens[:-5])) < EXACT
    assert not parent.kept
    wrong = waiting(engine, "again", PARENT)  # control: the same tokens from another context
    other = go_on(engine, wrong, [*CHILD, *TAIL], (19, engine.keep(wrong, elsewhere, 0, 11)))
    assert apart(other, logits) > 50 * EXACT


@torch.inference_mode()
def reference(plain: Any, before: list[int], attached: list[int], after: list[int]) -> torch.Tensor:
    """Plain transformers with a hand-made cache: ``attached`` was run alone, at its later positions."""
    at, end = len(before), len(before) + len(attached)
    parts = []
    for ids, start in ((before, 0), (attached, at)):
        places = torch.arange(start, start + len(ids))[None]
        parts.append(plain(input_ids=torch.tensor([ids]), position_ids=places, use_cache=True).past_key_values)
    cache = DynamicCache()
    for index, (own, other) in enumerate(zip(parts[0].layers, parts[1].layers, strict=True)):
        cache.update(torch.cat([own.keys, other.keys], 2), torch.cat([own.values, other.values], 2), index)
    places = torch.arange(end, end + len(after))[None]
    return plain(input_ids=torch.tensor([after]), position_ids=places, past_key_values=cache).logits[0, -1]


def alone(engine: Engine, block: int = 0) -> tuple[Sequence, torch.Tensor]:
    """A parent to which tokens are attached that a child had computed at its very beginning."""
    parent, child = waiting(engine, "root", PARENT), waiting(engine, "root.a", CHILD, depth=1)
    span = engine.keep(parent, child, 0, 19)
    engine.finish(child)
    return parent, go_on(engine, parent, [*TAIL, *CHILD[:19], *TAIL], (len(TAIL), span))


WIDE = {"gemma3_text": {"sliding_window": 512}}  # or plain transformers' cache would hold less than all of it


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3", "gpt_neox", "granite", "gemma3_text"])
def test_moved_keys_equal_plain_transformers_keys_at_those_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_model(family, **WIDE.get(family, {}))
    model = prepared(plain)
    parent, logits = alone(splice_engine(model))
    before = [*parent.tokens[: len(PARENT) + 4], *TAIL]
    expected = reference(plain, before, CHILD[:19], TAIL)
    assert apart(logits, expected) < EXACT
    monkeypatch.setattr(kv_cache, "rerotate", lambda keys, delta, inv_freq: keys)  # control: left where they were
    assert apart(alone(splice_engine(model))[1], expected) > 20 * EXACT


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("step_tokens", [1, 2, 5, 16, 400])
def test_pieces_of_any_size_run_beside_each_other(step_tokens: int, attention: str) -> None:
    """One, two or more tokens between spans, in one step or in many: the same KV comes out."""
    model = prepared(plain_model("qwen3"), attention)

    def joined(step_tokens: int) -> torch.Tensor:
        engine = splice_engine(model, step_tokens=step_tokens, prefix_cache=False)
        parent, child = waiting(engine, "root", PARENT), waiting(engine, "root.a", CHILD)
        spans = [engine.keep(parent, child, *ends) for ends in ((3, 9), (9, 10), (10, 20), (20, 30))]
        appended, splices = [7], []
        for between, span in zip(([5], [6, 7], [8], [9, 9, 9, 9, 9]), spans, strict=True):
            splices.append((len(appended), span))
            appended += [*span.tokens, *between]
        before, steps = parent.counters.prefilled, engine.steps
        logits = go_on(engine, parent, appended, *splices)
        assert parent.counters.prefilled - before == 1 + 1 + 2 + 1 + 5
        assert parent.counters.spliced == 27
        assert step_tokens < 10 or engine.steps - steps == 5  # all of it in one step
        return logits

    assert apart(joined(step_tokens), joined(16)) < EXACT


# what it must leave alone


def contaminated(engine: Engine) -> tuple[Sequence, torch.Tensor]:
    """A second sequence whose prompt is the transcript of one with attached KV."""
    parent, _ = alone(engine)
    engine.finish(parent)
    second = engine.submit("second", [*parent.tokens, *TAIL], 1, GREEDY)
    second.probe.keep_logits = True
    run(engine)
    assert second.probe.logits is not None
    return second, second.probe.logits


def test_attached_kv_never_gets_into_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_model("qwen3")
    engine = splice_engine(prepared(plain))
    second, logits = contaminated(engine)
    exact = plain_logits(plain, second.tokens[:-1])
    assert second.counters.reused == (len(PARENT) + 4 + len(TAIL)) // 4 * 4
    assert apart(logits, exact) < EXACT
    append = BlockTable.append  # control: attached like computed
    monkeypatch.setattr(BlockTable, "append", lambda self, count, exact=True: append(self, count))
    second, logits = contaminated(splice_engine(prepared(plain)))
    assert second.counters.reused > len(PARENT) + 4 + len(TAIL) + 19
    assert apart(logits, exact) > 20 * EXACT


def test_forks_inherit_and_what_is_cut_off_is_forgotten() -> None:
    table = BlockTable(BlockPool(20, 4))
    table.append(6)
    table.append(5, exact=False)
    table.append(9)
    assert (table.approximate_from, table.fork(7).approximate_from, table.fork(6).approximate_from) == (6, 6, None)
    table.register(list(range(20)))
    assert len(table._uids) == 1
    table.truncate(7)
    assert table.approximate_from == 6
    table.truncate(6)
    assert table.approximate_from is None
    table.append(2)
    table.register([*range(6), 50, 51])
    assert len(table._uids) == 2


def test_a_table_stays_approximate_in_host_memory() -> None:
    life = Life(12, 4, 40, wait_policy="offload", host_blocks=12)
    parent, child = submitted(life.submit(prompt(6), 1)), submitted(life.submit(prompt(9, 3), 1, depth=1))
    life.drain()
    life.keep(parent, child, 2, 8)
    life.join(parent, [1], 3)
    life.drain()
    life.engine.wait(parent)
    assert parent.table.length == 0
    assert parent.table.approximate_from == 8
    life.resume(parent, prompt(3), 2)
    life.end()
    assert parent.counters.spliced == 6


def test_memory_pressure_falls_back_to_the_same_tokens_as_text() -> None:
    """A span taken away while its keeper waits, or after it was resumed: its tokens are prefilled."""
    model = prepared(plain_model("qwen3"))
    settings: dict[str, Any] = {"max_sequence_tokens": 88, "prefix_cache": False}

    def joined(blocks: int, spliced: bool, late: bool) -> Sequence:
        engine = splice_engine(model, blocks, **settings)
        parent, child = waiting(engine, "root", PARENT, root=1), waiting(engine, "root.a", CHILD, depth=1, root=1)
        span = engine.keep(parent, child, 5, 25)
        engine.finish(child)
        splices = [(2, span)] if spliced else []
        if late:
            engine.resume(parent, [8, 9, *CHILD[5:25], *TAIL], 5, splices=splices)
        big = engine.submit("big", tokens(5, 80), 7, GREEDY)
        if late:
            run(engine)
        else:
            while engine.has_work:
                engine.step()
            engine.resume(parent, [8, 9, *CHILD[5:25], *TAIL], 5, splices=splices)
            engine.finish(big)
            run(engine)
        return parent

    for late in (False, True):
        text, plenty = joined(200, False, late), joined(200, True, late)
        tight = joined(22, True, late)
        assert tight.tokens == text.tokens
        assert (tight.counters.spliced, tight.counters.dropped_spans) == (0, 1)
        assert (plenty.counters.spliced, plenty.counters.dropped_spans) == (20, 0)  # control
        assert plenty.tokens != text.tokens


def test_the_last_one_left_gives_up_its_own() -> None:
    """The whole pool is a parent's KV and what it keeps; with its span it could never go on."""
    life = Life(5, 4, 20, prefix_cache=False)
    parent, child = submitted(life.submit(prompt(7), 1)), submitted(life.submit(prompt(11, 2), 1, depth=1))
    life.drain()
    life.keep(parent, child, 0, 9)
    life.finish(child)
    assert life.engine.pool.num_free == 0
    life.join(parent, [0], 1)
    life.drain()
    assert (len(parent.tokens), parent.counters.dropped_spans, parent.counters.spliced) == (20, 1, 0)
    life.end()


def test_a_span_goes_where_its_tokens_are_and_nowhere_else() -> None:
    engine = splice_engine(prepared(plain_model("qwen3")))
    parent, child = waiting(engine, "root", PARENT), waiting(engine, "root.a", CHILD)
    span, other = engine.keep(parent, child, 2, 6), engine.keep(parent, child, 6, 9)
    at = [(1, span)]
    for appended, splices in (
        ([1, *CHILD[2:5], 9, 9], at),  # other tokens
        ([1, *CHILD[2:6]], at),  # nothing to run after it
        ([1, *CHILD[2:9], 9], [*at, (5, other)]),  # nothing to run in between
    ):
        with pytest.raises(ValueError, match=r"root: a span cannot go to tokens"):
            engine.resume(parent, appended, 5, splices=splices)
    with pytest.raises(ValueError, match=r"there is KV of 33 tokens, and 30 to 34 were asked for"):
        engine.keep(parent, child, 30, 34)
    engine.finish(parent)
    engine.finish(child)
    assert engine.pool.num_used == 0


def cut_before_attaching(engine: Engine) -> tuple[Sequence, int]:
    """A sequence cut in the second of three spans that were to be attached, and the blocks in use then."""
    parent, child = waiting(engine, "root", PARENT), waiting(engine, "root.a", CHILD)
    at = len(parent.tokens)
    spans = [engine.keep(parent, child, start, start + 8) for start in (0, 9, 18)]
    engine.finish(child)
    engine.resume(parent, [*CHILD, *TAIL], 5, splices=[(0, spans[0]), (9, spans[1]), (18, spans[2])])
    engine.pause(parent)
    engine.truncate(parent, at + 12)
    engine.check()
    return parent, engine.pool.num_used


def test_what_is_cut_off_lets_go_of_its_spans(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = splice_engine(model)
    parent, used = cut_before_attaching(engine)
    assert [span.tokens for span in parent.kept] == [tuple(CHILD[:8])] == [span.tokens for _, span in parent.splices]
    assert used == len(parent.table.blocks) + 2  # 8 tokens in blocks of 4
    engine.resume(parent, TAIL, 5)
    run(engine)
    assert parent.counters.spliced == 8 and not parent.kept

    def forget(self: Sequence, length: int) -> None:
        self.splices = [(at, span) for at, span in self.splices if at + len(span) < length]

    monkeypatch.setattr(Sequence, "drop_splices", forget)  # negative control: the spans stay
    parent, held = cut_before_attaching(splice_engine(model))
    assert len(parent.kept) == 3 and held > used


def test_a_modest_sequence_takes_blocks_from_nobody() -> None:
    life = Life(8, 2, 16, prefix_cache=False)
    parent = submitted(life.submit(prompt(7), 1))
    life.drain()
    child = submitted(life.submit(prompt(5, 1), 4, depth=1))
    shadow = submitted(life.submit(prompt(6, 2), 1, root=1 << 62))
    shadow.probe.best_effort = True
    while life.scheduler.live[0] is child:
        life.step()
    assert (parent.counters.dropped, shadow.counters.prefilled) == (0, 0)
    life.drain()
    assert len(shadow.tokens) == 7
    life.end()


# random lives (tests/test_scheduler_properties.py keeps and joins spans in all of them)


LONG = lives(20, 40)
START = st.tuples(st.just("submit"), st.lists(st.integers(0, 1), min_size=3, max_size=9), st.just(1), st.integers(0, 2))
JOINS = st.builds(
    lambda first, second, rest: [first, second, ("step", 6), *rest],
    START,
    START,
    st.lists(
        st.one_of(
            st.tuples(st.just("keep"), WHO, WHO, SHARE, SHARE),
            st.tuples(st.just("join"), WHO, MORE.filter(len), st.integers(1, 2)),
            st.tuples(st.just("keep and join"), WHO, WHO, SHARE, SHARE, MORE.filter(len), st.integers(1, 2)),
            st.tuples(st.just("fork"), WHO, SHARE, MORE, st.just(1)),
            st.tuples(st.just("finish"), WHO),
            st.tuples(st.just("step"), st.integers(1, 6)),
            START,
        ),
        max_size=20,
    ),
)


@SETTINGS
@given(LONG, JOINS)
def test_any_life_with_attached_spans_ends_and_loses_nothing(life: Life, actions: list[tuple[Any, ...]]) -> None:
    live_through(life, actions)


def test_a_token_in_front_of_a_span_beside_a_longer_context() -> None:
    """That token's context is shorter than its sequence's table, in which the span is attached in the same step."""
    life = Life(34, 1, 34, step_tokens=5, prefix_cache=False)
    start = [("submit", [0, 1, 1, 1, 1, 1], 1, 0), ("submit", [0, 1, 0, 1, 0, 0, 1, 1], 1, 2), ("step", 6)]
    forks = [("fork", 2, 0.0, [1, 1, 1], 1), ("submit", [0, 0, 1, 0, 0, 0, 0, 1, 1], 1, 0)]
    joins = [("join", 29, [0, 0, 1, 1, 1], 1), ("fork", 12, 0.7, [1, 1, 1, 0, 0], 1)]
    joins.append(("keep and join", 29, 8, 0.0, 0.84, [1, 1, 0], 1))
    live_through(life, [*start, ("finish", 22), *forks, *joins])


def unmoved(self: Memory, sources: list[int], destinations: list[int], positions: list[int]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        self.slots[destination] = base(self.slots[source])


def displaced(self: Memory, sources: list[int], destinations: list[int], positions: list[int]) -> None:
    for source, destination, position in zip([*sources[1:], sources[0]], destinations, positions, strict=True):
        self.slots[destination] = (base(self.slots[source]), position)


@pytest.mark.parametrize("attach", [unmoved, displaced])
def test_kv_attached_in_a_wrong_way_is_noticed(attach: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "attach", attach)
    assert_noticed("reads what is not its own", JOINS, LONG)


def test_spans_kept_at_any_price_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequence, "give_up_spans", lambda self: False)
    assert_noticed("the first sequence runs in every step|nothing to run", JOINS, LONG)


def test_spans_kept_after_the_end_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.spans_of_sequences_that_end(monkeypatch)
    assert_noticed("counted", JOINS, LONG)


def test_spans_given_back_before_the_step_has_run_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.spans_go_before_the_step(monkeypatch)
    assert_noticed("given back before", JOINS, LONG)
