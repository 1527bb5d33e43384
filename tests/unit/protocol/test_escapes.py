r"""JSON strings with LaTeX in them: commands stay, real escapes stay, however the text arrives."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrm_engine.protocol.escapes import unescape
from rrm_engine.protocol.events import Atomic, ParsedEvent
from rrm_engine.protocol.parser import EventParser

LATEX = [
    r"\tanh x", r"\nu", r"\rm d", r"\neg p", r"\top", r"\frac{1}{2}", r"\beta", r"\bar{x}", r"\right)", r"\theta",
    r"\times", r"\text{cm}", r"\nabla f", r"E = h\nu", r"x \ne 0", r"a \ni b", r"$a\nmid b$", r"\(a\nless b\)",
    r"\rho", r"\rangle", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\tfrac12", r"\textbf{B}", r"\underline{x}",
    r"\upsilon", r"\binom{5}{2}", r"\forall x", r"\not\in", r"x\notin A", r"\nRightarrow", r"\rightarrow", r"\to",
    r"x \to 0", r"\sqrt{2}", r"\tau_1", r"3\times4", r"\nleq", r"\triangle ABC", r"\tilde x", r"\rfloor", r"\neq",
    r"a\neq b", r"\natural", r"\unlhd", r"\nu=3", r"$\nu = 3$", r"2\nu", r"\left(\frac12\right)", r"\newline",
    r"\nearrow", r"\flat", r"\bigcup", r"\boxed{5}", r"\rVert", r"\therefore", r"\begin{cases}x\\y\end{cases}",
]  # fmt: skip
ESCAPES = [
    r"First.\n\nThen", r"a\n\tIndented", r"caf\u00e9", r"\u00bd", r"x = 3\nu = 5", r"x is 4 or\nless than 5",
    r"Also,\nno", r"Then\nnext", r"a\tb\tc", r"Line\r\nnext", r"a\rThen", r"1.\nnu is", r"Step 1:\nexists",
    r"two\nparallel lines", r"so\nnothing", r"\nnorth", r"\nNow", r"\n\nu = 3", r"$\\frac12$.\nu = 3",
    r"answer:\ne = 5", r"and\ntherefore", r"tab\there", r"x\ttotal", '\\"q\\"', r"c:\\temp", r"a\/b", r"\\times",
    r"\\begin{a}1\\\\2\\end{a}", r"\\nu", r"x\nequals 3", r"\nnote that", r"\nnumber", r"\nit", r"\nmiddle",
    r"\rreturn", r"\ntan", r"\nright", r"a\nnull result", r"x\nnormal", r"\tthe", r"\ttag me", r"\ttop", r"\n-1",
    r"\n3", r"\t3", r"\ud83d\ude00",
]  # fmt: skip
COMMANDS = st.sampled_from([
    "tan", "tanh", "tau", "text", "times", "theta", "to", "top", "tfrac", "rho", "rm", "right", "rangle", "rfloor",
    "rightarrow", "nabla", "neq", "neg", "notin", "nleq", "natural", "beta", "bar", "begin", "binom", "frac", "forall",
    "underline", "upsilon", "sqrt", "pi", "alpha", "ldots",
])  # fmt: skip


@pytest.mark.parametrize("text", LATEX)
def test_unescaped_latex_is_kept(text: str) -> None:
    repairs: set[str] = set()
    assert unescape(text, repairs) == text
    assert repairs <= {"latex_escape", "bad_escape"} and repairs


@pytest.mark.parametrize("text", ESCAPES)
def test_what_json_means_is_read(text: str) -> None:
    repairs: set[str] = set()
    assert unescape(text, repairs) == json.loads(f'"{text}"')
    assert not repairs


@given(st.text(max_size=40).filter(lambda text: not re.search(r"[\b\f\n\r\t][A-Za-z]", text)))
def test_whatever_json_writes_is_read_back(text: str) -> None:
    repairs: set[str] = set()
    assert unescape(json.dumps(text)[1:-1], repairs) == text
    assert not repairs


@given(st.lists(COMMANDS, min_size=1, max_size=5), st.sampled_from(["", " ", "{x}", "_1", "^2", ")", "3"]), st.data())
def test_commands_are_kept_and_the_same_in_pieces(names: list[str], after: str, data: st.DataObject) -> None:
    answer = " ".join(f"\\{name}{after}" for name in names)
    event = f'{{"type":"atomic","answer":"FINAL: {answer}."}}'
    parser, found = EventParser(), []
    while event:
        cut = data.draw(st.integers(1, len(event)))
        found += parser.feed(event[:cut])
        event = event[cut:]
    assert len(found) == 1 and isinstance(found[0], ParsedEvent)
    assert found[0].event == Atomic(f"FINAL: {answer}.")
    assert {"latex_escape", "bad_escape"} & set(found[0].repairs)


@given(st.lists(COMMANDS, min_size=1, max_size=4))
def test_escaped_commands_are_plain_json(names: list[str]) -> None:
    text = "so " + ", ".join(f"\\{name} x" for name in names) + ".\nu = 3.\n\tThen"
    repairs: set[str] = set()
    assert unescape(json.dumps(text)[1:-1], repairs) == text
    assert not repairs


@pytest.mark.parametrize("unit", ["\\nu ", "$\\nu", "\\\\", "\\", "x\\ne 3", "\\(", "\\frac"])
def test_time_is_linear(unit: str) -> None:
    begin = time.process_time()
    unescape(unit * (16_000 // len(unit)), set())
    assert time.process_time() - begin < 1
