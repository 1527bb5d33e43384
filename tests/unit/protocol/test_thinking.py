"""Thinking in front of a grammar: free up to its end, then a valid graph; matcher, parser and `verify` agree."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import JOBS, LEANINGS, TASKS, VOCABULARY, WRITING, Lab, recorded, wrong_tokens
from oracle import CHATML, chat_model, chat_tokenizer
from tiny_tokenizers import KINDS
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rrm_engine.backends.local import Solver
from rrm_engine.bench.cli import main as bench
from rrm_engine.errors import RrmError
from rrm_engine.loading.prepare import prepare_model
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.events import Atomic, Await, Child, ParsedEvent
from rrm_engine.protocol.grammar import EventGrammars, ThinkingMatcher, event_grammar
from rrm_engine.protocol.parser import LAYOUT_REPAIRS, EventParser
from rrm_engine.protocol.thinking import DEFAULT, KNOWN, Marks, Thought, find_marks
from rrm_engine.solver.result import Job
from rrm_engine.verify import verify_run

HARMONY = KNOWN[1]
GRAPH = event_grammar(3, may_split=True, phase="graph")
OPENS = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
SWITCHED = CHATML.replace(
    "assistant\n' }}{% endif",
    "assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif",
)


def allowed(matcher: Any) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    """With tokens that end a block and go on, and the channels' own."""
    tokenizer = KINDS[kind].__wrapped__()  # type: ignore[attr-defined]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (">\n", ">\n\n", "k>x", "</think>{", "]\n\n")])
    names = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


def walk(grammars: EventGrammars, tokenizer: Any, thought: Thought, seed: int) -> tuple[str, ThinkingMatcher, int]:
    """A random phase: its text, the matcher at its end, how many tokens it thought. Checks the matcher on the way."""
    rng, marks = random.Random(seed), thought.marks
    matcher = grammars.matcher(event_grammar(3, may_split=True, marks=marks), thought)
    assert isinstance(matcher, ThinkingMatcher)
    parser, stream = EventParser(thought.opened, marks), Detokenizer(tokenizer)
    likely = {t for text in (marks.close, marks.ending, f"{marks.close}\n\n") for t in tokenizer.encode(text)}
    likely |= {t for name, t in tokenizer.get_vocab().items() if "thi" in name or ">" in name}
    closers = {i for text, i in tokenizer.get_vocab().items() if text[0] in '"ĊFI'} | grammars.eos_ids
    text, thought_tokens = "", 0
    for _ in range(6000):
        choices = allowed(matcher)
        thinks = matcher.thinks
        pushy = (likely if thinks else closers).intersection(choices)
        token = rng.choice(sorted(pushy) if pushy and rng.random() < 0.4 else choices)
        twin = matcher.copy()
        twin.accept(token)
        assert matcher.thinks == thinks, "a copy is independent"
        matcher.accept(token)
        thought_tokens += thinks
        if token in grammars.eos_ids:
            assert not thinks
            text += stream.end()
            break
        piece = stream.step(token)
        text += piece
        parser.feed(piece)
        if not matcher.thinks:
            assert not parser.thinking
    else:
        raise AssertionError("it never ended")
    return text, matcher, thought_tokens


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("marks", [DEFAULT, HARMONY, Marks("[THINK]", "[/THINK]")])
@pytest.mark.parametrize("kind", ["byte_level", "tiktoken_like", "byte_fallback", "byte_fallback_bare"])
def test_a_graph_follows_whatever_is_thought(kind: str, marks: Marks, opened: bool) -> None:
    tokenizer = tokenizer_for(kind)
    grammars = EventGrammars(tokenizer)
    opening, ending = len(grammars.spelled(marks.open)), len(grammars.spelled(marks.ending))
    cuts = 0
    for seed in range(12):
        limit = (3, 40)[seed % 2]
        text, matcher, tokens = walk(grammars, tokenizer, Thought(marks, opened or marks.always, limit), seed)
        assert tokens <= limit + ending + (0 if opened or marks.always else opening)
        cuts += matcher.cut
        parser = EventParser(opened or marks.always, marks)
        found = [*parser.feed(text), *parser.close()]
        assert found and all(isinstance(one, ParsedEvent) for one in found), text
        events = [one.event for one in found if isinstance(one, ParsedEvent)]
        assert isinstance(events[-1], Atomic | Await) and all(isinstance(one, Child) for one in events[:-1])
        assert not set(parser.repairs) - LAYOUT_REPAIRS
        if not opened and not marks.always:
            assert text.lstrip().startswith(marks.open)
    assert cuts  # some reached their limit


def test_control_without_thinking_the_grammar_forbids_its_end() -> None:
    tokenizer = tokenizer_for("byte_level")
    matcher = EventGrammars(tokenizer).matcher(GRAPH)
    assert tokenizer.convert_tokens_to_ids("</think>") not in allowed(matcher)


