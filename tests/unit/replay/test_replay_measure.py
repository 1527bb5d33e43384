"""Rounds, summaries and tables of replays; the commands that make them."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from replays import FLAT, drawn

from rrm_engine.replay.cli import main
from rrm_engine.replay.contender import Contender, Replayed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import COUNTERS, measure, summarise
from rrm_engine.replay.report import HEADER, markdown_table, rich_table

ROOT = Path(__file__).parents[3]


class Clockwork:
    """A contender with given times; it notes when it was called."""

    def __init__(self, name: str, answers: list[float], calls: list[str]) -> None:
        self.name = name
        self.answers = iter(answers)
        self.calls = calls

    def replay(self, graph: Graph) -> Replayed:
        self.calls.append(self.name)
        answer = next(self.answers)
        return Replayed(answer, [answer / 10, answer / 5], steps=3, prefilled=10, reused=4, peak_blocks=7)


@pytest.mark.parametrize(("minutes_left", "rounds"), [(-1.0, 1), (0.5, 3), (math.inf, 9)])
def test_no_round_is_begun_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, minutes_left: float, rounds: int
) -> None:
    now = 1000.0

    class Slow(Clockwork):
        def replay(self, graph: Graph) -> Replayed:
            nonlocal now
            now += 4.5
            return super().replay(graph)

    monkeypatch.setattr("rrm_engine.replay.measure.perf_counter", lambda: now)
    calls: list[str] = []
    contenders = [Slow(name, [1.0] * 10, calls) for name in "ab"]  # a round takes 9 seconds, and so does the warm-up
    rows = measure(contenders, [drawn(FLAT)], 9, until=now + 60 * minutes_left + 8)
    assert [len(row.answer_s) for row in rows] == [rounds, rounds]


def test_rounds_rotate_and_the_first_replay_does_not_count() -> None:
    calls: list[str] = []
    contenders: list[Contender] = [
        Clockwork("a", [99, 1, 4, 2, 4, 30, 4], calls),
        Clockwork("b", [99, 2, 2, 8, 2, 60, 2], calls),
    ]
    graphs = [drawn(FLAT), drawn(FLAT | {"id": "again"})]
    rows = measure(contenders, graphs, repeats=3)
    assert "".join(calls) == "ab" + 2 * "ba" + 2 * "ab" + 2 * "ba"
    assert [row.answer_s for row in rows] == [[1, 2, 30], [2, 8, 60], [4, 4, 4], [2, 2, 2]]
    a, b = summarise(rows)
    assert (a["answer_s"], a["ratio"]) == (3, pytest.approx(1))
    assert (b["answer_s"], b["ratio"]) == (5, pytest.approx((2 * 0.5) ** 0.5))
    assert (a["resume_s"], a["resume_worst_s"]) == (pytest.approx((0.3 + 0.6) / 2), pytest.approx((0.4 + 0.8) / 2))
    assert (a["prefilled"], a["peak_blocks"], a["copied_blocks"]) == (20, 7, None)
    assert (a["resume_ratio"], b["resume_ratio"]) == (pytest.approx(1), pytest.approx((2 * 0.5) ** 0.5))
    assert set(COUNTERS) <= a.keys()
    lines = markdown_table([a, b]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a | 3.00 s | 1.00x |")
    assert len(rich_table([a, b], "", wide=True).columns) == len(HEADER) > len(rich_table([a], "", wide=False).columns)


def test_the_command_measures_checks_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.jsonl").write_text(json.dumps(FLAT) + "\n")
    options = ["--policies", "pin,no-reuse", "--repeats", "1", "--check", "--kv-blocks", "80%", "--threads", "1"]
    assert not main(["--graphs", str(tmp_path / "g.jsonl"), *options, "--json", str(tmp_path / "r.json")])
    assert "no-reuse" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert [entry["name"] for entry in result["summary"]] == ["pin", "no-reuse"]
    assert result["compared_steps"] == 2 * 2 * 31
    assert result["graphs"][0]["critical_path_tokens"] == 7 + 11 + 4
    assert all(len(row["answer_s"]) == 1 for row in result["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "keep"], "there is no 'keep'"),
        (["--graphs", "/nowhere.jsonl"], "--graphs /nowhere.jsonl: there is no such file"),
        (["--kv-blocks", "0%"], "--kv-blocks 0%: it takes a number of blocks, or a share"),
        (["--repeats", "0"], "--repeats and --count at least 1"),
        (["--compare", "llama"], "--compare llama: it takes vllm, vllm+fork"),
        (["--model", "random:gpt-9"], "--model random:gpt-9: the geometries are"),
    ],
)
def test_the_command_refuses_with_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_ablation_writes_table_plots_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    (tmp_path / "g.jsonl").write_text(json.dumps(FLAT) + "\n")
    options = ["--policies", "pin,offload", "--repeats", "1", "--threads", "1", "--graphs", str(tmp_path / "g.jsonl")]
    importlib.import_module("kv_ablation").main([str(tmp_path / "out"), *options])
    assert "embedded: 60 % of the blocks that pin takes" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [figures["compared_steps"] for figures in result["memory"].values()] == [62, 62]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| offload |") == 2
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "plot.svg").read_text()
