"""A job that ends early, in whatever state it is, takes its descendants with it and leaves not one block behind.

Several copies of one nested task run side by side on the embedded model. Each copy is ended in another state; the last
one is left alone and must come out as if it had run by itself.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from forked_bench import break_forward

from rrm_engine.backends.job import JobRun
from rrm_engine.backends.local import Solver
from rrm_engine.backends.result import Job, JobResult
from rrm_engine.config import RunConfig
from rrm_engine.engine.prepare import LoadedModel, load_model
from rrm_engine.engine.scheduler import Scheduler
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.events import Atomic

TASK = (
    "Work modulo 1000. (a) Ben keeps 2 boxes. The first begins at 85 and repeats one step 5 times: multiply by 6, then "
    "add 7. The second holds 736 fish, and every day for 6 days the count becomes 3 times the old one plus 6. (b) Tom "
    "starts with 308 fish, and 7 times over the number is multiplied by 6 and 8 more are added. What is the sum of all "
    "results?"
)
Act = Callable[[JobRun, str], str | None]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("embedded")


def make_solver(model: LoadedModel, **changes: Any) -> Solver:
    settings = {"temperature": 0.0, "max_sequence_tokens": 512, "kv_blocks": 500, **changes}
    return Solver(model, RunConfig(**settings), [TASK])


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> JobResult:
    return make_solver(model).solve(TASK)


def outcome(result: JobResult) -> tuple[Any, ...]:
    return result.status, result.answer, result.total_tokens, result.critical_path_tokens, result.finish_reasons


# states of a job


def states(run: JobRun) -> set[str]:
    """What is going on in a job, as far as it matters to what it holds."""
    root = run.nodes["root"]
    if not root.ends and root.phase is Phase.GRAPH:
        return {"nothing written"}
    alive = [n for n in run.nodes.values() if n.sequence.state is not State.FINISHED]
    running = [n.path for n in alive if n.running]
    waiting = [n.path for n in alive if not n.running]
    beside = "beside children" if len(running) > 1 else "alone"
    found = {f"{'planning' if root.phase is Phase.GRAPH else 'resumed'} {beside}"} if root.running else {"waiting"}
    if any(path.count(".") == 2 for path in running):
        found.add("grandchildren running")
    if any(path.count(".") == 1 for path in waiting):
        found.add("a child waiting")
    if "root" in waiting and any(n.sequence.state is State.FINISHED for n in run.nodes.values()):
        found.add("waiting for the last child")
    return found


STATES = [
    "nothing written",
    "planning alone",
    "planning beside children",
    "waiting",
    "grandchildren running",
    "a child waiting",
    "waiting for the last child",
    "resumed alone",
]


def nothing_left(solver: Solver, gone: str) -> None:
    """No sequence whose key begins with ``gone`` is there, and what is held is what the others hold."""
    engine = solver.engine
    engine.check()
    assert not [s.key for s in engine.sequences if s.key.startswith(gone)], "it still has sequences"
    held = {block for s in engine.sequences for block in s.table.blocks}
    assert engine.pool.num_used == len(held), "blocks were lost"
    assert engine.space.num_used == sum(copy.count for s in engine.sequences for copy in s.table.host)


def run_copies(solver: Solver, names: list[str], act: Act) -> tuple[list[str], JobResult]:
    """One copy of the task for each of ``names``, and one more that is left alone.

    ``act(copy, name)`` may end a part of a copy and then returns the beginning of the keys that must be gone. Returns
    the names for which it did, and the result of the copy left alone.
    """
    runs = [JobRun(solver._runtime, Job(name, TASK), i, lambda event: None) for i, name in enumerate([*names, "last"])]
    for run in runs:
        run.start()
    ended: list[str] = []
    while live := [run for run in runs if run.result is None]:
        for run in live:
            name = run.job.id
            if name in names and name not in ended and (gone := act(run, name)) is not None:
                ended.append(name)
                nothing_left(solver, gone)
        if live := [run for run in runs if run.result is None]:
            solver._step(live)
            solver.engine.check()
    nothing_left(solver, "")
    assert runs[-1].result is not None
    return ended, runs[-1].result


def cancel_in_state(run: JobRun, name: str) -> str | None:
    if name not in states(run):
        return None
    run.cancel("not wanted any more")
    return run.job.key


SETTINGS: dict[str, dict[str, Any]] = {
    "plenty": {},
    "forks": {"child_context": "parent"},
    "offload, small pool": {"wait_policy": "offload", "kv_blocks": 60},
    "drop, one at a time": {"wait_policy": "drop", "max_concurrency": 2, "prefix_cache": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_job_cancelled_in_any_state_leaves_nothing(name: str, model: LoadedModel, alone: JobResult) -> None:
    ended, last = run_copies(make_solver(model, **SETTINGS[name]), STATES, cancel_in_state)
    if name == "forks":  # the model was not trained on forked contexts and need not go as deep
        assert len(ended) >= len(STATES) // 2 and set(ended) <= set(STATES)
    else:
        assert sorted(ended) == sorted(STATES), "a state was never reached"
    if name != "forks":
        assert outcome(last) == outcome(alone)


def answer_in_state(run: JobRun, name: str) -> str | None:
    """The first node in a phase in which it may answer, and that has nodes below it, answers without them."""
    for node in run.nodes.values():
        below = [n for n in run.nodes.values() if n.path.startswith(node.path + ".")]
        alive = [n for n in below if n.sequence.state is not State.FINISHED]
        if node.path == name and node.running and alive and run.machine is not None:
            run._carry_out(run.machine.on_event(name, Atomic("FINAL: 7"), ""))
            return f"{run.job.key}:{name}"
    return None


def test_nodes_that_are_not_needed_any_more_are_gone_at_once(model: LoadedModel, alone: JobResult) -> None:
    """A node concludes while its children, and theirs, still decode: the root, or one below it."""
    ended, last = run_copies(make_solver(model), ["root", "root.a"], answer_in_state)
    assert sorted(ended) == ["root", "root.a"]
    assert outcome(last) == outcome(alone)


def forget_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the machine nor the job looks further down than the nodes it is told of."""

    def abandon(self: GraphMachine, nodes: Any, reason: str) -> None:
        for node in nodes:
            node.children, kept = {}, node.children
            abandon_whole(self, [node], reason)
            node.children = kept

    abandon_whole = GraphMachine._abandon
    monkeypatch.setattr(GraphMachine, "_abandon", abandon)
    monkeypatch.setattr(JobRun, "release", lambda self: None)


