"""Whatever is sampled through the grammar's masks is a valid graph."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_tokenizers import KINDS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rrm_engine.errors import RrmError
from rrm_engine.protocol.events import Atomic, Await, Child, Done, Event, ParsedEvent, PlanShape
from rrm_engine.protocol.final import extract_final
from rrm_engine.protocol.grammar import EventGrammars, EventMatcher, event_grammar
from rrm_engine.protocol.parser import LAYOUT_REPAIRS, EventParser

EOS, THINK = "<|im_end|>", "<think>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges that cross the borders of JSON syntax, as real vocabularies have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    lines = [
        '{"type":"child","id":"c1","task":"Find the number of pairs <a, b>.","depends_on":[]}\n{"type":"child",',
        '{"type":"await","children":["c1","c2"],"rule":"c1 + c2"}\n',
        '{"type":"atomic","answer":"So \\\\frac{1}{2} is é. FINAL: 204"}\n{"type":"done"}',
        'x{"type":"done"} and {"a', "{'k': 1} <think>", '"}}\n{"', "\n\n", "<t",
    ]  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|endoftext|>", special=True), AddedToken(EOS, special=True)],
        show_progress=False,
    )
    core.train_from_iterator(lines * 5, trainer)
    core.add_tokens([AddedToken(THINK)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> EventGrammars:
    return EventGrammars(tokenizer, vocab_size=1000, eos_ids=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])


def allowed(matcher: EventMatcher) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def feed(matcher: EventMatcher, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for token in tokenizer.encode(text, add_special_tokens=False):
        matcher.accept(token)


def sample(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast, grammar: str, rng: random.Random) -> str:
    """Tokens drawn evenly from the mask, now and then the one that does most to get on."""
    matcher = grammars.matcher(grammar)
    closers = {i for text, i in tokenizer.get_vocab().items() if text[0] in '"ĊFI'} | grammars.eos_ids
    written: list[int] = []
    for _ in range(4000):
        choices = allowed(matcher)
        assert choices
        token = rng.choice(choices)
        if rng.random() < 0.2 and (pushy := closers.intersection(choices)):
            token = rng.choice(sorted(pushy))
        assert (matcher.accepting or matcher.done) == bool(grammars.eos_ids & set(choices))
        matcher.accept(token)
        if token in grammars.eos_ids:
            return tokenizer.decode(written)
        written.append(token)
    raise AssertionError("the grammar never ended")


def events(text: str) -> list[Event]:
    parser = EventParser()
    found = parser.feed(text) + parser.close()
    assert all(isinstance(e, ParsedEvent) for e in found), (text, found)
    assert set(parser.repairs) <= LAYOUT_REPAIRS | {"latex_escape"}, (text, parser.repairs)
    return [e.event for e in found if isinstance(e, ParsedEvent)]


def check_children(found: list[Event], first: int, most: int) -> int:
    *children, last = found
    ids = tuple(f"c{first + i}" for i in range(len(children)))
    assert 2 <= len(children) <= most
    for i, child in enumerate(children):
        assert isinstance(child, Child) and child.id == ids[i] and child.task
        assert set(child.depends_on) <= set(ids[:i])
    assert isinstance(last, Await) and last.children == ids
    return sum(len(c.depends_on) for c in children if isinstance(c, Child))


@pytest.mark.parametrize(("phase", "counts"), [("graph", False), ("graph", True), ("continuation", True)])
def test_random_samples_are_valid_graphs(
    grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast, phase: str, counts: bool
) -> None:
    rng = random.Random(phase)
    seen: Counter[str] = Counter()
    for _ in range(80):
        most, first, may_split = rng.choice([2, 3, 6]), rng.choice([1, 4, 9]), rng.random() < 0.85
        grammar = event_grammar(
            most,
            may_split=may_split,
            first=first,
            phase=phase,
            shape=PlanShape(max_task_chars=40, counts_parts=counts),
            max_answer_chars=40,
            max_work_lines=4,
        )
        text = sample(grammars, tokenizer, grammar, rng)
        counted = counts and phase == "graph" and may_split
        if counted:
            head, text = text.strip().split("\n", 1)
        found = events(text)
        if counted:
            assert head == f"Parts: {max(1, len(found) - 1)}"
        if isinstance(found[0], Atomic):
            seen["atomic"] += 1
            assert found[1:] in ([], [Done()])
            if phase == "graph":
                assert text.strip() == '{"type":"atomic"}'
            else:
                assert extract_final(found[0].answer) is not None
        else:
            assert may_split
            seen["split"] += 1
            seen["depends"] += check_children(found, first, most)
        seen["work"] += not text.lstrip().startswith('{"type"')
    assert min(seen["atomic"], seen["split"], seen["depends"]) > 5
    assert (seen["work"] > 5) == (phase == "continuation")


GRAPH = (
    '{"type":"child","id":"c1","task":"Take \\\\frac{1}{2} of \\"x\\", é.","depends_on":[]}\n'
    '{"type":"child","id":"c2","task":"u","depends_on":[]}\n'
    '{"type":"child","id":"c3","task":"v","depends_on":["c1","c2"]}\n'
    '{"type":"await","children":["c1","c2","c3"],"rule":"c3"}'
)


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ("graph", GRAPH),
        ("graph", "\n\n" + GRAPH),
        ("graph", '{"type":"atomic"}'),
        ("continuation", '{"type":"atomic","answer":"FINAL: -3/4"}'),
        ("continuation", 'If x < 3, \\frac{1}{2} {x : x > 0}\n\n1 + 1 = 2\n{"type":"atomic","answer":"So\\nFINAL: 2"}'),
        ("continuation", '{"type":"atomic","answer":"So FINAL: \\\\frac{1}{2}"}\n{"type":"done"}'),
        ("continuation", "Once more.\n" + GRAPH),
    ],
)
def test_what_a_model_should_write_is_allowed(
    grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast, phase: str, text: str
) -> None:
    matcher = grammars.matcher(event_grammar(8, may_split=True, phase=phase))
    feed(matcher, tokenizer, text)
    assert matcher.accepting
    assert grammars.eos_ids <= set(allowed(matcher))
    matcher.accept(tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ("graph", '{"type":"child","id":"c2"'),
        ("graph", '{"type":"child","id":"c1","task":""'),
        ("graph", '{"type":"child","id":"c1","task":" '),
        ("graph", '{"type":"child","id":"c1","task":"\\frac'),
        ("graph", '{"type":"child","id":"c1","task":"t","depends_on":["c1"]'),
        ("graph", '{"type":"child","id":"c1","task":"t","depends_on":[]}\n{"type":"await"'),
        ("graph", '{"type":"atomic","answer"'),
        ("graph", '{"type":"atomic"}\n'),
        ("graph", GRAPH.replace('"c3"],"rule"', '"rule"')),
        ("graph", GRAPH + "\n"),
        ("graph", GRAPH.replace('"rule":"c3"', '"rule":"..."')),
        ("graph", GRAPH.replace('"rule":"c3"', '"rule":""')),
        ("continuation", '{"type":"atomic"}'),
        ("continuation", '{"type":"atomic","answer":"no final"'),
        ("continuation", '{"type":"atomic","answer":"FINAL: "'),
        ("continuation", '{"type":"atomic","answer":"7 FINAL: <answer>'),
        ("continuation", 'so {"type":"done"}'),
        ("continuation", "<think>"),
        ("continuation", "so <thin"),
        ("continuation", '{"type":"done"}'),
    ],
)
def test_what_would_break_a_graph_is_not(
    grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast, phase: str, text: str
) -> None:
    matcher = grammars.matcher(event_grammar(8, may_split=True, phase=phase))
    with pytest.raises(ValueError, match="not allowed"):
        feed(matcher, tokenizer, text)


def test_a_leaf_may_not_split_and_width_is_bounded(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast) -> None:
    for grammar in (event_grammar(8, may_split=False), event_grammar(1, may_split=True)):
        with pytest.raises(ValueError, match="not allowed"):
            feed(grammars.matcher(grammar), tokenizer, '{"type":"child"')
    with pytest.raises(ValueError, match="not allowed"):
        feed(grammars.matcher(event_grammar(2, may_split=True)), tokenizer, GRAPH)


@pytest.mark.parametrize(
    ("count", "events", "allowed"),
    [
        (3, GRAPH, True),
        (1, '{"type":"atomic"}', True),
        (2, GRAPH, False),
        (4, GRAPH, False),
        (2, '{"type":"atomic"}', False),
        (1, GRAPH, False),
        (0, GRAPH, False),
        (9, GRAPH, False),
    ],
)
def test_a_plan_has_as_many_parts_as_it_says(
    grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast, count: int, events: str, allowed: bool
) -> None:
    matcher = grammars.matcher(event_grammar(8, may_split=True, shape=PlanShape(counts_parts=True)))
    text = f"Parts: {count}\n{events}"
    if allowed:
        feed(matcher, tokenizer, text)
        assert matcher.accepting
    else:
        with pytest.raises(ValueError, match="not allowed"):
            feed(matcher, tokenizer, text)
    with pytest.raises(ValueError, match="not allowed"):
        feed(grammars.matcher(event_grammar(8, may_split=True)), tokenizer, text)


def test_tasks_are_bounded(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast) -> None:
    head = '{"type":"child","id":"c1","task":"'
    feed(grammars.matcher(event_grammar(2, may_split=True, shape=PlanShape(5))), tokenizer, head + "y" * 5 + '"')
    with pytest.raises(ValueError, match="not allowed"):
        feed(grammars.matcher(event_grammar(2, may_split=True, shape=PlanShape(5))), tokenizer, head + "y" * 6)


def test_forced_tokens_and_copies(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = grammars.matcher(event_grammar(3, may_split=True, first=7))
    assert matcher.forced() == []
    feed(matcher, tokenizer, '{"type":"c')
    forced = tokenizer.decode(matcher.forced())
    assert forced and 'hild","id":"c7","task":"'.startswith(forced)
    twin = matcher.copy()
    for token in matcher.forced():
        matcher.accept(token)
    assert tokenizer.decode(twin.forced()) == forced
    assert twin.mask().tolist() != matcher.mask().tolist()


def test_refused_token_changes_nothing(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = grammars.matcher(event_grammar(3, may_split=True))
    before = matcher.mask().tolist()
    with pytest.raises(ValueError, match="not allowed"):
        matcher.accept(tokenizer.eos_token_id)
    assert matcher.mask().tolist() == before and not matcher.accepting and not matcher.done


def test_only_eos_when_done(grammars: EventGrammars, tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = grammars.matcher(event_grammar(3, may_split=True))
    feed(matcher, tokenizer, '{"type":"atomic"}')
    assert matcher.done and set(allowed(matcher)) == grammars.eos_ids
    matcher.accept(tokenizer.eos_token_id)
    assert matcher.done


def test_fill_mask(grammars: EventGrammars) -> None:
    matcher = grammars.matcher(event_grammar(3, may_split=True))
    words = (1000 + 31) // 32
    assert matcher.mask().shape == (words,)
    rows = torch.full((2, words + 2), -1, dtype=torch.int32)
    matcher.fill_mask(rows[1])
    assert rows[1, :words].tolist() == matcher.mask().tolist()
    assert rows[1, words:].tolist() == [0, 0] and rows[0].tolist() == [-1] * (words + 2)
    row = np.full(words, -1, dtype=np.int32)
    matcher.fill_mask(row)
    assert row.tolist() == matcher.mask().tolist()
    for bad in (np.zeros(words - 1, np.int32), np.zeros(words, np.int64), torch.zeros(1, words, dtype=torch.int32)):
        with pytest.raises(ValueError, match="mask row"):
            matcher.fill_mask(bad)


def test_misuse_is_refused(grammars: EventGrammars) -> None:
    with pytest.raises(ValueError, match="no grammar for the phase 'direct'"):
        event_grammar(2, may_split=True, phase="direct")
    with pytest.raises(ValueError, match="at least 1"):
        event_grammar(2, may_split=True, first=0)
    with pytest.raises(ValueError, match="cannot be compiled"):
        grammars.matcher("start: nothing_here")


@pytest.mark.parametrize("kind", ["unigram", "word_piece", "word_level", "word_ends"])
def test_a_tokenizer_of_a_kind_that_grammars_do_not_know_is_refused(kind: str) -> None:
    with pytest.raises(RrmError, match="--constrain off"):
        EventGrammars(KINDS[kind]())
