"""A job that ends early, in whatever state it is, takes its descendants with it and frees every block.

Several copies of one nested task run side by side. Each copy is ended in another state; the last one is left alone and
must come out, token by token, as if it had run by itself. The graph's shape is fixed by grammars (``driven.py``), so
that every state is reached whatever the weights are.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from broken import Breaks, blocks_of_sequences_that_end_paused, descendants_are_forgotten
from driven import NODES, TASK, TOKENS, Driven
from forked_bench import break_forward
from lab import engine_of

from rrm_engine.backends.local import Solver
from rrm_engine.backends.session import EngineNode
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.events import Atomic
from rrm_engine.solver import events, loop
from rrm_engine.solver.job import JobRun
from rrm_engine.solver.node import NodeRun
from rrm_engine.solver.result import Job, JobResult

Act = Callable[[JobRun, str], str | None]
Events = list[dict[str, Any]]
Outcome = tuple[Any, ...]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Driven:
    return Driven(tmp_path_factory.mktemp("driven"))


def outcome(result: JobResult, events: Events) -> Outcome:
    """All that must not depend on what else ran: every token of every node included."""
    tokens = {e["node"]: e["token_ids"] for e in events if e["job"] == result.job.key and "token_ids" in e}
    return result.status, result.answer, result.critical_path_tokens, result.finish_reasons, tokens


@pytest.fixture(scope="module")
def alone(driven: Driven) -> Callable[[str], Outcome]:
    """By ``child_context`` the outcome of the task where nothing else runs."""

    @cache
    def solved(child_context: str) -> Outcome:
        events: Events = []
        result = driven.solver(child_context=child_context).solve(TASK, on_event=events.append)
        assert sorted(result.finish_reasons) == sorted(NODES) and result.total_tokens == TOKENS
        return outcome(result, events)

    return solved


# states of a job


def sequence_of(node: NodeRun) -> Sequence:
    assert isinstance(node.handle, EngineNode)
    return node.handle.sequence


def states(run: JobRun) -> set[str]:
    """What is going on in a job, as far as it matters to what it holds."""
    root = run.commands.nodes["root"]
    if not root.handle.text and root.phase is Phase.GRAPH:
        return {"nothing written"}
    nodes = run.commands.nodes
    alive = [n for n in nodes.values() if sequence_of(n).state is not State.FINISHED]
    running = [n.path for n in alive if n.running]
    waiting = [n.path for n in alive if not n.running]
    beside = "beside children" if len(running) > 1 else "alone"
    found = {f"{'planning' if root.phase is Phase.GRAPH else 'resumed'} {beside}"} if root.running else {"waiting"}
    if any(path.count(".") == 2 for path in running):
        found.add("grandchildren running")
    if any(path.count(".") == 1 for path in waiting):
        found.add("a child waiting")
    if "root" in waiting and any(sequence_of(n).state is State.FINISHED for n in nodes.values()):
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
    engine = engine_of(solver)
    engine.check()
    assert not [s.key for s in engine.sequences if s.key.startswith(gone)], "it still has sequences"
    held = {block for s in engine.sequences for block in s.table.blocks}
    assert engine.pool.num_used == len(held), "blocks were lost"
    assert engine.space.num_used == sum(copy.count for s in engine.sequences for copy in s.table.host)


def run_copies(solver: Solver, names: list[str], act: Act) -> tuple[list[str], Outcome]:
    """One copy of the task for each of ``names``, and one more that is left alone.

    ``act(copy, name)`` may end a part of a copy and then returns the beginning of the keys that must be gone. Returns
    the names for which it did, and the outcome of the copy left alone.
    """
    heard: Events = []
    tell, keys = events.Events(heard.append), [*names, "last"]
    runs = [JobRun(solver._runtime, Job(name, TASK), i, tell) for i, name in enumerate(keys)]
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
            loop.step(solver.backend, live)
            engine_of(solver).check()
    nothing_left(solver, "")
    assert runs[-1].result is not None
    return ended, outcome(runs[-1].result, heard)


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
def test_a_job_cancelled_in_any_state_leaves_nothing(
    name: str, driven: Driven, alone: Callable[[str], Outcome]
) -> None:
    settings = SETTINGS[name]
    ended, last = run_copies(driven.solver(**settings), STATES, cancel_in_state)
    assert sorted(ended) == sorted(STATES), "a state was never reached"
    assert last == alone(settings.get("child_context", "task"))


def test_states_that_are_not_reached_are_noticed(driven: Driven) -> None:
    """Negative control: a graph that is not deep enough."""
    ended, _ = run_copies(driven.solver(max_depth=1), STATES, cancel_in_state)
    assert set(STATES) - set(ended) == {"grandchildren running", "a child waiting"}


def test_a_neighbour_that_suffers_is_noticed(
    driven: Driven, alone: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a cancelled node wipes out more KV than its own."""
    solver, release = driven.solver(), JobRun.release

    def wiping(self: JobRun) -> None:
        release(self)
        for keys, _ in engine_of(solver).runner.cache._layers.values():
            keys.zero_()

    monkeypatch.setattr(JobRun, "release", wiping)
    ended, last = run_copies(solver, ["a child waiting"], cancel_in_state)
    assert ended == ["a child waiting"] and last != alone("task")


