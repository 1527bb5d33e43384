"""What is said of runs, against figures counted by hand: arms, pairs, controls, labels, files."""

import csv
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from by_hand import manifest
from recorded_runs import both, row, save

pytest.importorskip("scipy")

from rrm_engine.analyze.analysis import analyse
from rrm_engine.analyze.cli import main
from rrm_engine.analyze.contrast import contrast
from rrm_engine.analyze.controls import controls, majority
from rrm_engine.analyze.figures import accuracy, servers, shape
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Status
from rrm_engine.render.cli import main as main_of_render
from rrm_engine.runs.arms import Arm, Run, Sample, arms, matched, read_runs
from rrm_engine.runs.rows import Row

RUN = Run(Path("run"), manifest())


def samples(*rows: Row) -> list[Sample]:
    return [Sample(one, RUN) for one in rows]


def arm_of(tmp_path: Path, rows: list[Row]) -> Arm:
    return arms(read_runs([save(tmp_path / "run", rows)]))[0]


def test_runs_of_one_setting_are_one_arm(tmp_path: Path) -> None:
    shards = [save(tmp_path / f"shard{i}", both(f"t{i}"), shard=f"{i}/2", limit=i) for i in (1, 2)]
    other_seed = save(tmp_path / "seed", both("t1"), seed=5, shard="1/2")
    only_direct = save(tmp_path / "direct", [row("t3", "direct")], modes=["direct"])
    found = arms(read_runs([*shards, other_seed, only_direct]))
    assert len(found) == 1 and found[0].name == "tiny"
    assert sorted(s.draw for s in found[0].of_mode("rrm") if s.row["id"] == "t1") == [(0, 0), (5, 0)]
    assert len(found[0].paired) == 3


def test_runs_that_differ_or_repeat_are_several_arms(tmp_path: Path) -> None:
    first = save(tmp_path / "first", both("a"))
    dropped = save(tmp_path / "dropped", both("a"), wait_policy="drop")
    again = save(tmp_path / "again", both("a"))
    elsewhere = save(tmp_path / "elsewhere", both("a"), tasks="other")
    assert [arm.name for arm in arms(read_runs([first, dropped]))] == ["wait-policy pin", "wait-policy drop"]
    assert [arm.name for arm in arms(read_runs([first, again]))] == ["first", "again"]
    assert [arm.name for arm in arms(read_runs([first, elsewhere]))] == ["set", "other"]
    twin = save(tmp_path / "twins" / "first", both("a"))
    assert [arm.name for arm in arms(read_runs([first, twin]))] == [str(first), str(twin)]
    assert len(arms(read_runs([first, first, tmp_path / "." / "first"]))) == 1


def test_what_should_be_the_same_in_an_arm_and_is_not(tmp_path: Path) -> None:
    one, other = save(tmp_path / "1", both("a")), save(tmp_path / "2", both("b"))
    manifest = json.loads((other / "run.json").read_text())
    manifest["hardware"]["cpu"] = "Another"
    (other / "run.json").write_text(json.dumps(manifest))
    (arm,) = arms(read_runs([one, other]))
    assert arm.cautions == ['its runs differ in cpu: "Another", "Test"']


