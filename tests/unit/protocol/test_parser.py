"""The event parser: leniency by name, exact offsets, the same events however the text is cut."""

import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from searched import searched

from rrm_engine.protocol.events import Atomic, Await, Child, Done, Form, Malformed, ParsedEvent
from rrm_engine.protocol.fields import sanitize_id
from rrm_engine.protocol.final import extract_final
from rrm_engine.protocol.parser import EventParser
from rrm_engine.protocol.repair import MAX_CHARS
from rrm_engine.protocol.thinking import DEFAULT

CHILD = '{"type":"child","id":"a","task":"t","depends_on":[]}'
DONE = '{"type":"done"}'


def parse(text: str, thinking: bool = False) -> list[ParsedEvent | Malformed]:
    parser = EventParser(thinking)
    return parser.feed(text) + parser.close()


def events(text: str, thinking: bool = False) -> list[object]:
    return [e.event if isinstance(e, ParsedEvent) else e.reason for e in parse(text, thinking)]


def only(text: str) -> ParsedEvent:
    (found,) = parse(text)
    assert isinstance(found, ParsedEvent), found
    return found


def test_clean_lines_need_no_repair() -> None:
    text = (
        '{"type":"child","id":"case_a","task":"Find x, given \\"y\\" and \\\\frac{1}{2}.","depends_on":[]}\n'
        '{"type":"child","id":"b-2","task":"u","depends_on":["case_a"]}\n'
        '{"type":"await","children":["case_a","b-2"],"rule":"add them"}\n'
        '{"type":"atomic","answer":"one\\ntwo FINAL: 204"}\n'
        '{"type":"atomic"}\n' + DONE
    )
    assert events(text) == [
        Child("case_a", 'Find x, given "y" and \\frac{1}{2}.'),
        Child("b-2", "u", ("case_a",)),
        Await(("case_a", "b-2"), "add them"),
        Atomic("one\ntwo FINAL: 204"),
        Atomic(),
        Done(),
    ]
    assert all(e.repairs == () for e in parse(text) if isinstance(e, ParsedEvent))


def test_a_plan_may_begin_with_the_number_of_its_parts() -> None:
    for head in ("Parts: 3\n", "\nParts: 12\n\n"):
        parser = EventParser()
        assert [e.event for e in parser.feed(head + DONE) if isinstance(e, ParsedEvent)] == [Done()]
        assert not parser.repairs


WORKING = '1 + 2 = 3\n{"of":"it"} is that\n\n{"type":"atomic","answer":"FINAL: 3"}'


@pytest.mark.parametrize(
    ("form", "text", "repairs"),
    [
        (Form(working=True), WORKING, set()),
        (Form(working=True), "", set()),
        (Form(), WORKING, {"prose"}),
        (Form(bare_children=True), WORKING, {"prose"}),
        (Form(working=True), WORKING.replace("\n\n", " so "), {"prose"}),  # on the event's own line
        (Form(working=True), f"```\n{WORKING}", {"code_fence"}),
        (Form(working=True), f"Let me split:\n{CHILD}", {"prose"}),
        (Form(working=True), f"{WORKING}\nThat is all.\n{DONE}", {"prose"}),
        (Form(working=True), f"{DONE}\n{WORKING}", {"prose"}),
        (Form(bare_children=True), '{"type":"child","id":"a","task":"t"}', set()),
        (Form(working=True), '{"type":"child","id":"a","task":"t"}', {"missing_depends_on"}),
        (Form(bare_children=True), '{"type":"child","id":"a","task":"t",}', {"trailing_comma"}),
    ],
)
def test_what_a_style_asks_for_is_no_repair(form: Form, text: str, repairs: set[str]) -> None:
    for size in (1, len(text) or 1):
        parser = EventParser(form=form)
        found = [e for at in range(0, len(text), size) for e in parser.feed(text[at : at + size])]
        assert len([e for e in found if isinstance(e, ParsedEvent)]) == len(text.split('"type"')) - 1
        assert set(parser.repairs) == repairs == {name for e in found for name in getattr(e, "repairs", ())}