def answer_in_state(run: JobRun, name: str) -> str | None:
    """The first node in a phase in which it may answer, and that has nodes below it, answers without them."""
    for node in run.commands.nodes.values():
        below = [n for n in run.commands.nodes.values() if n.path.startswith(node.path + ".")]
        alive = [n for n in below if sequence_of(n).state is not State.FINISHED]
        if node.path == name and node.running and alive:
            run.commands.carry_out(run.machine.on_event(name, Atomic("FINAL: 7"), ""))
            return f"{run.job.key}:{name}"
    return None


def test_nodes_that_are_not_needed_any_more_are_gone_at_once(driven: Driven, alone: Callable[[str], Outcome]) -> None:
    """A node concludes while its children, and theirs, still decode: the root, or one below it."""
    ended, last = run_copies(driven.solver(), ["root", "root.a"], answer_in_state)
    assert sorted(ended) == ["root", "root.a"]
    assert last == alone("task")


@pytest.mark.parametrize(
    ("sabotage", "how"),
    [(descendants_are_forgotten, "still has sequences"), (blocks_of_sequences_that_end_paused, "references kept")],
)
def test_what_is_not_freed_is_noticed(
    sabotage: Breaks, how: str, driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of both tests above."""
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=how):
        run_copies(driven.solver(), ["waiting"], cancel_in_state)


# budgets


def overspent(events: Events, budgets: dict[str, int]) -> list[str]:
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


@pytest.mark.parametrize(("planner", "nodes"), [(30, 1), (90, 3), (112, 7)])
def test_budgets_bind_every_descendant(planner: int, nodes: int, driven: Driven) -> None:
    """A budget that ends in the middle of a plan or of a solution: what was started by then still ends."""
    solver = driven.solver(planner_max_tokens=planner, solver_max_tokens=9, continuation_max_tokens=12)
    budgets = {"graph": planner, "solver": 9, "continuation": 12, "direct": solver.resolved.direct_max_tokens or 0}
    events: Events = []
    result = solver.solve(TASK, on_event=events.append)
    assert sum(node.split(".")[0] == "root" for node in result.finish_reasons) == nodes
    assert overspent(events, budgets) == []
    assert any(reason.startswith("length") for reason in result.finish_reasons.values())
    assert overspent(events, {**budgets, "solver": 8, "graph": planner - 1}) != []  # negative control
    nothing_left(solver, "")


# a step that fails


def test_a_failed_step_under_memory_pressure_loses_no_block(driven: Driven, alone: Callable[[str], Outcome]) -> None:
    """Wherever it fails, with blocks on their way to the host or back, whichever nodes were in it."""
    solver = driven.solver(wait_policy="offload", kv_blocks=40, max_concurrency=2)
    engine = engine_of(solver)
    reasons = []
    for step in range(60, 500, 110):
        mend = break_forward(engine.runner, step, memory=False)
        events: Events = []
        failed, other, later = sorted(
            solver.run([Job(f"{n}", TASK) for n in range(3)], events.append, concurrency=2), key=lambda r: r.job.id
        )
        mend()
        nothing_left(solver, "")
        assert engine.pool.num_used == engine.space.num_used == 0
        assert failed.error is not None and other.error is not None
        reasons += [failed.error, other.error]
        assert outcome(later, events) == alone("task")
        assert later.offloaded_blocks > 0
    assert any("in a step of other jobs: Trying" in reason for reason in reasons)
    assert any("in a step of root.a.a" in reason for reason in reasons), reasons