def keep_waiting_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that ends while it is paused does not give its blocks back."""
    finish = Scheduler.finish

    def forgetful(self: Scheduler, sequence: Sequence) -> None:
        if sequence.state is State.PAUSED:
            sequence.table.blocks.clear()
            sequence.table.length = sequence.table.stored = 0
        finish(self, sequence)

    monkeypatch.setattr(Scheduler, "finish", forgetful)


@pytest.mark.parametrize(
    ("sabotage", "how"), [(forget_descendants, "still has sequences"), (keep_waiting_blocks, "references kept")]
)
def test_what_is_left_behind_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None], how: str, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of both tests above."""
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=how):
        run_copies(make_solver(model), ["waiting"], cancel_in_state)


# budgets


def overspent(events: list[dict[str, Any]], budgets: dict[str, int]) -> list[str]:
    """Nodes that wrote more in a phase than its budget, or that were started and never ended."""
    phases: dict[str, list[str]] = {}
    wrong, ended = [], Counter[str]()
    for event in events:
        node = event["node"]
        if event["event"] in ("start", "resume"):
            phases.setdefault(node, []).append(event["phase"])
        elif "token_ids" in event:
            ended[node] += 1
            for (start, stop), phase in zip(event["sampled"], phases[node], strict=True):
                if stop - start > budgets[phase]:
                    wrong.append(node)
    return wrong + [node for node in phases if ended[node] != 1]


@pytest.mark.parametrize("planner", [30, 90, 150])
def test_budgets_bind_every_descendant(planner: int, model: LoadedModel) -> None:
    """A budget that ends in the middle of a plan or of a solution: what was started by then still ends."""
    solver = make_solver(model, planner_max_tokens=planner, solver_max_tokens=9, continuation_max_tokens=12)
    budgets = {"graph": planner, "solver": 9, "continuation": 12, "direct": solver.resolved.direct_max_tokens or 0}
    events: list[dict[str, Any]] = []
    result = solver.solve(TASK, on_event=events.append)
    assert overspent(events, budgets) == []
    assert any(reason.startswith("length") for reason in result.finish_reasons.values())
    assert overspent(events, {**budgets, "solver": 8, "graph": planner - 1}) != []  # negative control
    nothing_left(solver, "")


# a step that fails


def test_a_failed_step_under_memory_pressure_loses_no_block(model: LoadedModel, alone: JobResult) -> None:
    """Wherever it fails, with blocks on their way to the host or back, and whoever was in it."""
    solver = make_solver(model, wait_policy="offload", kv_blocks=40, max_concurrency=2)
    runner, attend = solver.engine.runner, solver.engine.runner.attend
    reasons = []
    for step in range(40, 200, 50):
        break_forward(runner, step, memory=False)
        failed, other, later = sorted(
            solver.run([Job(f"{n}", TASK) for n in range(3)], concurrency=2), key=lambda r: r.job.id
        )
        runner.attend = attend
        nothing_left(solver, "")
        assert solver.engine.pool.num_used == solver.engine.space.num_used == 0
        assert failed.error is not None and other.error is not None
        reasons += [failed.error, other.error]
        assert outcome(later) == outcome(alone)
        assert later.offloaded_blocks > 0
    assert any("in a step of other jobs: Trying" in reason for reason in reasons)
    assert any("in a step of root.a.a" in reason for reason in reasons)
