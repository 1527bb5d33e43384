"""Figures of a run: intervals against known values, and which rows count where."""

import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_runs import both, row
from rich.console import Console

from rrm_engine.bench.grader import Verdict
from rrm_engine.bench.progress import describe_row
from rrm_engine.bench.rows import make_row
from rrm_engine.bench.summary import mcnemar, median_interval, pairs, summarise, wilson
from rrm_engine.bench.table import print_closing, speedup, splice_line
from rrm_engine.graph.types import Status
from rrm_engine.runs.rows import Row
from rrm_engine.solver.result import Job, JobResult


def test_wilson_against_published_values() -> None:
    assert wilson(0, 10) == pytest.approx([0.0, 0.27753], abs=1e-4)
    assert wilson(5, 10) == pytest.approx([0.23659, 0.76341], abs=1e-4)
    assert wilson(30, 30) == pytest.approx([0.88649, 1.0], abs=1e-4)
    assert wilson(0, 0) is None


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(hits_n: tuple[int, int]) -> None:
    hits, n = hits_n
    interval = wilson(hits, n)
    assert interval is not None
    assert 0 <= interval[0] <= hits / n + 1e-12 and hits / n - 1e-12 <= interval[1] <= 1


def test_mcnemar() -> None:
    assert mcnemar(0, 0) is None
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)


def test_median_interval_covers_the_median_as_often_as_it_says() -> None:
    noise = random.Random(1)
    covered = 0
    for _ in range(60):
        interval = median_interval({str(i): [noise.gauss(3, 1)] for i in range(25)})
        assert interval is not None
        covered += interval[0] <= 3 <= interval[1]
    assert covered >= 50


def test_median_interval_draws_tasks_not_samples() -> None:
    tasks = {str(i): [float(i)] for i in range(8)}
    copied = {name: values * 50 for name, values in tasks.items()}
    assert median_interval(copied) == median_interval(tasks)
    assert median_interval({str(i): [1.0] for i in range(4)}) is None


def test_headline_pairs() -> None:
    rows = both("good")
    rows += both("fallback", status=Status.FALLBACK)
    rows += both("atomic", status=Status.ATOMIC)
    rows += both("invalid", status=Status.INVALID)
    rows += both("wrong", right=False)
    rows += both("ungraded", right=None)
    rows += both("serial", overlap_s=0.0)
    rows += both("untimed", latency_s=0.0)
    rows += both("failed", error="out of memory", status=Status.FAILED)
    rows += [row("direct-wrong", "direct", right=False), row("direct-wrong", "rrm")]
    rows += [row("alone", "rrm")]
    summary = summarise(rows)
    assert summary["headline"]["n"] == 1
    assert summary["headline"]["latency_speedup_median"] == 2.0
    assert summary["headline"]["critical_path_speedup_median"] == 3.0
    assert summary["headline"]["latency_speedup_ci95"] is None
    assert summary["all_pairs"]["n"] == 8  # all but untimed, failed and alone
    assert summary["errors"] == 1


def test_an_error_counts_as_wrong_and_not_into_times() -> None:
    rows = [row("a", "rrm"), row("b", "rrm", latency_s=99.0, error="boom", status=Status.FAILED)]
    figures = summarise(rows)["modes"]["rrm"]
    assert (figures["n"], figures["correct"], figures["accuracy"], figures["errors"]) == (2, 1, 0.5, 1)
    assert figures["latency_median"] == 1.0
    assert figures["status"] == {"failed": 1, "graph": 1}


def test_without_expected_answers_there_is_no_accuracy() -> None:
    figures = summarise([row("a", "rrm", right=None)])["modes"]["rrm"]
    assert figures["accuracy"] is None and figures["accuracy_ci95"] is None


def test_pairs_go_by_task_and_sample() -> None:
    rows = both("a", 0) + both("a", 1) + both("b", 0)
    random.Random(0).shuffle(rows)
    found = {(direct["id"], direct["sample"], recursive["mode"]) for direct, recursive in pairs(rows)}
    assert found == {("a", 0, "rrm"), ("a", 1, "rrm"), ("b", 0, "rrm")}


def test_agreement_and_atomic_controls() -> None:
    rows = both("a") + both("b", right=False) + both("c", status=Status.ATOMIC, latency_s=4.0)
    summary = summarise(rows)
    assert summary["all_pairs"]["both_correct"] == 2
    assert summary["all_pairs"]["only_direct_correct"] == 1
    controls = summary["atomic_controls"]
    assert (controls["n"], controls["accuracy"], controls["latency_speedup_median"]) == (1, 1.0, 0.5)


def test_kv_figures_add_up() -> None:
    rows = both("a", reused=5, forward_prefilled=7, peak_kv_blocks=9, resumes=2, resume_latency_s=[0.1, 0.3])
    rows += both("b", reused=1, forward_prefilled=3, peak_kv_blocks=4, resumes=1, resume_latency_s=[0.2])
    kv = summarise(rows)["kv"]
    assert (kv["reused"], kv["prefilled"], kv["peak_blocks"], kv["resumes"]) == (6, 10, 9, 3)
    assert kv["resume_latency_median"] == 0.2


def test_the_same_rows_give_the_same_summary_in_any_order() -> None:
    rows = [r for i in range(12) for r in both(str(i), latency_s=0.5 + i / 10)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert json.dumps(summarise(rows), sort_keys=True) == json.dumps(summarise(shuffled), sort_keys=True)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [0, 1, 3, 30])
