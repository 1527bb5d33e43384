"""The interface between a task's run and its backend: whole graphs on a backend of scripted texts, without torch."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lab import JOBS, STYLE, Lab
from scripted import Script, Scripted, Text, pieces, solve

from rrm_engine.errors import RrmError
from rrm_engine.graph.types import EndReason, Limits
from rrm_engine.protocol.style import load_style
from rrm_engine.solver.backend import Written
from rrm_engine.solver.events import Events
from rrm_engine.solver.loop import run_jobs
from rrm_engine.solver.result import Job
from rrm_engine.solver.runtime import Runtime


def child(name: str, task: str, *after: str) -> str:
    depends_on = ",".join(f'"{one}"' for one in after)
    return f'{{"type":"child","id":"{name}","task":"{task}","depends_on":[{depends_on}]}}\n'


def answer(text: str) -> list[Text]:
    return [Text(pieces(f'{{"type":"atomic","answer":"FINAL: {text}"}}'))]


AWAIT = '{"type":"await"}\n'
PLAN = child("a", "one") + child("b", "two", "a") + AWAIT + "never read"
GRAPH: Script = {"root": [Text(pieces(PLAN)), *answer("3")], "root.a": answer("1"), "root.b": answer("2")}
JOB = Job("t", "Add one and two.")


@pytest.mark.parametrize("module", ["rrm_engine.solver.loop", "rrm_engine.graph.machine"])
def test_no_torch_is_needed(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'rrm_engine.engine', 'rrm_engine.kv') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_graph_of_dependent_children(size: int) -> None:
    script = {**GRAPH, "root": [Text(pieces(PLAN, size)), *answer("3")]}
    backend = Scripted({"t": script})
    results, events = solve(backend, [JOB])
    result = results["t"]
    assert (result.status, result.answer, result.nodes, result.resumes) == ("graph", "FINAL: 3", 3, 1)
    assert result.finish_reasons == {"root": "await+concluded", "root.a": "concluded", "root.b": "concluded"}
    starts = {e["node"]: e for e in events if e["event"] == "start"}
    assert starts["root.b"]["after"] == ["root.a"]
    root = backend.sessions[0].nodes["root"]
    assert [who for who, _ in root.said] == ["system", "user", "assistant", "user"]
    assert root.said[2][1] == PLAN.removesuffix("\nnever read")  # cut after the event
    assert "1" in root.said[3][1] and "2" in root.said[3][1]
    assert "1" in backend.sessions[0].nodes["root.b"].said[1][1].partition("two")[2]  # what it depends on is given
    assert events[-1]["event"] == "finish" and events[-1]["events"] == len(events)


def test_a_node_that_solves_a_part_by_reference_sees_the_whole_problem() -> None:
    plan = "Parts: 2\n" + child("c1", "question (1)") + child("c2", "question (2)") + AWAIT
    script = {"root": [Text(pieces(plan)), *answer("3")], "root.c1": answer("1"), "root.c2": answer("2")}
    backend = Scripted({"t": script})
    results, _ = solve(backend, [JOB], style="by-reference", max_depth=1)
    assert (results["t"].status, results["t"].repairs) == ("graph", {})
    system, user = backend.sessions[0].nodes["root.c2"].said[:2]
    assert JOB.task in user[1] and "Solve only question (2)" in user[1]
    alone = Scripted({"t": {"root": answer("3")}})
    solve(alone, [Job("t", JOB.task, "direct")], style="by-reference")
    assert alone.sessions[0].nodes["root"].said[0] == system
    assert "Solve only" not in alone.sessions[0].nodes["root"].said[1][1]


@pytest.mark.parametrize(
    ("before_plan", "before_answer", "repairs"),
    [
        ("", "1 + 2 = 3\n\n", {}),
        ("", "The results are\n1 and 2.\n", {}),
        ("Let me split it.\n", "1 + 2 = 3\n", {"prose": 1}),
        ("", "So it is ", {"prose": 1}),
    ],
)
def test_working_that_the_style_asks_for_is_no_repair(
    before_plan: str, before_answer: str, repairs: dict[str, int]
) -> None:
    plan = f"Parts: 2\n{before_plan}" + child("c1", "One.") + child("c2", "Two.") + AWAIT
    last = Text(pieces(before_answer + '{"type":"atomic","answer":"FINAL: 3"}'))
    script = {"root": [Text(pieces(plan)), last], "root.c1": answer("1"), "root.c2": answer("2")}
    results, _ = solve(Scripted({"t": script}), [JOB], style="instruct", max_depth=1)
    assert (results["t"].status, results["t"].answer, results["t"].repairs) == ("graph", "FINAL: 3", repairs)


def test_siblings_with_one_task_are_one_node_that_is_told_under_both_ids() -> None:
    plan = child("a", "Find one.") + child("late", "uses b", "b", "a") + child("b", "find  one") + AWAIT
    backend = Scripted(
        {"t": {"root": [Text(pieces(plan)), *answer("3")], "root.a": answer("1"), "root.late": answer("2")}}
    )
    results, events = solve(backend, [JOB])
    assert (results["t"].nodes, results["t"].repairs) == (3, {"same_task": 1})
    made = [(e["id"], e["child"], e["same_as"]) for e in events if e["event"] == "event" and e["kind"] == "child"]
    assert made == [("a", "root.a", None), ("late", "root.late", None), ("b", None, "root.a")]
    after = {e["node"]: e["after"] for e in events if e["event"] in ("start", "resume")}
    assert after["root.late"] == ["root.a"] and sorted(after["root"]) == ["root.a", "root.late"]
    nodes = backend.sessions[0].nodes
    assert "- b: 1\n- a: 1" in nodes["root.late"].said[1][1], "in the order named"
    told = nodes["root"].said[3][1]
    assert "a = 1\nlate = 2\nb = 1" in told and "Child b has the task of a" in told


@pytest.mark.parametrize("style", ["instruct", "qwen3", "embedded"])
def test_a_plan_of_the_whole_task_is_solved_by_its_node_which_is_told_why(style: str) -> None:
    plan = child("c1", "Problem: add One and two") + child("c2", "never read") + AWAIT
    backend = Scripted({"t": {"root": [Text(pieces(plan)), *answer("3")]}})
    results, events = solve(backend, [JOB], style=style)
    assert (results["t"].status, results["t"].nodes, results["t"].repairs) == ("atomic", 1, {"own_task": 1})
    (made,) = [e for e in events if e["event"] == "event" and e["kind"] == "child"]
    assert made["child"] is None and made["same_as"] is None
    told = backend.sessions[0].nodes["root"].said[3][1]
    assert "Child c1 was not started: it has the task of this node itself." in told


def test_a_child_forks_where_it_was_declared() -> None:
    backend = Scripted({"t": GRAPH}, forks=True)
    results, _ = solve(backend, [JOB], child_context="parent")
    assert results["t"].status == "graph"
    said = backend.sessions[0].nodes["root.a"].said
    assert said[2] == ("assistant", child("a", "one").strip())
    with pytest.raises(RrmError, match="--child-context parent"):
        solve(Scripted({"t": GRAPH}), [JOB], child_context="parent")


def test_an_answer_cancels_the_children() -> None:
    backend = Scripted({"t": {"root": [Text([child("a", "one"), '{"type":"atomic","answer":"FINAL: 9"}'])]}})
    backend.scripts["t"]["root.a"] = [Text(["thinking about it"] * 50)]  # type: ignore[index]
    results, events = solve(backend, [JOB])
    assert results["t"].answer == "FINAL: 9"
    assert [e["node"] for e in events if e["event"] == "cancelled"] == ["root.a"]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("a child is cut off", [Text(pieces("no answer"), EndReason.LENGTH)]),
        ("a child writes nothing", [Text([""])]),
    ],
)
def test_a_child_that_fails_is_told_to_its_parent(name: str, task: list[Text]) -> None:
    backend = Scripted({"t": {**GRAPH, "root.a": task}})
    results, events = solve(backend, [JOB])
    assert results["t"].status == "graph"
    (end,) = [e for e in events if e["event"] == "concluded" and e["node"] == "root.a"]
    assert not end["ok"] and "a = not found, it is: one" in backend.sessions[0].nodes["root"].said[-1][1]


def test_a_child_without_room_fails_alone() -> None:
    backend = Scripted({"t": GRAPH})
    backend.no_room = lambda node, opening: node == "root.a"
    results, events = solve(backend, [JOB])
    assert results["t"].status == "graph" and results["t"].cut == {"max_sequence_tokens": 1}
    assert [e["node"] for e in events if e["event"] == "no_room"] == ["root.a"]


def test_a_bug_of_one_node_costs_its_job_only() -> None:
    broken = {**GRAPH, "root.b": [Text(["x", KeyError("a bug")])]}
    results, _ = solve(Scripted({"t": GRAPH, "u": broken}), [JOB, Job("u", "Add.")])
    assert results["t"].error is None and results["t"].answer == "FINAL: 3"
    assert results["u"].error == "KeyError: 'a bug'" and results["u"].traceback is not None


def test_a_step_that_fails_costs_all_that_run() -> None:
    results, _ = solve(
        Scripted({"t": GRAPH, "u": GRAPH, "v": GRAPH}, fail_at=3), [JOB, Job("u", "Add."), Job("v", "x")], 2
    )
    assert [results[name].error for name in "tuv"] == ["t/rrm/0: the line is dead", "u/rrm/0: the line is dead", None]


def test_what_runs_is_cancelled_when_the_caller_goes() -> None:
    backend, heard = Scripted({"t": GRAPH}), list[dict[str, Any]]()
    runtime = Runtime(backend, load_style("instruct"), Limits())
    with closing(run_jobs(runtime, [JOB], Events(heard.append), 1)) as running:
        for _ in range(20):
            next(running)
        assert backend.alive()
    assert not backend.alive() and heard[-1]["status"] == "failed"


def test_leniencies_are_counted_and_a_direct_solve_is_one_node() -> None:
    odd = child("a", "one") + '{"type":"chid"}\n' + child("a", "another") + AWAIT
    backend = Scripted(
        {"t": {"root": [Text(pieces(odd)), *answer("3")], "root.a": answer("1"), "root.a_2": answer("2")}}
    )
    results, events = solve(backend, [JOB])
    assert results["t"].repairs == {"malformed": 1, "duplicate_id_renamed": 1}
    assert [e["child"] for e in events if e["event"] == "event" and e["kind"] == "child"] == ["root.a", "root.a_2"]
    results, _ = solve(Scripted({"t": {"root": [Text(pieces("It is FINAL: 3"))]}}), [Job("t", "x", "direct")])
    assert (results["t"].status, results["t"].answer, results["t"].nodes) == ("atomic", "It is FINAL: 3", 1)


SAME = ("status", "answer", "nodes", "model_calls", "resumes", "max_depth", "max_sibling_width", "finish_reasons")
MORE = ("repairs", "total_tokens", "critical_path_tokens", "prompt_sha256", "cut", "error")
OWN = {"t", "events", "step", "tokens", "blocks", "prompt_tokens", "appended_tokens", "sampling", "grammar", "budget"}
OWN |= {"counters", "token_ids", "sampled", "queued_s", "ran_s", "spliced", "splice_report", "pinned", "offloaded"}


def test_what_the_engine_wrote_makes_the_same_graph_again(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts, statuses, answers, and the same events in the same order: nothing else decides a run."""
    solver = lab.solver(max_nodes=12, seed=2)  # where no two nodes end in one step
    (tmp_path / "terse.toml").write_text(STYLE)
    scripts, told, step = dict[str, dict[str, list[Text]]](), list[dict[str, Any]](), solver.backend.step

    def heard(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] in ("start", "resume"):
            scripts.setdefault(event["job"], {}).setdefault(event["node"], []).append(Text([], None))

    def noted() -> Generator[Written, None, None]:
        for written in step():
            texts = scripts[written.job][written.node]
            texts[-1] = Text([*texts[-1].pieces, written.text], written.end)
            yield written

    monkeypatch.setattr(solver.backend, "step", noted)
    results = {result.job.id: result for result in solver.run(JOBS, heard, 4)}
    style, limits = str(tmp_path / "terse.toml"), {"max_depth": 2, "max_width": 3, "max_nodes": 12}
    replayed = Scripted({key.split("/")[0]: script for key, script in scripts.items()})
    again, told_again = solve(replayed, JOBS, 4, style, **limits)
    for name in (*SAME, *MORE):
        assert {k: getattr(r, name) for k, r in again.items()} == {k: getattr(r, name) for k, r in results.items()}
    assert by_job(told_again) == by_job(told)
    assert sum(result.nodes > 2 for result in results.values()) > 1, "hardly anything was split"
    # Control: another text, another answer.
    (name, *_) = [name for name, result in results.items() if result.status == "graph"]
    changed = {**replayed.scripts[name], "root": [*replayed.scripts[name]["root"][:-1], *answer("elsewhere")]}
    other, _ = solve(Scripted({name: changed}), [job for job in JOBS if job.id == name], 1, style, **limits)
    assert other[name].answer == "FINAL: elsewhere" != results[name].answer


