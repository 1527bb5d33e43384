"""Direct and recursive rows in different run directories are compared, and what differs between them is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import both, row, save

pytest.importorskip("scipy")

from rrm_engine.analyze.analysis import analyse
from rrm_engine.analyze.cli import main
from rrm_engine.errors import RrmError
from rrm_engine.export.cli import main as main_of_export
from rrm_engine.render.cli import main as main_of_render
from rrm_engine.render.document import document
from rrm_engine.runs import arms as module
from rrm_engine.runs.arms import Arm, arms, matched, read_runs
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.rows import Row
from rrm_engine.trace.command import write_json

TASKS = "abcdef"


def only(path: Path, mode: str, tasks: str = TASKS, samples: int = 1, rows: Any = None, **settings: Any) -> Path:
    made = [row(task, mode, sample=sample, **rows or {}) for task in tasks for sample in range(samples)]
    return save(path, made, modes=[mode], **settings)


def apart(folder: Path, **recursive: Any) -> tuple[Arm, Arm]:
    """The arms of two directories, one with direct rows and one with recursive ones."""
    paths = [
        only(folder / "direct", "direct"),
        only(folder / "rrm", "rrm", **{"wait_policy": "drop", **recursive}),
    ]
    one, other = arms(read_runs(paths))
    return one, other


def labels(arm: Arm) -> list[str]:
    return [str(trust.label) for _, trust in arm.trusted]


def test_rows_of_two_directories_are_pairs(tmp_path: Path) -> None:
    direct, recursive = apart(tmp_path)
    assert recursive.lender is direct and direct.lender is None
    assert [(a.row["id"], a.mode, b.mode) for a, b in recursive.paired] == [(task, "direct", "rrm") for task in TASKS]
    assert labels(recursive) == ["headline"] * 6 and labels(direct) == ["direct"] * 6
    assert recursive.differences == {"wait_policy": ("pin", "drop")} and recursive.unlike == []
    assert recursive.compared_with == "compared with the direct rows of wait-policy pin: wait-policy pin (here drop)"
    figures = analyse([direct, recursive])
    one, other = figures["arms"]
    assert one["compared_with"] is None and other["direct_of"] == one["name"]
    assert other["direct_and_recursive"]["headline"]["latency_s"]["median"] == 2.0
    assert other["controls"]["problems"] == 6 and one["controls"] is None
    assert figures["comparisons"][0]["lent"] and figures["comparisons"][0]["modes"] == {}


def test_rows_of_another_model_are_pairs_and_no_headline(tmp_path: Path) -> None:
    _, recursive = apart(tmp_path, model="large")
    assert len(recursive.paired) == 6 and recursive.unlike == ["model"]
    assert {(str(t.label), t.reason) for _, t in recursive.trusted} == {
        ("unpaired", "the direct row of its task was run with another model")
    }
    figures = analyse([recursive])["arms"][0]["direct_and_recursive"]
    assert figures["all"]["latency_s"]["median"] == 2.0 and figures["headline"]["n"] == 0
    assert "model tiny (here large)" in str(recursive.compared_with)


def test_problems_are_told_apart_by_their_text(tmp_path: Path) -> None:
    one = only(tmp_path / "direct", "direct", "ab")
    rows: list[Row] = [row("a", "rrm"), row("b", "rrm") | {"task": "another one"}]
    other = save(tmp_path / "rrm", rows, wait_policy="drop", tasks="other")
    _, recursive = arms(read_runs([one, other]))
    assert [b.row["id"] for _, b in recursive.paired] == ["a"]
    assert labels(recursive) == ["headline", "unpaired"]


def test_the_arm_that_is_most_like_it_lends(tmp_path: Path) -> None:
    of_another_model = only(tmp_path / "1", "direct", model="large")
    of_few = only(tmp_path / "2", "direct", "ab", wait_policy="lru")
    of_more = only(tmp_path / "3", "direct", "abcd", wait_policy="offload", join="kv")
    found = only(tmp_path / "4", "rrm", wait_policy="drop")
    made = arms(read_runs([of_another_model, of_few, of_more, found]))
    assert made[3].lender is made[2]
    assert arms(read_runs([of_another_model, of_few, found]))[2].lender is not None
    own = save(tmp_path / "5", both("a"), wait_policy="auto")
    assert arms(read_runs([of_few, own]))[1].lender is None
    assert arms(read_runs([of_few, only(tmp_path / "6", "rrm", "xyz", wait_policy="auto")]))[1].lender is None


def test_other_seeds_are_paired_in_order_and_named(tmp_path: Path) -> None:
    direct = only(tmp_path / "direct", "direct", "a", samples=3)
    recursive = only(tmp_path / "rrm", "rrm", "a", samples=2, seed=7)
    (arm,) = arms(read_runs([direct, recursive]))
    assert [(a.draw, b.draw) for a, b in arm.paired] == [((0, 0), (7, 0)), ((0, 1), (7, 1))]
    assert arm.compared_with == "compared with direct rows of another draw: seed 0 (here 7)"
    assert labels(arm).count("headline") == 2 and labels(arm).count("direct") == 3
    same = only(tmp_path / "same", "rrm", "a", seed=0)
    (arm,) = arms(read_runs([direct, same]))
    assert arm.compared_with is None and len(arm.paired) == 1


def test_runs_that_have_no_row_yet_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun, empty = only(tmp_path / "begun", "direct"), save(tmp_path / "empty", [], seed=3)
    assert [run.path for run in read_runs([empty, begun])] == [begun]
    assert capsys.readouterr().err == f"{empty} has no finished row yet and is left out.\n"
    with pytest.raises(RrmError, match="empty has no finished row"):
        read_runs([empty])


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [
        only(tmp_path / str(i), "direct", model=model) for i, model in enumerate(("/a/tiny", "/b/tiny", "/b/large"))
    ]
    assert [arm.name for arm in arms(read_runs(paths))] == ["/a/tiny", "/b/tiny", "/b/large"]
    assert [arm.name for arm in arms(read_runs(paths[1:]))] == ["tiny", "large"]


def test_a_directory_above_runs_names_them(tmp_path: Path) -> None:
    for name in "dabc":
        only(tmp_path / "out" / name, "direct", wait_policy=name)
    a, b, c = (tmp_path / "out" / name for name in "abc")
    with pytest.raises(
        RrmError, match=f"holds no run.json; pass the directory of a recorded run: {a}, {b}, {c} and others$"
    ):
        read_runs([tmp_path / "out"])
    with pytest.raises(RrmError, match=f"rows.jsonl is not a directory; pass the directory of a recorded run: {a}$"):
        read_runs([a / "rows.jsonl"])
    with pytest.raises(RrmError, match=r"pass the directory of a recorded run$"):
        read_runs([tmp_path])
    RunDir.create(tmp_path / "loading")
    with pytest.raises(RrmError, match=r"loading holds no run\.json yet: its run is about to begin"):
        read_runs([tmp_path / "loading"])


def test_no_command_writes_over_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", both("a"))
    there = {path.name: path.read_bytes() for path in run.iterdir()}
    for command in (main_of_render, main_of_export):
        for name in ("rows.jsonl", "run.json", "trace.jsonl"):
            assert command([str(run), "--out", str(run / name)]) == 2
            assert f"{name} is a file of the run in {run}: name another one" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == there
    with pytest.raises(RrmError, match="is a file of the run"):
        write_json(run / "summary.json", {})
    write_json(run / "verify.json", {"checks": []})
    assert main_of_render([str(run), "--out", str(tmp_path / "rows.jsonl")]) == 0


def test_a_page_has_a_problem_once(tmp_path: Path) -> None:
    direct, recursive = apart(tmp_path)
    entries = document([direct, recursive], 1000)["entries"]
    assert [(e["id"], e["arm"], e["direct_arm"], e["ratio"]) for e in entries] == [(t, 1, 0, 2.0) for t in TASKS]
    assert all(entry["direct"]["key"].endswith("direct/0") and entry["rrm"] for entry in entries)
    further = only(tmp_path / "further", "direct", "xa", wait_policy="lru")
    entries = document(arms(read_runs([further, *(r.path for a in (direct, recursive) for r in a.runs)])), 1000)
    assert [(e["id"], e["arm"], bool(e["rrm"])) for e in entries["entries"]] == [
        ("x", 0, False),
        ("a", 0, False),  # the arm with more of the problems lends
        *((task, 2, True) for task in TASKS),
    ]


def test_the_commands_say_what_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    paths = [str(run.path) for arm in apart(tmp_path) for run in arm.runs]
    assert main([*paths, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "compared with the direct rows of wait-policy pin: wait-policy pin (here drop)." in " ".join(out.split())
    assert all(f"Arm {i}: " in out for i in (1, 2)) and "tok/path" in out and "…" not in out
    assert "6 headline" in out and "no problem in common" not in out
    assert "wait-policy pin: direct,wait-policy drop: rrm" in (tmp_path / "out" / "ratios.csv").read_text()
    alone = save(tmp_path / "alone", [row("z", "direct")], wait_policy="lru")
    assert main([paths[1], str(alone)]) == 0
    assert "have no problem in common" in capsys.readouterr().out
    assert main_of_render([*paths, "--out", str(tmp_path / "page.html")]) == 0
    assert "6 problems" in capsys.readouterr().out
    data = (tmp_path / "page.html").read_text().partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["analysis"]["arms"][1]["compared_with"].startswith("compared with the direct rows")


def test_pairs_are_looked_for_as_often_whatever_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of thousands of rows is made in time that grows as they do."""
    counts = []
    for name, tasks in (("few", "ab"), ("many", "abcdefghijklmnopqrstuvwxyz")):
        looked: list[int] = []
        monkeypatch.setattr(module, "matched", lambda *sides, found=looked: found.append(1) or matched(*sides))
        folder = tmp_path / name
        paths = [only(folder / "direct", "direct", tasks), only(folder / "rrm", "rrm", tasks, wait_policy="drop")]
        document(arms(read_runs(paths)), 1000)
        counts.append(len(looked))
    assert counts[0] == counts[1] > 0