def test_the_closing_table_fits(width: int, count: int) -> None:
    rows = [r for i in range(count) for r in both(str(i), total_tokens=123_456, latency_s=1 + i)]
    if count == 3:
        rows += both("failed", error="out of memory: asked for [1] block\nmore", status=Status.FAILED)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_closing(console, summarise(rows), rows, concurrency=2)
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    assert "…" not in text
    assert ("1 row with an error" in text) == (count == 3)


def test_one_mode_alone_has_no_speedups() -> None:
    rows = [row("a", "direct")]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_closing(console, summarise(rows), rows, concurrency=1)
    assert "Headline" not in console.export_text()


def test_speedups_in_words() -> None:
    figures = {"latency_speedup_median": 1.5, "latency_speedup_ci95": [1.25, 2.0]}
    assert speedup(figures, "latency") == "1.50x faster (95 % interval 1.25-2.00)"
    figures = {"latency_speedup_median": 0.8, "latency_speedup_ci95": [0.5, 1.25]}
    assert speedup(figures, "latency") == "1.25x slower (95 % interval 0.80-2.00)"
    figures = {"latency_speedup_median": 0.5, "latency_speedup_ci95": None}
    assert speedup(figures, "latency") == "2.00x slower"


def test_a_graph_that_came_to_nothing_took_its_time() -> None:
    rows = both("a", status=Status.INVALID, error="no answer", right=False, latency_s=4.0)
    summary = summarise(rows)
    assert summary["modes"]["rrm"]["errors"] == 1
    assert summary["modes"]["rrm"]["latency_median"] == 4.0
    assert summary["all_pairs"]["latency_speedup_median"] == 0.5


def test_rows_are_plain_json() -> None:
    whole = row("a", "rrm", finish_reasons={"root": "eos"}, resume_latency_s=[0.1])
    assert json.loads(json.dumps(whole)) == whole
    assert whole["status"] == "graph" and type(whole["status"]) is str
    assert {"id", "task", "mode", "sample", "expected", "correct", "time", "settings", "session"} <= whole.keys()
    assert "job" not in whole


def test_what_splices_did() -> None:
    """Means are over tokens, not over resumes."""
    names = ("tokens", "kl_mean", "kl_max", "top1", "first_difference")
    figures = [(16, 0.5, 3.0, 0.75, 4), (4, 1.0, 2.0, 0.5, 0), (20, 0.0, 0.1, 1.0, None)]
    reports = [{"node": "root", **dict(zip(names, values, strict=True))} for values in figures]
    rows = [
        row("a", "rrm", spliced_tokens=9, splice_report=reports[:2]),
        row("b", "rrm", spliced_tokens=2, splice_report=reports[2:]),
        row("c", "rrm"),
    ]
    kv = summarise(rows)["kv"]
    assert (kv["spliced_rows"], kv["spliced_tokens"]) == (2, 11)
    assert (kv["splice_compared_resumes"], kv["splice_compared_tokens"]) == (3, 40)
    assert (kv["splice_kl_mean"], kv["splice_kl_max"]) == (pytest.approx(12 / 40), 3.0)
    assert kv["splice_top1_agreement"] == pytest.approx((12 + 2 + 20) / 40)
    assert (kv["splice_differing_resumes"], kv["splice_first_difference_median"]) == (2, 2)
    assert splice_line(kv) == (
        "Approximate: in 2 rows KV of 11 tokens was attached. Against the text, over 40 tokens after 3 resumes: KL "
        "divergence 0.3 nats on average, 3 at most; likeliest token the same in 85 %; 2 resumes differ, first at token "
        "3 (median)."
    )
    unmeasured = summarise([row("a", "rrm", spliced_tokens=9)])["kv"]
    assert splice_line(unmeasured) == "Approximate: in 1 row KV of 9 tokens was attached."


def shown(rows: list[Row], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_closing(console, summarise(rows), rows, 1)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_the_terminal_with_whole_words(width: int) -> None:
    rows = [*both("a", error="boom", cut={"max_nodes": 2}), *both("b" * 30)]
    text = shown(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    head = next(line.split() for line in text.splitlines() if line.strip().startswith("mode"))
    assert head[:3] == ["mode", "n", "correct"] and head[-2:] == ["cut", "errors"]
    assert ("TTFT" in head) == (width == 120)
    assert ("tok/s" in head) == (width >= 80)


def test_rows_that_ran_into_limits_are_counted_with_the_flag_to_raise() -> None:
    rows = both("a") + both("b", cut={"solver_max_tokens": 3, "max_nodes": 1})
    rows += [row("c", "direct", cut={"direct_max_tokens": 1}), row("c", "rrm", cut={"max_nodes": 9})]
    text = " ".join(shown(rows, 120).split())
    assert (
        "Cut by a limit: 3 rows. To give them more room, raise --max-nodes (2 rows), "
        "--direct-max-tokens (1 row), --solver-max-tokens (1 row)." in text
    )
    figures = summarise(rows)["modes"]
    assert (figures["direct"]["cut"], figures["rrm"]["cut"]) == (1, 2)
    assert figures["rrm"]["cut_by"] == {"max_nodes": 2, "solver_max_tokens": 1}
    assert "Cut by" not in shown(both("a"))


def test_answers_that_could_not_be_graded_are_counted() -> None:
    odd = make_row(
        JobResult(Job("a", "p"), Status.ATOMIC, "x", 1.0), "1", Verdict(False, "grading took too long"), {}, 0
    )
    assert "1 answer could not be graded (counted as wrong)" in " ".join(shown([odd]).split())
    assert "wrong (grading took too long)" in describe_row(odd)