def test_accuracy_over_samples_and_problems() -> None:
    verdicts = {"a": [True, True, False, False], "b": [True, False, False], "c": [False] * 3}
    rows = [row(t, "rrm", sample=i, right=v) for t, vs in verdicts.items() for i, v in enumerate(vs)]
    found = accuracy(samples(*rows, row("d", "rrm", right=None)))
    assert (found["graded"], found["right"], found["accuracy"], found["k"]) == (10, 3, 0.3, 3)
    assert found["avg_at_k"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert found["pass_at_k"] == pytest.approx((1 + 1 + 0) / 3)  # any 3 of 4 with 2 right, and all 3
    assert found["avg_at_k_ci95"] is None  # three problems


def test_an_error_counts_as_wrong_and_gives_no_time(tmp_path: Path) -> None:
    rows = [*both("a"), row("b", "rrm", error="boom", status=Status.FAILED, latency_s=99.0, right=False)]
    figures = analyse([arm_of(tmp_path, rows)])["arms"][0]["modes"]["rrm"]
    assert (figures["n"], figures["accuracy"], figures["errors"], figures["latency_s_mean"]) == (2, 0.5, 1, 1.0)


def test_two_sides_of_the_same_problems(tmp_path: Path) -> None:
    ratios = {"a": (4.0, 1.0), "b": (3.0, 2.0), "c": (1.0, 2.0), "d": (2.0, 2.0)}
    rows = [
        one
        for task, (direct, recursive) in ratios.items()
        for one in both(
            task, direct={"latency_s": direct, "right": task != "b"}, latency_s=recursive, right=task != "a"
        )
    ]
    rows += [*both("failed", status=Status.FAILED, error="boom", right=False), row("alone", "rrm")]
    found = contrast(arm_of(tmp_path, rows).paired)
    assert (found["n"], found["timed"], found["graded"]) == (5, 4, 5)
    verdicts = [found[name] for name in ("both_right", "only_first_right", "only_second_right", "neither_right")]
    assert verdicts == [2, 2, 1, 0] and found["mcnemar_p"] == 1.0
    assert found["accuracy_difference"] == pytest.approx(-1 / 5)
    latency = found["latency_s"]
    assert latency["median"] == pytest.approx(1.25)  # of 4, 1.5, 0.5, 1
    assert latency["geometric_mean"] == pytest.approx((4 * 1.5 * 0.5 * 1) ** 0.25)
    assert latency["of_sums"] == pytest.approx(10 / 7)
    assert found["critical_path_tokens"]["median"] == pytest.approx(3.0)
    assert found["critical_path_steps"] is None
    assert found["tokens_per_s"] == pytest.approx({"first": 120.0, "second": 1200 / 7, "ratio": 10 / 7})


def test_what_is_told_where_there_were_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, drafted = (
        [one | {"critical_path_steps": steps, "accepted": accepted} for one in both("a")]
        for steps, accepted in ((100, 0), (50, 50))
    )
    told = []
    for name, rows in {"plain": plain, "drafted": drafted}.items():
        assert main([str(save(tmp_path / name, rows, draft=name))]) == 0
        told.append(capsys.readouterr().out)
    assert (
        "path, steps" not in told[0]
        and "steps:" not in told[0]
        and "critical path, steps" in told[1]
        and "steps: of forward" in told[1]
    )
    assert main([str(tmp_path / "plain"), str(tmp_path / "drafted")]) == 0
    assert (
        capsys.readouterr().out.count("critical path, steps") == 2 * 2 + 2
    )  # two sets of pairs of each arm, two modes of both


def test_arms_are_matched_by_draw_else_by_order(tmp_path: Path) -> None:
    def run(name: str, seed: int, *drawn: int, **settings: Any) -> Path:
        rows = [row("a", "rrm", sample=sample, latency_s=1.0 + sample) for sample in drawn]
        return save(tmp_path / name, rows, seed=seed, **settings)

    first = run("first", 0, 0, 1)
    same, other = run("same", 0, 1, 2, wait_policy="drop"), run("other", 7, 5, wait_policy="lru")
    one, two, three = arms(read_runs([first, same, other]))
    assert [(a.draw, b.draw) for a, b in matched(one.samples, two.samples)] == [((0, 1), (0, 1))]
    assert [(a.draw, b.draw) for a, b in matched(one.samples, three.samples)] == [((0, 0), (7, 5))]
    assert matched(one.of_mode("direct"), three.of_mode("direct")) == []


def votes(*answers: str) -> list[Sample]:
    return samples(*(row("a", "direct", sample=i, right=a == "7", answer=a) for i, a in enumerate(answers)))


@pytest.mark.parametrize(
    ("answers", "n", "chance"),
    [
        (["FINAL: 7"], 1, 0.0),  # it is not graded as right here, and only that counts
        (["7", "FINAL: 8", "FINAL: 8"], 3, 0.0),
        (["7", "7", "FINAL: 8"], 3, 1.0),
        (["7", "FINAL: 8"], 2, 0.5),  # a tie
        (["7", "FINAL: 8", "FINAL: 9"], 3, 1 / 3),
        (["7", "FINAL: 8", "So FINAL: 8.0"], 3, 0.0),  # one answer in two spellings
        (["7", "FINAL: 8"], 1, 0.5),
        (["7", "nothing", "nothing either"], 3, 1.0),  # a sample that states nothing does not vote
        (["nothing"], 1, 0.0),
    ],
)
def test_the_majority_of_n_samples(answers: list[str], n: int, chance: float) -> None:
    assert majority(votes(*answers), n) == pytest.approx(chance)


def test_the_majority_over_all_choices_of_samples() -> None:
    answers = ["7", "7", "FINAL: 8", "FINAL: 8", "FINAL: 9"]
    chances = []
    for chosen in combinations(answers, 3):
        counts = {answer: chosen.count(answer) for answer in chosen}
        first = [answer for answer, count in counts.items() if count == max(counts.values())]
        chances.append(("7" in first) / len(first))
    assert majority(votes(*answers), 3) == pytest.approx(sum(chances) / 10)


def test_controls_may_spend_what_recursion_spent(tmp_path: Path) -> None:
    rows = []
    for i, right in enumerate((True, True, False, False)):
        rows.append(row("a", "direct", sample=i, right=right, total_tokens=100, critical_path_tokens=100 + 50 * i))
        rows.append(row("a", "rrm", sample=i, total_tokens=350, critical_path_tokens=120))
    rows += both("b", direct={"total_tokens": 10}, total_tokens=99)  # nine samples wanted, one there
    found = controls(arm_of(tmp_path, rows))
    assert found is not None
    tokens, path = found["matched_tokens"], found["matched_path"]
    # N = 3 of right, right, wrong, wrong: two of the four choices have two right ones.
    assert (tokens["accuracy"], tokens["problems"], tokens["samples_mean"]) == (0.5, 1, 3)
    assert (tokens["problems_with_too_few"], tokens["samples_wanted"]) == (1, 9)
    # Of a the first sample is in time and right, the second too late; of b the direct row is too late.
    assert (path["accuracy"], path["right_too_late"]) == (pytest.approx((1 / 4 + 0) / 2), 2)
    # Medians over five pairs: direct paths of 100, 150, 200, 250 and 300 tokens.
    assert found["one_at_a_time"] == {"direct": 200, "recursive": 120, "one_at_a_time": 350}
    assert controls(arm_of(tmp_path / "alone", [row("a", "rrm")])) is None


def test_the_shape_of_recursive_rows() -> None:
    rows = [
        row("a", "rrm", nodes=5, max_depth=2, max_sibling_width=3, total_tokens=400, repairs={"prose": 2}),
        row("b", "rrm", status=Status.ATOMIC, nodes=1, max_depth=0, max_sibling_width=0, repairs={"prose": 1}),
        row("c", "rrm", status=Status.FAILED, error="boom", right=False),
    ]
    found = shape(samples(*rows))
    assert (found["n"], found["split"], found["activation"]) == (2, 1, 0.5)
    assert (found["nodes_mean"], found["depth_max"], found["width_mean"]) == (5, 2, 3)
    assert (found["parallelism_tokens"], found["overlap"], found["repairs"]) == (4.0, 0.5, {"prose": 3})


ODD: dict[str, list[Row]] = {
    "only direct": [row("a", "direct"), row("b", "direct")],
    "only recursive": [row("a", "rrm"), row("b", "rrm")],
    "no answers expected": [*both("a", direct={"right": None}, right=None)],
    "nothing ran to its end": [row("a", "rrm", status=Status.FAILED, error="boom", right=False)],
    "no times": [*both("a", direct={"latency_s": float("nan")}, latency_s=float("inf"))],
    "no tokens": [*both("a", direct={"total_tokens": 0, "critical_path_tokens": 0}, total_tokens=0)],
    "markup": [*both("[/red]"), *both("[bold]", error="[/]")],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_whatever_the_rows_there_is_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Row]
) -> None:
    one, other = save(tmp_path / "1", rows, model="[/x]"), save(tmp_path / "2", rows, model="y")
    for one_row in rows:
        one_row.pop("task", None)
    old = save(tmp_path / "3", rows, model="old")
    code, out, err = run_command(capsys, one, other, old, "--rows", "--out", tmp_path / "out")
    assert code == 0 and "Traceback" not in err and "nan" not in out
    assert "NaN" not in (text := (tmp_path / "out" / "analysis.json").read_text()) and "Infinity" not in text
    assert main_of_render([str(one), str(old), "--out", str(tmp_path / "page.html")]) == 0