def test_event_is_complete_at_its_closing_brace() -> None:
    parser = EventParser()
    assert parser.feed(CHILD[:-1]) == []
    assert [e.event for e in parser.feed("}") if isinstance(e, ParsedEvent)] == [Child("a", "t")]
    assert parser.close() == []
    assert parser.feed(CHILD) == []


@pytest.mark.parametrize(
    ("text", "event", "repair"),
    [
        (f"Let me split:\n{DONE}", Done(), "prose"),
        (f"Parts: three\n{DONE}", Done(), "prose"),
        (f"Parts: 3, I think\n{DONE}", Done(), "prose"),
        (f"```json\n{DONE}\n```", Done(), "code_fence"),
        ('{"type":"atomic","answer":"4",}', Atomic("4"), "trailing_comma"),
        ("{'type':'atomic','answer':'it''s, what's \"left\"'}", Atomic("it''s, what's \"left\""), "single_quotes"),
        ("{“type”: “atomic”, “answer”: “it’s”}", Atomic("it’s"), "smart_quotes"),  # noqa: RUF001
        ('{"type":"atomic","answer":"the "best" one"}', Atomic('the "best" one'), "unescaped_quote"),
        ('{\n  "type": "await",\n  "children": ["a"]\n}', Await(("a",)), "several_lines"),
        ('{"type":"atomic","answer":"one\ntwo"}', Atomic("one\ntwo"), "newline_in_string"),
        ('{"type":"child","id":"a","task":"t"}', Child("a", "t"), "missing_depends_on"),
        ('{"type":"done","note":{"k":[1,true]}}', Done(), "unknown_field"),
        ('{"type":"done","note":{"type":"x"}}', Done(), "unknown_field"),
        ('{"type":"await","children":"a, b"}', Await(("a", "b")), "text_for_list"),
        ('{"type":"await","children":"all"}', Await(), "text_for_list"),
        ('{"type":"await","children":["a","b","a"]}', Await(("a", "b")), "duplicate_id"),
        ('{"type":"await","children":["a"}', Await(("a",)), "missing_bracket"),
        ('{"type":"await","children":[1,2]}', Await(("1", "2")), "number_as_text"),
        ('{"type":"atomic","answer":204}', Atomic("204"), "number_as_text"),
        ('{"type":"atomic","answer":[1,"b"]}', Atomic('["1", "b"]'), "answer_not_text"),
        ('{"Type":"Atomic","answer":"x"}', Atomic("x"), "type_spelling"),
        ('{"type":"child","id":"a","task":"t","dependencies":["b"]}', Child("a", "t", ("b",)), "synonym"),
        (
            r'{"type":"atomic","answer":"\frac{1}{2} \times \theta"}',
            Atomic(r"\frac{1}{2} \times \theta"),
            "latex_escape",
        ),
        (r'{"type":"atomic","answer":"\sqrt{2} \(x\)"}', Atomic(r"\sqrt{2} \(x\)"), "bad_escape"),
        ('{"type":"child","id":"case a.1","task":"t","depends_on":[]}', Child("case_a_1", "t"), "id_sanitized"),
        ('{"type":"atomic","answer":"7"', Atomic("7"), "missing_brace"),
    ],
)
def test_leniency_is_named_and_counted(text: str, event: object, repair: str) -> None:
    parser = EventParser()
    (found,) = parser.feed(text) + parser.close()
    assert isinstance(found, ParsedEvent)
    assert found.event == event
    assert repair in found.repairs
    assert parser.repairs == dict.fromkeys(found.repairs, 1)


def test_strict_json_is_never_read_differently() -> None:
    text = '{"type":"atomic","answer":"a \\"b\\", c: {\\"type\\":\\"done\\"} \\u00e9 \\ud83d\\ude00 \\ud83d \\t|"}'
    found = only(text)
    assert found.event == Atomic('a "b", c: {"type":"done"} é 😀 \ufffd \t|')
    assert found.repairs == ()


def test_several_objects_on_a_line_and_in_a_list() -> None:
    first, second = parse(f"{CHILD} {DONE}")
    assert isinstance(second, ParsedEvent)
    assert (first.end, second.start, second.repairs) == (len(CHILD), len(CHILD) + 1, ("same_line",))
    assert events(f"[{CHILD},\n{DONE}]") == [Child("a", "t"), Done()]
    assert events(f'{{"events":[{CHILD},{DONE}]}}') == [Child("a", "t"), Done()]


