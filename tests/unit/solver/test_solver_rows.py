"""What goes wrong with one job is that job's error: those beside it come out as if nothing had happened."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from lab import JOBS, STYLE, TASKS, Lab, Recorded, idle, recorded

from rrm_engine import Job, JobResult, RrmError, RunConfig, Solver
from rrm_engine.backends.join import Joiner
from rrm_engine.backends.session import EngineSession
from rrm_engine.backends.tokens import NodeTokens
from rrm_engine.graph.machine import GraphMachine
from rrm_engine.protocol.grammar import EventMatcher
from rrm_engine.protocol.parser import EventParser
from rrm_engine.solver.commands import Commands
from rrm_engine.solver.job import JobRun

VICTIM = "t1"


def run_beside(solver: Solver, reference: Recorded, *odd: Job) -> dict[str, JobResult]:
    """All jobs beside each other, ``odd`` among them; those that have no error must be what they are alone."""
    events: list[dict[str, Any]] = []
    jobs = [*odd, *(job for job in JOBS if job.key not in {one.key for one in odd})]
    results = {r.job.key: r for r in solver.run(jobs, events.append, concurrency=4)}
    assert idle(solver)
    assert results.keys() == {job.key for job in jobs}
    for key, result in results.items():
        if result.error is None:
            expected = reference.results[key]
            assert (result.status, result.answer, result.total_tokens) == (
                expected.status,
                expected.answer,
                expected.total_tokens,
            )
    finished = [event["job"] for event in events if event["event"] == "finish"]
    assert sorted(finished) == sorted(results), "a job has no end in the trace"
    return results


def failing(nth: int, mine: Callable[..., bool], original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, but its ``nth`` call for the victim raises a bug of ours."""
    calls = 0

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if mine(self):
            calls += 1
            if calls == nth:
                raise KeyError("a bug")
        return original(self, *args, **kwargs)

    return call