def test_replicas_are_compared() -> None:
    told = [
        {"replicas": {"root": ["a"], "root.x": ["a", "b"]}, "queued_s": 0.5, "attempts": 4, "restarts": 1},
        {
            "replicas": {"root": ["a"]},
            "queued_s": 0.25,
            "attempts": 1,
            "restarts": 0,
            "cached_tokens": 7,
            "cached_untold": 2,
        },
    ]
    found = servers(samples(*({**row("t", "rrm", sample=i), "servers": one} for i, one in enumerate(told))))
    assert found == {
        "nodes": {"a": 3, "b": 1},
        "imbalance": 1.5,  # 3 of 4 where 2 would be even
        "queued_s": 0.75,
        "attempts": 5,
        "restarts": 1,
        "cached_tokens": 7,
        "cached_untold": 2,
    }
    assert servers(samples(row("t", "rrm"))) is None


def test_the_order_of_rows_and_runs_does_not_show(tmp_path: Path) -> None:
    rows = [one for i in range(12) for one in both(f"t{i}", latency_s=0.5 + i / 10, right=i % 3 > 0)]
    mixed = random.Random(0).sample(rows, len(rows))
    one, other = (analyse([arm_of(tmp_path / name, found)]) for name, found in (("1", rows), ("2", mixed)))
    for name in ("modes", "direct_and_recursive", "controls", "shape"):
        assert json.dumps(one["arms"][0][name], sort_keys=True) == json.dumps(other["arms"][0][name], sort_keys=True)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [one for i in range(8) for one in both(f"t{i}", latency_s=0.5 + i / 10, cut={"max_nodes": 1} if i else {})]
    one, other = save(tmp_path / "pin", rows), save(tmp_path / "drop", rows, wait_policy="drop")
    code, out, err = run_command(capsys, one, other, "--rows", "--out", tmp_path / "out")
    assert code == 0 and "Traceback" not in err
    assert max(map(len, out.splitlines())) <= 80 or str(tmp_path) in out
    document = json.loads((tmp_path / "out" / "analysis.json").read_text())
    for name, formula in document["formulas"].items():
        assert formula, name
    assert "wait-policy pin over wait-policy drop" in out and "headline" in out and "cut by a limit" in out
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)] == [found["label"] for found in document["rows"]]
    with (tmp_path / "out" / "ratios.csv").open(newline="") as file:
        ratios = list(csv.DictReader(file))
    assert float(ratios[0]["latency_s.median_ci95.low"]) <= float(ratios[0]["latency_s.median"])


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path / "run", [one for i in range(6) for one in both(f"t{i}", right=i > 1, latency_s=0.5 + i)])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    code, _, err = run_command(capsys, run, "--out", tmp_path / "without")
    assert code == 0 and "No plot" in err and not (tmp_path / "without" / "analysis.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    code, out, err = run_command(capsys, run, "--out", tmp_path / "with")
    assert code == 0 and "analysis.png" in out and not err
    assert (tmp_path / "with" / "analysis.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["run.json", "rows.jsonl"])
def test_what_cannot_be_analysed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    run = save(tmp_path / "run", both("a"))
    (run / missing).unlink()
    code, out, err = run_command(capsys, run)
    assert code == 2 and not out and err.startswith(f"error: {run} holds no {missing}") and err.count("\n") == 1


def test_runs_without_rows_or_of_other_versions(tmp_path: Path) -> None:
    with pytest.raises(RrmError, match="no finished row"):
        read_runs([save(tmp_path / "empty", [])])
    run = save(tmp_path / "old", both("a"))
    (run / "run.json").write_text("{}")
    with pytest.raises(RrmError, match="another version"):
        read_runs([run])
    (run / "run.json").write_text("[")
    with pytest.raises(RrmError, match="cannot be read"):
        read_runs([run])


def test_without_scipy_one_sentence_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    code, _, err = run_command(capsys, save(tmp_path / "run", both("a")))
    assert code == 2
    assert err == "error: intervals and tests need one more package: pip install 'rrm-engine[analysis]'\n"