@pytest.mark.parametrize(
    "prose",
    [
        r"\frac{1}{2} \text{if } {x : x>0}",
        '{"a", "b", "c"}',
        "f^{'} and g^{''} and {",
        '{"x": 1, "y": {"z": [2]}}',
        '{"x": 1,\n',
        "{\n\n",
        "{'a",
        "an <unclosed tag, a < b, </think>",
        "{ {{ {}",
        '{"' + "k" * 50,
    ],
)
def test_other_braces_swallow_no_event(prose: str) -> None:
    assert events(f"{prose} {DONE}") == [Done()]
    assert events(f"{prose}\n{CHILD}\n{DONE}") == [Child("a", "t"), Done()]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"type":"child","id":"b","task":"never closed', "another event began"),
        ('{"type":"child","id":"b","task":"never closed}', "another event began"),
        ("{'type':'child','id':'b','task':'never closed", "another event began"),
        ('{"type":"child","id":"b","task":[1,', "another event began"),
        ('{"type":"child","task":"t"}', "without an id"),
        ('{"type":"child","id":"b","task":" "}', "without a task"),
        ('{"type":"plan"}', "unknown type"),
        ('{"id":"b","task":"t"}', "without a type"),
        ('{"type":"child" "id":"b"}', "unknown type"),
        ('{"type":"done","x"}', "no colon"),
        ('{"type":"await","children":{"a":1}}', "not a list"),
        ('{"type":"done","x":' + "[" * 40, "nested too deeply"),
        ('{"type":"atomic","answer":"' + "x" * MAX_CHARS, "longer than"),
    ],
)
def test_broken_event_is_reported_and_the_next_is_read(broken: str, reason: str) -> None:
    first, *rest = parse(f"{broken}\n{CHILD}\n{DONE}")
    assert isinstance(first, Malformed)
    assert reason in first.reason
    assert [e.event for e in rest if isinstance(e, ParsedEvent)] == [Child("a", "t"), Done()]
    assert first.text == f"{broken}\n{CHILD}"[first.start : first.end]


def test_missing_brace_before_the_next_event() -> None:
    text = f"{CHILD[:-1]}\n{DONE}"
    first, second = parse(text)
    assert isinstance(first, ParsedEvent) and first.event == Child("a", "t")
    assert first.repairs == ("missing_brace",)
    assert (text[first.start : first.end], text[second.start : second.end]) == (CHILD[:-1], DONE)


def test_unclosed_text_gives_way_to_an_event_on_its_line() -> None:
    text = f'{{"type":"child","id":"b","task":"never closed}} {DONE}'
    assert events(text) == ["another event began inside the object", Done()]


def test_cut_off_event_is_not_completed_by_guessing() -> None:
    for text in ('{"type":"atomic"', '{"type":"atomic","answer":"The ans', '{"type":"child","id":"a","task":"t"'):
        assert events(text) == ["the text ended inside the object"]


def test_quoted_event_inside_a_text_stays_text() -> None:
    text = """{'type':'atomic','answer':'I would write {"type":"done"} here'}"""
    assert only(text).event == Atomic('I would write {"type":"done"} here')


def test_thinking_is_ignored() -> None:
    text = f"<think>{CHILD}</think>{DONE}<think>{CHILD}"
    assert events(text) == [Done()]
    assert events(f"I could write {CHILD}</think>\n{DONE}", thinking=True) == [Done()]
    assert events(CHILD, thinking=True) == []
    assert only('{"type":"atomic","answer":"<think>"}').event == Atomic("<think>")


def test_visible() -> None:
    assert DEFAULT.visible("a<think>b</think>c<think>d") == "ac"
    assert DEFAULT.visible("b</think>c", thinking=True) == "c"
    assert DEFAULT.visible("b", thinking=True) == ""