def by_job(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the solver says, job by job, without what only the backend knows."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["event"] != "readmitted":
            found[event["job"]].append({k: v for k, v in event.items() if k not in OWN})
    return found


@pytest.mark.parametrize("mode", ["rrm", "direct"])
@pytest.mark.parametrize("name", ["max_row_tokens", "max_row_seconds"])
def test_a_row_ends_at_its_limit_with_what_it_has(mode: str, name: str) -> None:
    """It leaves nothing allocated, it says which limit that was, and its neighbour goes on to its end."""
    endless = [Text(pieces("FINAL: 7 and on and on" + " and on" * 50_000))]
    backend = Scripted({"t": {**GRAPH, "root.b": endless} if mode == "rrm" else {"root": endless}, "u": GRAPH})
    limit: Any = 200 if name == "max_row_tokens" else 0.5
    most: dict[str, Any] = {name: limit}
    results, events = solve(backend, [Job("t", "Add.", mode), Job("u", "Add.")], **most)
    cut, whole = results["t"], results["u"]
    assert (whole.status, whole.answer, whole.cut) == ("graph", "FINAL: 3", {})
    assert cut.cut == {name: 1} and cut.error is None
    assert cut.total_tokens == limit if name == "max_row_tokens" else 0.5 <= cut.latency_s < 60
    if mode == "direct":
        assert cut.status == "atomic" and cut.answer.startswith("FINAL: 7 and on")
    else:
        assert cut.status == "invalid" and cut.finish_reasons["root.b"] == "cancelled"
    mine = [event for event in events if event["job"] == cut.job.key]
    assert (mine[-1]["event"], mine[-1]["events"], mine[-1]["answer"]) == ("finish", len(mine), cut.answer)
    free, _ = solve(Scripted({"u": GRAPH}), [Job("u", "Add.")], **{**most, name: 10_000})
    assert (free["u"].status, free["u"].cut) == ("graph", {})
