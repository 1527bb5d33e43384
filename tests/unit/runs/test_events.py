"""The events of recorded runs: every class is written by some run, read back as what it was, and else refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from by_hand import row
from lab import JOBS, Lab, Recorded

from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import RECORDED, Concluded, Event, Started, Transcript, WroteChild, WroteDone, parse
from rrm_engine.runs.reader import read_events, read_rows


def test_every_class_is_written_and_read_back(
    lab: Lab, reference: Recorded, forked_reference: Recorded, calm: Path, crowded: Path, cramped: Path, packaged: Path
) -> None:
    seen: set[type[Event]] = set()
    lines = [
        line for run in (calm, crowded, cramped, packaged) for line in (run / "trace.jsonl").read_text().splitlines()
    ]
    events = [*reference.events, *forked_reference.events]
    with closing(lab.solver().run(JOBS, events.append, concurrency=4)) as results:
        next(results)
    lines += [json.dumps(event) for event in events]
    for line in lines:
        value = json.loads(line)
        session = value.pop("session", None)
        event = parse(dict(value))
        seen.add(type(event))
        again = event.as_json() | ({} if session is None else {"session": session})
        assert json.loads(json.dumps(again)) == json.loads(line)
    assert seen >= set(RECORDED) - {WroteDone}  # of a node that still decodes when it says so, which is rare
    done = WroteDone(repairs=("single_quotes",), **BASE)
    assert parse(json.loads(json.dumps(done.as_json()))) == done


BASE: dict[str, Any] = {"t": 1.0, "job": "a/rrm/0", "node": "root", "step": 1, "tokens": 1, "blocks": 1}
BASE |= {"pinned": 0, "offloaded": 0}
LINE = {
    "t": 1,
    "job": "a/rrm/0",
    "node": "root",
    "step": 3,
    "event": "start",
    "tokens": 4,
    "blocks": 1,
    "phase": "graph",
    "after": [],
    "prompt_tokens": 4,
    "task": "x",
    "sampling": {},
    "grammar": None,
    "budget": 9,
    "pinned": 0,
    "offloaded": 0,
    "session": 0,
}
END = {
    **{name: LINE[name] for name in ("t", "job", "node", "step", "tokens", "blocks", "pinned", "offloaded")},
    "event": "concluded",
    "answer": "7",
    "ok": True,
    "counters": {},
    "token_ids": [1, 2, 3],
    "sampled": [[1, 3]],
}


def test_what_older_runs_lack_may_be_missing(tmp_path: Path) -> None:
    older = {name: value for name, value in LINE.items() if name not in ("budget", "session")}
    (tmp_path / "trace.jsonl").write_text(f"{json.dumps(older)}\n{json.dumps(END)}\n")
    (began, ended) = [event for _, event in read_events(tmp_path)]
    assert isinstance(began, Started) and began.budget is None
    assert isinstance(ended, Concluded)
    assert ended.transcript == Transcript(counters={}, token_ids=[1, 2, 3], sampled=((1, 3),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("prompt_tokens"), "the event start lacks prompt_tokens: another version recorded it"),
        (lambda e: e.pop("pinned"), "the event start lacks pinned"),
        (lambda e: e.update(mood="x"), "the event start has 'mood', which this version does not know"),
        (lambda e: e.update(event="dream"), "this version knows no event 'dream'"),
        (lambda e: e.update(event=["start"]), r"this version knows no event ['start']"),
        (lambda e: e.update(event="event"), "this version knows no event None"),
        (lambda e: e.update(event="text", text="x"), "this version knows no event 'text'"),
        (lambda e: e.update(step=1.5), "step of the event start is 1.5, not a whole number"),
        (lambda e: e.update(tokens=True), "tokens of the event start is True, not a whole number"),
        (lambda e: e.update(t="1"), "t of the event start is '1', not a number"),
        (lambda e: e.update(phase="sleep"), "phase of the event start is 'sleep', not one of direct, graph, "),
        (lambda e: e.update(after="root.a"), "after of the event start is 'root.a', not a list"),
        (lambda e: e.update(after=[1]), "an entry in after of the event start is 1, not a text"),
        (lambda e: e.update(grammar={"children": 1}), "grammar of the event start lacks may_split"),
        (lambda e: (e.clear(), e.update(END, sampled=[[1]])), "sampled of the event concluded is [1], not 2 values"),
        (lambda e: (e.clear(), e.update(END, token_ids=[1, "2"])), "token_ids of the event concluded is '2', not a"),
        (lambda e: (e.clear(), e.update(END, sampled=None)), "sampled of the event concluded is None, not a list"),
    ],
)
def test_another_shape_is_refused_with_file_and_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    wrong = dict(LINE)
    change(wrong)
    (tmp_path / "trace.jsonl").write_text(f"{json.dumps(LINE)}\n{json.dumps(wrong)}\n")
    with pytest.raises(RunError) as refused:
        list(read_events(tmp_path))
    found = str(refused.value)
    assert found.startswith(f"{tmp_path / 'trace.jsonl'}, line 2: ") and message in found
    assert "\n" not in found and found.isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("latency_s"), "line 1: the row lacks latency_s"),
        (lambda r: r.update(nodes="3"), "line 1: nodes of the row is '3', not a whole number"),
        (lambda r: r.update(error=1), "line 1: error of the row is 1, not a text or null"),
        (lambda r: r.update(sample=-1), "line 1: the row is of no job"),
    ],
)
def test_a_row_of_another_shape(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    wrong: dict[str, Any] = dict(row("a", "rrm", "7"))
    change(wrong)
    (tmp_path / "rows.jsonl").write_text(json.dumps({**wrong, "note": "of another version"}) + "\n")
    with pytest.raises(RunError, match=message):
        list(read_rows(tmp_path))


def test_a_half_of_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    wrote = WroteChild(id="\ud800", task="", depends_on=(), child=None, repairs=(), **BASE)
    (tmp_path / "trace.jsonl").write_text(json.dumps(wrote.as_json()) + "\n")
    assert [event for _, event in read_events(tmp_path)] == [wrote]


def test_reading_a_run_imports_no_torch() -> None:
    code = "import sys, rrm_engine.runs.reader, rrm_engine.runs.manifest; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