def test_ids_become_path_components() -> None:
    assert sanitize_id(" case a/1 ") == "case_a_1"
    assert sanitize_id("\u03b1") == "u3b1"
    assert sanitize_id("  ") == ""
    long = [sanitize_id("x" * 50 + tail) for tail in "ab"]
    assert all(len(name) == 40 for name in long) and long[0] != long[1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so FINAL: 204", "204"),
        ("**FINAL:** **$\\frac{1}{2}$**.", "\\frac{1}{2}"),
        ("FINAL: 3\nno, FINAL: 4 ", "4"),
        ("FINAL: 3, no FINAL: 4", "4"),
        ('{"type":"atomic","answer":"FINAL: 204"}', "204"),
        ("\\boxed{\\frac{1}{2}} then \\boxed{\\text{a \\} b}}", "\\text{a \\} b}"),
        ("\\boxed{1} and $x = \\boxed{2}$", "1, 2"),
        ("\\boxed{1}, \\boxed{1}", "1"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("FINAL:\n\n**5**", "5"),
        ("## Final Answer\n$$\n\\frac{1}{2}\n$$", "\\frac{1}{2}"),
        ("Final: <33>", "33"),
        ("FINAL: <1, 2>", "<1, 2>"),
        ("FINAL: $x=1$ or $x=2$", "$x=1$ or $x=2$"),
        ("FINAL: y'", "y'"),
        ("FINAL: $5", "5"),
        ('FINAL:\n{"type":"done"}', None),
        ("the final answer is near", None),
        ("FINAL: 3 but \\boxed{5}", "5"),
        ("\\boxed{5} so FINAL: 3", "3"),
        ("**Final Answer:** \\boxed{204}", "204"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("\\boxed{5}\nFINAL: **", "5"),
        ("FINAL: (1, 2).", "(1, 2)"),
        ("FINAL: \\(12\\)", "12"),
        ("FINAL: [1, 2)", "[1, 2)"),
        ("(FINAL: f(2).)", "f(2)"),
        ("FINAL: \\{1, 2\\}", "\\{1, 2\\}"),
        ("\\boxed{[1, 2)}", "[1, 2)"),
        ("SEMIFINAL: 3", None),
        ("final 3", None),
    ],
)
def test_extract_final(text: str, answer: str | None) -> None:
    assert extract_final(text) == answer


PIECES = [
    CHILD, DONE, "\n", " ", "{", "}", '"', "'", "“", "\u2019", "\\", ":", ",", "[", "]", "type", '{"type"', '{"type":',
    "{'type':", '"task":', '"child"', "<think>", "</think>", "<", "```", "x", "\\u00e9", "\\n", "1", '{"a":',
    '{"type":"atomic","answer":"', '{"type":"await","children":["a"',
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=25).map("".join)


@searched(400)
@given(TEXTS, st.lists(st.integers(0, 200), max_size=12), st.booleans())
@example('{"type":"atomic","answer":"\\', [1, 27, 28], False)
def test_chunks_do_not_matter(text: str, cuts: list[int], thinking: bool) -> None:
    whole = parse(text, thinking)
    for points in (sorted(min(c, len(text)) for c in cuts), range(len(text))):
        parser = EventParser(thinking)
        edges = [0, *points, len(text)]
        found = [e for a, b in pairwise(edges) for e in parser.feed(text[a:b])]
        assert found + parser.close() == whole
    last = 0
    for e in whole:
        assert last <= e.start < e.end <= len(text)
        assert text[e.start] == "{"
        if isinstance(e, Malformed):
            assert e.text == text[e.start : e.end]
        last = e.end


@searched(200)
@given(TEXTS.filter(lambda text: "think" not in text))
def test_an_event_on_its_own_line_always_arrives(before: str) -> None:
    found = [e.event for e in parse(f"{before}\n{CHILD}\n") if isinstance(e, ParsedEvent)]
    assert Child("a", "t") in found


@pytest.mark.parametrize(
    "unit", ["{ ", "<thin", '{"a":', "{'a':1,'b':", f"{DONE}\n", '{"a":[1,2', '{"type":"atomic","answer":"a"a', "a"]
)
def test_time_is_linear(unit: str) -> None:
    def seconds(count: int) -> float:
        parser, begin = EventParser(), time.process_time()
        for _ in range(count):
            parser.feed(unit)
        parser.close()
        return time.process_time() - begin

    small = min(seconds(2000) for _ in range(2))
    assert seconds(16000) < 24 * small + 0.2