def noting_whose_turn_it_is(original: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    def noted(self: JobRun | EngineSession, *args: Any) -> Any:
        running[:] = [self.job if isinstance(self.job, str) else self.job.key]
        return original(self, *args)

    return noted


def is_victims(sequence_key: str) -> bool:
    return sequence_key.startswith(f"{VICTIM}/")


PLACES: dict[str, tuple[type, str, int]] = {
    "detokenise": (NodeTokens, "wrote", 20),
    "parse": (EventParser, "feed", 20),
    "the graph is told of an event": (GraphMachine, "on_event", 2),
    "the graph is told of an end": (GraphMachine, "on_end", 1),
    "start a node": (Commands, "_start", 2),
    "resume a node": (Commands, "_resume", 1),
    "find where an event ends": (NodeTokens, "split", 1),
    "keep what a join needs": (Joiner, "keep", 1),
    "finish": (JobRun, "_finish", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bug_costs_its_row_only(lab: Lab, reference: Recorded, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    kind, name, nth = PLACES[place]
    settings: dict[str, Any] = {"join": "transcript"} if kind is Joiner else {}
    reference = recorded(lab, **settings) if settings else reference
    running: list[str] = []  # keys of jobs
    for owner, method in ((JobRun, "start"), (JobRun, "on_written"), (EngineSession, "on_token")):
        monkeypatch.setattr(owner, method, noting_whose_turn_it_is(getattr(owner, method), running))
    monkeypatch.setattr(kind, name, failing(nth, lambda _: is_victims(running[0]), getattr(kind, name)))
    results = run_beside(lab.solver(**settings), reference)
    broken = {r.job.id: r for r in results.values() if r.error}
    assert broken.keys() == {VICTIM}
    result = broken[VICTIM]
    assert (result.status, result.error) == ("failed", "KeyError: 'a bug'")
    assert result.traceback is not None
    assert result.traceback.startswith("Traceback") and f"in {name}" not in str(result.error)
    assert result.traceback.rstrip().endswith("KeyError: 'a bug'")


def test_a_grammar_that_fails_costs_its_row_only(
    lab: Lab, reference: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = lab.solver()
    submit, mine = solver.engine.submit, []

    def note(key: str, *args: Any, **options: Any) -> Any:
        sequence = submit(key, *args, **options)
        if is_victims(key):
            mine.append(sequence.matcher)
        return sequence

    monkeypatch.setattr(solver.engine, "submit", note)
    monkeypatch.setattr(EventMatcher, "accept", failing(7, lambda self: self in mine, EventMatcher.accept))
    results = run_beside(solver, reference)
    assert {r.job.id: r.error for r in results.values() if r.error} == {VICTIM: "KeyError: 'a bug'"}


def test_books_that_are_broken_beyond_cancelling(
    lab: Lab, reference: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job cannot even be cancelled properly: it still ends with its first error, and gives everything back."""
    solver = lab.solver()
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(GraphMachine, "cancel", failing(1, lambda self: True, GraphMachine.cancel))
    monkeypatch.setattr(GraphMachine, "on_event", failing(3, lambda self: True, GraphMachine.on_event))
    results = list(solver.run(JOBS, events.append, concurrency=1))
    assert [r.error for r in results if r.error] == ["KeyError: 'a bug'"]
    assert len(results) == len(JOBS)
    assert idle(solver)


def test_a_task_that_is_no_text(lab: Lab, reference: Recorded) -> None:
    odd = [Job("half", "Add \ud83d and 3.", mode) for mode in ("rrm", "direct")]
    results = run_beside(lab.solver(), reference, *odd)
    for job in odd:
        result = results[job.key]
        assert result.error == r"the task is no text: its character 5, '\ud83d', is half of a surrogate pair"
        assert (result.status, result.traceback) == ("failed", None)
    assert sum(r.error is not None for r in results.values()) == 2


def test_an_id_may_be_any_string(lab: Lab) -> None:
    ids = ["\ud800", "a/rrm/0", "a:b", "", "\x1b[31m", "x" * 5000, "\0", "‮"]
    results = list(lab.solver().run([Job(name, TASKS[0], "direct") for name in ids], concurrency=3))
    assert sorted(r.job.id for r in results) == sorted(ids)
    assert not [r.error for r in results if r.error]


def test_a_template_that_fails_for_one_task(lab: Lab, reference: Recorded, tmp_path: Any) -> None:
    style = tmp_path / "picky.toml"
    fails = "{% if 1 // (0 if task == 'abcdef' else 1) %}{% endif %}"
    style.write_text(STYLE.replace('graph = "Problem', f'graph = "{fails}Problem'))
    results = run_beside(lab.solver(prompt_style=str(style)), reference, Job("six", "abcdef"))
    (error,) = [r.error for r in results.values() if r.error]
    assert error is not None and error.startswith("prompt style terse, user.graph: ") and "zero" in error


# the caller's part


def test_an_error_of_the_caller_is_no_row(lab: Lab, reference: Recorded) -> None:
    solver, heard = lab.solver(), 0

    def full(event: dict[str, Any]) -> None:
        nonlocal heard
        heard += 1
        if heard == 30:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(solver.run(JOBS, full, concurrency=4))
    assert heard == 30, "it was called again after it had failed"
    assert idle(solver)
    assert Recorded(solver).run(JOBS, 4).rows() == reference.rows()


def test_a_callback_that_solves_is_refused(lab: Lab) -> None:
    solver = lab.solver()
    with pytest.raises(RrmError, match="in use"):
        solver.solve(TASKS[0], on_event=lambda event: solver.solve(TASKS[1]))  # type: ignore[arg-type]
    assert idle(solver)
    assert solver.solve(TASKS[0]).error is None


REFUSED_CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number": (lambda s: s.solve(5), "task of a Job must be a str, not 5"),
    "bytes": (lambda s: s.stream(b"x"), "task of a Job must be a str"),
    "another mode": (lambda s: s.solve("x", "fast"), "mode of a Job must be direct or rrm, not 'fast'"),
    "no jobs": (lambda s: s.run(None), "run takes Jobs, in a list"),
    "one job": (lambda s: s.run(JOBS[0]), "run takes Jobs, in a list"),
    "texts": (lambda s: s.run(["x"]), "run takes Jobs, not 'x'"),
    "twice": (lambda s: s.run([JOBS[0], JOBS[1], Job(JOBS[0].id, "other")]), "two jobs have the key 't0/rrm/0'"),
    "none at a time": (lambda s: s.run(JOBS, concurrency=0), "concurrency must be a whole number, at least 1, not 0"),
    "half at a time": (lambda s: s.run(JOBS, concurrency=1.5), "concurrency must be"),
    "True at a time": (lambda s: s.run(JOBS, concurrency=True), "concurrency must be"),
    "no callback": (lambda s: s.run(JOBS, on_event=[]), "on_event must be something to call"),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_what_cannot_be_run_is_refused_at_the_call(lab: Lab, name: str) -> None:
    call, message = REFUSED_CALLS[name]
    solver = lab.solver()
    with pytest.raises(RrmError, match=message):
        call(solver)
    assert solver.solve(TASKS[0], "direct").error is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((5, "t"), "the id of a Job must be a str, not 5"),
        (("i", None), "the task of a Job must be a str, not None"),
        (("i", "t", "RRM"), "the mode of a Job"),
        (("i", "t", "rrm", -1), "the sample of a Job must be a whole number, at least 0, not -1"),
        (("i", "t", "rrm", True), "the sample of a Job"),
        (("i", "t", "rrm", "0"), "the sample of a Job"),
    ],
)
def test_jobs_that_are_none(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RrmError, match=message):
        Job(*fields)


def suspended(solver: Solver, how: str) -> Iterator[Any]:
    going = solver.stream(TASKS[0]) if how == "stream" else solver.run(JOBS, concurrency=2)
    next(going)
    return going


@pytest.mark.parametrize("how", ["stream", "run"])
def test_one_thing_at_a_time(lab: Lab, reference: Recorded, how: str) -> None:
    solver = lab.solver()
    early = solver.run(JOBS[:1])  # made while the solver was free
    going = suspended(solver, how)
    calls = {
        "solve": lambda: solver.solve(TASKS[1]),
        "run": lambda: solver.run(JOBS),
        "stream": lambda: solver.stream(TASKS[1]),
        "close": solver.close,
        "profile": lambda: solver.profile("x").__enter__(),
        "go on with one made before": lambda: next(early),
    }
    for name, call in calls.items():
        with pytest.raises(RrmError, match="in use"):
            call()
            pytest.fail(f"{name} was let in")
    rest = list(going)  # the one that goes on is unharmed
    if how == "stream":
        assert rest[-1]["result"].answer == lab.solver().solve(TASKS[0]).answer
    else:
        assert all(r.answer == reference.results[r.job.key].answer for r in rest)
    assert solver.solve(TASKS[1]).error is None
    solver.close()


@pytest.mark.parametrize("how", ["stream", "run"])
@pytest.mark.parametrize("end", ["close", "forget"])
def test_one_that_is_left_in_the_middle_lets_the_next_one_in(lab: Lab, how: str, end: str) -> None:
    solver = lab.solver()
    going = suspended(solver, how)
    if end == "close":
        going.close()  # type: ignore[attr-defined]
    del going
    assert idle(solver)
    assert solver.solve(TASKS[0]).error is None
    solver.run(JOBS)  # never begun: holds nobody up
    with closing(solver.run(JOBS[:1])) as results:
        assert next(results).error is None


def test_another_thread_is_refused_while_one_runs(lab: Lab) -> None:
    solver = lab.solver()
    refused: list[str] = []

    def other() -> None:
        try:
            solver.solve(TASKS[1])
        except RrmError as error:
            refused.append(str(error))

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "start" and not refused:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    assert solver.solve(TASKS[0], on_event=on_event).error is None
    assert len(refused) == 1 and "in use" in refused[0]


def test_a_closed_solver_solves_nothing(lab: Lab) -> None:
    solver = lab.solver()
    made_before = solver.run(JOBS)
    solver.close()
    solver.close()
    for call in (lambda: solver.solve(TASKS[0]), lambda: solver.run(JOBS), lambda: next(made_before)):
        with pytest.raises(RrmError, match="closed"):
            call()


def test_load_says_what_it_takes() -> None:
    for arguments, message in [
        (("embedded",), "takes a RunConfig, not 'embedded'"),
        ((RunConfig(), "a task"), "list of texts"),
        ((RunConfig(), [1]), "list of texts"),
    ]:
        with pytest.raises(RrmError, match=message):
            Solver.load(*arguments)  # type: ignore[arg-type]
