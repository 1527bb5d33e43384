"""Whole recursive runs that are closed, interrupted or fail: every block comes back and what follows is unharmed."""

import copy
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from lab import JOBS, TASKS, VOCABULARY, Lab, Recorded, engine_of, idle

from rrm_engine.solver.result import Job


def test_closing_a_stream_in_the_middle_frees_everything(lab: Lab, reference: Recorded) -> None:
    solver = lab.solver()
    for task in TASKS:
        stream = solver.stream(task)
        if any(event.get("node", "").count(".") == 2 for event in stream):  # a grandchild has started
            break
    assert engine_of(solver).pool.num_used > 0
    stream.close()  # type: ignore[attr-defined]
    assert idle(solver)
    again = Recorded(solver).run(JOBS, 4)
    assert again.rows() == reference.rows()


def test_closing_a_run_cancels_the_other_jobs(lab: Lab) -> None:
    solver = lab.solver()
    events: list[dict[str, Any]] = []
    results = solver.run(JOBS, events.append, concurrency=4)
    next(results)
    assert not idle(solver)
    results.close()
    assert idle(solver)
    assert sum(e["event"] == "finish" for e in events) == 4
    assert any(e["event"] == "cancelled" and e["reason"] == "cancelled" for e in events)


@pytest.mark.parametrize("kind", ["start", "resume", "concluded", "event", "pause"])
def test_an_interrupt_at_any_event_frees_everything(lab: Lab, kind: str) -> None:
    """As by Ctrl-C or a full disk while events are written."""
    solver = lab.solver()
    seen = Counter[str]()

    def interrupt(event: dict[str, Any]) -> None:
        seen[event["event"]] += 1
        if event["event"] == kind and seen[kind] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(solver.run(JOBS, interrupt, concurrency=4))
    assert idle(solver)


def test_an_error_in_a_step_fails_the_jobs_in_flight_only(
    lab: Lab, reference: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = lab.solver()
    runner, calls = engine_of(solver).runner, 0
    run = runner.run

    def failing(*step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise RuntimeError("the device is gone")
        return run(*step)

    monkeypatch.setattr(runner, "run", failing)
    events: list[dict[str, Any]] = []
    results = {r.job.id: r for r in solver.run(JOBS, events.append, concurrency=2)}
    broken = {k: r for k, r in results.items() if r.error}
    assert len(broken) == 2
    assert {str(r.status) for r in broken.values()} == {"failed"}
    assert all(re.fullmatch(r"RuntimeError in a step of .+: the device is gone", r.error) for r in broken.values())  # type: ignore[arg-type]
    for job in JOBS:
        if job.id not in broken:
            assert results[job.id].answer == reference.results[job.key].answer
    assert idle(solver)
    again = Recorded(solver).run(JOBS, 4)
    assert again.rows() == reference.rows()


def test_a_prompt_that_does_not_fit_gets_an_error_with_the_numbers(lab: Lab, reference: Recorded) -> None:
    solver = lab.solver()
    long = Job("long", "very " * 500)
    direct = Job("long", "very " * 500, "direct")
    results = {r.job.key: r for r in solver.run([long, JOBS[0], direct], concurrency=2)}
    for job in (long, direct):
        result = results[job.key]
        assert result.status in ("failed", "invalid")
        assert result.error is not None
        assert re.search(r"has \d{4} tokens and a sequence may have 800: raise --max-sequence-tokens", result.error)
    assert results[JOBS[0].key].answer == reference.results[JOBS[0].key].answer
    assert idle(solver)


@pytest.mark.parametrize("mode", ["direct", "rrm"])
def test_a_token_the_model_does_not_know_fails_its_job_alone(lab: Lab, mode: str) -> None:
    tokenizer = copy.deepcopy(lab.model.tokenizer)
    tokenizer.add_tokens(["zebra", "yak", "gnu"])
    assert tokenizer.convert_tokens_to_ids("gnu") == VOCABULARY
    solver = Lab(lab.plain, replace(lab.model, tokenizer=tokenizer), lab.style).solver()
    jobs = [Job("bad", "Count a gnu.", mode), Job("good", TASKS[0], mode)]
    results = {result.job.id: result for result in solver.run(jobs, concurrency=2)}
    assert f"token {VOCABULARY} and the model's vocabulary has {VOCABULARY}" in (results["bad"].error or "")
    assert results["bad"].status == "failed" and not results["bad"].cut
    assert results["good"].error is None
    (alone,) = lab.solver().run([jobs[1]])
    assert results["good"].answer == alone.answer
    assert idle(solver)
