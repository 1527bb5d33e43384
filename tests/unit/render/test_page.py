"""The page's data against a graph whose times are known, and what texts of models must not do to it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import both, row, save
from traced import known_graph

pytest.importorskip("scipy")

from rrm_engine.render.cli import main
from rrm_engine.render.document import document
from rrm_engine.render.jobs import drawn, parts
from rrm_engine.render.page import as_json, page
from rrm_engine.render.strings import Strings
from rrm_engine.runs.arms import arms, read_runs
from rrm_engine.runs.events import Paused, Resumed, Started

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>]]>\u2028\u202e\x00{{data}} \ud83d end"


def drawing(**settings: Any) -> dict[str, Any]:
    return drawn(known_graph(), Strings(1000), **{"block_size": 4, "wait_policy": "pin", **settings})


def test_a_known_graph_is_told_as_it_was() -> None:
    found = drawing()
    root, a, b = found["nodes"]
    assert [node["path"] for node in found["nodes"]] == ["root", "root.a", "root.b"]
    assert [node["parent"] for node in found["nodes"]] == [-1, 0, 0]
    assert found["span"] == 16383
    plan, further = root["phases"]
    times = ("ready", "admitted", "first", "end")
    assert [plan[name] for name in times] == [1, 3, 7, 33] and plan["kind"] == "plan"
    assert [further[name] for name in times] == [1023, 2047, 4095, 8191] and further["kind"] == "continue"
    assert [b["phases"][0][name] for name in times] == [31, 31, 63, 767] and b["phases"][0]["out"] == [[191, 255]]
    assert a["phases"][0]["kind"] == "solve" and (plan["tokens"], further["tokens"], b["tokens"]) == (5, 3, 9)
    assert root["waits"] == [[33, 1023]] and a["waits"] == []
    assert [event["kind"] for event in plan["events"]] == ["child", "child"]
    assert [event["child"] for event in plan["events"]] == ["root.a", "root.b"]


def test_arrows_and_the_critical_path() -> None:
    root, a, b = drawing()["nodes"]
    assert a["phases"][0]["giver"] == {"node": 0, "t": 15, "critical": False}
    assert b["phases"][0]["giver"] == {"node": 0, "t": 31, "critical": True}
    assert root["phases"][0]["giver"] is None
    assert root["phases"][1]["after"] == [{"node": 1, "t": 255}, {"node": 2, "t": 1023}]
    assert root["phases"][1]["giver"] == {"node": 2, "t": 1023, "critical": True}
    assert drawing()["critical"] == [[0, 1, 31], [2, 31, 767], [0, 1023, 8191]]


def test_a_node_that_nobody_needed_is_marked() -> None:
    trace = known_graph()
    first, second = trace.nodes["root"]
    trace.nodes["root"] = [first, replace(second, after=("root.b",))]
    found = drawn(trace, Strings(1000), 4, "pin")
    assert [node["useful"] for node in found["nodes"]] == [True, False, True]


def test_texts_that_were_not_recorded_are_made_of_token_ids() -> None:
    root, a, _ = drawn(known_graph(), strings := Strings(1000), 4, "pin", lambda ids: f"{len(ids)} tokens")["nodes"]
    plan, further = root["phases"]
    told = [strings.texts[phase["prompt"]] for phase in (plan, further, a["phases"][0])]
    assert told == ["10 tokens", "35 tokens", "20 tokens"]
    assert [phase["text"] for phase in (plan, further)] == [[["text", "5 tokens"]], [["text", "3 tokens"]]]
    assert all(
        phase["text"] == [] and phase["prompt"] is None for node in drawing()["nodes"] for phase in node["phases"]
    )


def test_recorded_texts_are_shown_as_they_were() -> None:
    trace, strings = known_graph(), Strings(1000)
    texts: dict[type, dict[str, Any]] = {
        Started: {"system": "be brief", "prompt": "do"},
        Resumed: {"appended": "a = 1"},
        Paused: {"text": "<b>"},
    }
    events = [replace(event, **texts.get(type(event), {})) for event in trace.events]
    nodes = drawn(replace(trace, events=events), strings, 4, "pin", lambda ids: "made")["nodes"]
    plan, further = nodes[0]["phases"]
    assert [strings.texts[plan[name]] for name in ("system", "prompt")] == ["be brief", "do"]
    assert strings.texts[further["prompt"]] == "a = 1" and further["system"] is None
    assert plan["text"] == [["text", "<b>"]]
    assert strings.texts == ["be brief", "do", "a = 1"]  # each once


def test_blocks_between_events_only_become_more() -> None:
    trace = known_graph()
    levels = [0, 0, 3, 4, 4, 5, 9, 12, 12, 20, 30, 30, 24, 31, 14, 14, 16, 20, 0, 0]
    pinned = [0] * 8 + [4] * 7 + [0] * 5
    events = [replace(e, blocks=n, pinned=p) for e, n, p in zip(trace.events, levels, pinned, strict=True)]
    kv = drawn(replace(trace, events=events), Strings(1000), 4, "pin")["kv"]
    points = list(zip(*kv.values(), strict=True))
    assert points == sorted(points, key=lambda point: point[0])
    at = {t: [point[1:] for point in points if point[0] == t] for t in kv["t"]}
    assert at[33] == [(12, 0, 0, 0), (8, 4, 0, 0)]  # what it holds is pinned from the pause on
    assert at[255] == [(26, 4, 0, 0), (20, 4, 0, 0)]  # up to the pause, then without a's blocks
    assert all(min(point[1:]) >= 0 for point in points)
    dropped = drawing(wait_policy="drop")["kv"]
    held = dict(zip(dropped["t"], dropped["drop"], strict=True))
    assert (held[33], held[63], held[1023]) == (4, 4, 0)  # 15 tokens in blocks of 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("plain", [("text", "plain")]),
        ("<think>hm</think>so", [("thinking", "hm"), ("text", "so")]),
        ("hm</think>so", [("thinking", "hm"), ("text", "so")]),
        ("a<think>never ends", [("text", "a"), ("thinking", "never ends")]),
        ("<think></think>\n\nso", [("text", "\n\nso")]),
        ("x</think>y<think>z</think>w", [("thinking", "x"), ("text", "y"), ("thinking", "z"), ("text", "w")]),
        ("[THINK]hm[/THINK]so", [("thinking", "hm"), ("text", "so")]),
    ],
)
def test_thinking_stands_apart(text: str, found: list[tuple[str, str]]) -> None:
    assert list(parts(text)) == found


def test_long_texts_lose_their_middle_and_say_so() -> None:
    strings = Strings(10)
    assert strings.put("short") == strings.put("short") == 0 and strings.put("") is None
    assert strings.cut("0123456789" * 5) == "01234\n[... 40 characters left out of this page ...]\n56789"
    assert strings.cut("0123456789") == "0123456789"


def hostile_run(path: Path) -> Path:
    rows = both("t1", direct={"answer": HOSTILE}, answer=HOSTILE, error=HOSTILE, latency_s=float("nan"))
    for one in rows:
        one["id"] = HOSTILE
        one["task"] = HOSTILE
    return save(path, [*rows, *both("t2")], tasks=HOSTILE)


def test_no_text_leaves_its_place(tmp_path: Path) -> None:
    found = document(arms(read_runs([hostile_run(tmp_path / "run")])), 1000)
    html = page(found)
    scripts = re.findall(r"<script[^>]*>", html.partition('<script id="data"')[2])
    assert len(scripts) == 2  # the library's and our own, after the data
    assert "alert(1)</script>" not in html and "<!--<img" not in html and "\x00" not in html
    data = html.partition('type="application/json">')[2].partition("</script>")[0]
    assert not re.search(r"[<>&\u2028]", data)
    read = json.loads(data)
    assert read["entries"][0]["task"] == HOSTILE.replace("\ud83d", "?")
    assert read["entries"][0]["rrm"]["latency"] is None and read["entries"][0]["ratio"] is None
    html.encode()


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    html = page(document(arms(read_runs([save(tmp_path / "run", both("a"))])), 1000))
    assert "default-src 'none'" in html and "{{" not in html.partition('<script id="data"')[0]
    assert not re.search(r"<(?:link|script|img|iframe)[^>]*(?:href|src)=(?!\"data:,\")", html)
    ours = html.rpartition("<script>")[2]
    assert "innerHTML" not in ours and ".html(" not in ours and "fetch(" not in ours and "eval(" not in ours


def test_numbers_that_json_lacks() -> None:
    assert json.loads(as_json({"a": [float("nan"), float("inf"), 1.5], 3: "<é>"})) == {
        "a": [None, None, 1.5],
        "3": "<é>",
    }


def test_the_verdict_of_verify_is_in_the_foot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", [*both("a"), row("b", "rrm")])
    out = tmp_path / "page.html"
    assert main([str(run), "--out", str(out)]) == 0
    assert "3 rows" not in capsys.readouterr().out and '"verdict":null' in out.read_text()
    (run / "verify.json").write_text(json.dumps({"checks": [{"verdict": "kept"}, {"verdict": "kept"}]}))
    assert main([str(run), "--out", str(out)]) == 0
    assert '"verdict":{"said":"verify: 2 kept","whole":true}' in out.read_text()
    (run / "verify.json").write_text(json.dumps({"checks": [{"verdict": "kept"}, {"verdict": "broken"}]}))
    assert main([str(run), "--out", str(out)]) == 0
    assert '"said":"verify: 1 kept, 1 broken","whole":false' in out.read_text()
    (run / "verify.json").write_text("[]")
    capsys.readouterr()
    assert main([str(run), "--out", str(out)]) == 2
    assert "verify --json writes it" in capsys.readouterr().err


def test_what_cannot_be_rendered_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", both("a"))
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert main([str(run), "--out", str(tmp_path / "none" / "page.html")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "cannot be written" in err and not (tmp_path / "page.html").exists()