def test_what_is_refused_leaves_the_matcher_where_it_was() -> None:
    tokenizer = tokenizer_for("byte_level")
    grammars = EventGrammars(tokenizer)
    matcher = grammars.matcher(GRAPH, Thought(DEFAULT, True, 10))
    for name in ("</s>", "</think>{"):
        with pytest.raises(ValueError, match="not allowed in thinking"):
            matcher.accept(tokenizer.convert_tokens_to_ids(name))
    matcher.accept(tokenizer.convert_tokens_to_ids("</think>"))
    for token in tokenizer.encode('\n{"type":"atomic"}', add_special_tokens=False):
        matcher.accept(token)
    assert grammars.eos_ids & set(allowed(matcher))


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("{{ '<think>\n' }} {{ m.content.split('</think>')[-1] }}", DEFAULT),
        ("[THINK] a [/THINK]", Marks("[THINK]", "[/THINK]")),
        ("{% set end = '</seed:think>' %}", Marks("<seed:think>", "</seed:think>")),
        ("<|start|>assistant<|channel|>final<|message|>", HARMONY),
        ("no marks", DEFAULT),
    ],
)
def test_marks_are_found_in_the_template(template: str, marks: Marks) -> None:
    assert find_marks(template) == marks


@pytest.mark.parametrize("marks", KNOWN)
def test_parser_and_visible_text_know_the_marks(marks: Marks) -> None:
    event = '{"type":"atomic","answer":"FINAL: 7"}'
    text = f"{event} hm{marks.close}\n{event}{marks.open} x {event}{marks.close} y"
    for size in (1, 5, len(text)):
        parser = EventParser(True, marks)
        found = [one for i in range(0, len(text), size) for one in parser.feed(text[i : i + size])]
        assert [one.start for one in found] == [text.index(event, 1)]
    assert marks.visible(text, thinking=True) == f"\n{event} y"
    assert not marks.unfinished(text, thinking=True)
    assert marks.unfinished("hm", thinking=True) and marks.unfinished(f"a{marks.open}b")
    assert not marks.unfinished("hm")


# ---- whole runs


def thinking_lab(folder: Path, template: str, style: Path) -> Lab:
    """As the tests' lab, with a tokenizer whose template knows thinking."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = chat_tokenizer([WRITING] * 3, vocab_size=VOCABULARY - 4, initial_alphabet=alphabet, max_token_length=12)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.chat_template = template
    changes = {"vocab_size": VOCABULARY, "pad_token_id": tokenizer.eos_token_id}
    plain = chat_model(tokenizer, {**LEANINGS, "</think>": 7.0}, initializer_range=0.15, **changes)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Lab(plain, prepare_model(plain.from_pretrained(folder), tokenizer, str(folder)), style)


@pytest.fixture(scope="module", params=["opens", "switched"])
def thinker(
    request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Lab, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("thinker")
    template, settings = {
        "opens": (OPENS, {}),
        "switched": (SWITCHED, {"graph_thinking": True, "continuation_thinking": True}),
    }[request.param]
    return thinking_lab(folder, template, lab.style), settings


def test_thinking_runs_write_graphs_and_every_token_is_plain_transformers_own(thinker: Any) -> None:
    lab, settings = thinker
    room = {"planner_max_tokens": 200, "continuation_max_tokens": 200, "max_sequence_tokens": 1600, "max_depth": 1}
    run = recorded(lab, JOBS[:2], **room, **settings)
    assert any(result.resumes for result in run.results.values())
    assert any(result.repairs.get("thinking_cut") for result in run.results.values())
    assert not any(result.error for result in run.results.values())
    events = [event for event in run.events if event["event"] == "event"]
    assert {event["kind"] for event in events} >= {"child", "await", "atomic"}
    assert wrong_tokens(lab.plain, run) == {}


def test_a_recorded_thinking_run_is_verified(thinker: Any, tmp_path: Path) -> None:
    """The masks of thinking, its forced end among them, are made again from the trace."""
    lab, settings = thinker
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "run"
    tasks.write_text(json.dumps({"problem": TASKS[0], "answer": "5"}))
    flags = {
        "model": lab.model.name,
        "dtype": "float32",
        "prompt-style": lab.style,
        "modes": "rrm",
        "constrain": "on",
        "temperature": 1,
        "max-depth": 1,
        "planner-max-tokens": 100,
        "continuation-max-tokens": 80,
        "out": out,
    }
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    switches = [f"--{name.replace('_', '-')}" for name in settings]
    assert bench([str(tasks), *given, *(part for name in switches for part in (name, "on")), "--quiet"]) == 0
    assert {check.verdict for check in verify_run(out, dtypes=["run"])} <= {"exact", "near tie"}
    trace = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert any(event.get("grammar") and event["grammar"].get("thought", {}).get("limit") == 50 for event in trace)
    for event in trace:  # control: with another limit other tokens are possible
        if event.get("grammar") and "thought" in event["grammar"]:
            event["grammar"]["thought"]["limit"] = 3
    (out / "trace.jsonl").write_text("".join(json.dumps(event) + "\n" for event in trace))
    assert "broken" in {check.verdict for check in verify_run(out, dtypes=["run"])}


def test_thinking_is_what_the_template_makes_of_it(thinker: Any) -> None:
    lab, settings = thinker
    resolved = lab.solver(**settings).resolved
    assert resolved.graph_thinking and resolved.continuation_thinking
    assert resolved.planner_max_tokens == 120 + 24  # the style's own, and a solver's to think
    if not settings:
        assert resolved.solver_thinking and resolved.direct_thinking
        with pytest.raises(RrmError, match=r"--graph-thinking off: .* always opens"):
            lab.solver(graph_thinking=False)
    else:
        assert not resolved.solver_thinking


def test_thinking_that_takes_all_tokens_is_said(thinker: Any) -> None:
    lab, settings = thinker
    if settings:
        return
    solver: Solver = lab.solver(direct_max_tokens=5)
    (result,) = solver.run([Job("t", TASKS[0], "direct")])
    assert result.answer == "" and result.repairs == {"thinking_unfinished": 1}
