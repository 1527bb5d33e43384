"""What a style decides, in the tokens: solver children that are direct solves, answers whose beginning is given."""

from pathlib import Path
from typing import Any

import pytest
from lab import JOBS, STYLE, TASKS, Lab, Recorded, engine_of, recorded, wrong_tokens

from rrm_engine.protocol.events import Malformed
from rrm_engine.protocol.grammar import event_grammar
from rrm_engine.protocol.parser import EventParser
from rrm_engine.solver.result import Job

OPENS = """
[opens]
solve = "I solve."
fork = "My part {{ task }}:"
resume = "{{ rule | with_results(conclusions) }} ="
"""


def style(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


def as_direct() -> str:
    """The tests' style without anything of its own for solvers."""
    lines = [line for line in STYLE.splitlines() if not line.startswith("solver =")]
    return "\n".join(lines).replace(", solver = false", "").replace(", solver = 24", "")


@pytest.mark.parametrize("max_depth", [0, 1])
def test_a_node_that_cannot_split_is_a_direct_solve(lab: Lab, tmp_path: Path, max_depth: int) -> None:
    """Token for token, whoever asks for its task; with a text of its own for solvers it is not."""
    for text, same in ((as_direct(), True), (STYLE, False)):
        settings: dict[str, Any] = {"prompt_style": style(tmp_path, text), "temperature": 0.0, "max_depth": max_depth}
        graphs = recorded(lab, **settings)
        ends = graphs.ends()
        solved = [
            (e["task"], ends[f"{e['job']}:{e['node']}"]["token_ids"])
            for e in graphs.events
            if e["event"] == "start" and e["phase"] == "solver" and not e["after"]
        ]
        alone = recorded(lab, [Job(str(i), task, "direct") for i, (task, _) in enumerate(solved)], **settings).ends()
        equal = [tokens == alone[f"{i}/direct/0:root"]["token_ids"] for i, (_, tokens) in enumerate(solved)]
        assert equal and (all(equal) if same else not any(equal))


def test_a_task_that_stays_whole_is_a_direct_solve(lab: Lab, tmp_path: Path) -> None:
    """Token for token; where the planner goes on itself it is not."""
    for line, same in (("solves_afresh = true", True), ("", False)):
        own = style(tmp_path, f"{line}\n{as_direct()}")
        settings: dict[str, Any] = {"prompt_style": own, "temperature": 0.0, "max_sibling_width": 1}  # none can split
        direct = recorded(lab, [Job(job.id, job.task, "direct") for job in JOBS], **settings).ends()
        whole = recorded(lab, **settings)
        ends = whole.ends()
        node = "root!direct" if same else "root"
        for job in JOBS:
            alone, solved = direct[f"{job.id}/direct/0:root"], ends[f"{job.key}:{node}"]
            assert (_last_phase(solved) == _last_phase(alone)) == same
            assert whole.results[job.key].status == "atomic" or not same


def _last_phase(end: dict[str, Any]) -> list[int]:
    start, stop = end["sampled"][-1]
    return list(end["token_ids"][start:stop])


def test_direct_settings_hold_for_solver_children(lab: Lab, tmp_path: Path) -> None:
    own = style(tmp_path, as_direct())
    assert lab.solver(prompt_style=own, direct_max_tokens=17).resolved.solver_max_tokens == 17
    both = lab.solver(prompt_style=own, direct_max_tokens=17, solver_max_tokens=9).resolved
    assert (both.direct_max_tokens, both.solver_max_tokens) == (17, 9)
    assert lab.solver(direct_max_tokens=17).resolved.solver_max_tokens == 24


def test_depth_and_context_are_the_styles_unless_a_flag_says_so(lab: Lab, tmp_path: Path) -> None:
    deep = style(tmp_path, f'max_depth = 3\nchild_context = "parent"\n{STYLE}')
    found = lab.solver(prompt_style=deep, max_depth=None).resolved
    assert (found.max_depth, found.child_context) == (3, "parent")
    asked = lab.solver(prompt_style=deep, max_depth=0, child_context="task").resolved
    assert (asked.max_depth, asked.child_context) == (0, "task")
    assert (lab.solver(max_depth=None).resolved.max_depth, lab.solver().resolved.child_context) == (1, "task")


@pytest.fixture(scope="module")
def opened(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    own = style(tmp_path_factory.mktemp("opens"), f"max_task_chars = 7\nsolver_events = false\n{STYLE}{OPENS}")
    return recorded(lab, prompt_style=own, child_context="parent", seed=63)


def test_what_opens_an_answer_is_given_and_not_sampled(lab: Lab, opened: Recorded) -> None:
    assert wrong_tokens(lab.plain, opened) == {}
    tokenizer, ends = lab.model.tokenizer, opened.ends()
    begins: dict[str, list[dict[str, Any]]] = {}
    for e in opened.events:
        if e["event"] in ("start", "resume"):
            begins.setdefault(f"{e['job']}:{e['node']}", []).append(e)
    seen = set()
    for key, end in ends.items():
        for begin, (start, _) in zip(begins[key], end["sampled"], strict=True):
            assert tokenizer.decode(end["token_ids"][:start]).endswith(begin["opens"])
            assert bool(begin["opens"]) == (begin["phase"] not in ("graph", "direct"))
            seen.add((begin["event"], begin["phase"], begin["opens"][:8]))
    assert {kind for kind, _, _ in seen} == {"start", "resume"} and any("My part" in opens for *_, opens in seen)


def test_conclusions_hold_what_opened_them(opened: Recorded) -> None:
    texts = [e["answer"] for e in opened.events if e["event"] == "concluded" and e["ok"]]
    assert any(text.startswith(("My part", "I solve.")) for text in texts)


def test_tasks_are_as_short_as_the_style_wants(opened: Recorded, forked_reference: Recorded) -> None:
    def longest(run: Recorded) -> int:
        return max(len(e["task"]) for e in run.events if e["event"] == "start" and "." in e["node"])

    assert longest(opened) <= 7 < longest(forked_reference)
    phases = [e["grammar"] for e in opened.events if e["event"] in ("start", "resume") and e["grammar"]]
    assert {(grammar["max_task_chars"], grammar["counts_parts"]) for grammar in phases} == {(7, False)}


def test_a_plan_says_how_many_parts_it_has(lab: Lab, tmp_path: Path) -> None:
    run = recorded(lab, prompt_style=style(tmp_path, f"counts_parts = true\n{STYLE}"), planner_max_tokens=240)
    tokenizer, ends = lab.model.tokenizer, run.ends()
    seen = set()
    for e in run.events:
        if e["event"] == "start" and e["phase"] == "graph" and e["grammar"]["may_split"]:
            assert e["grammar"]["counts_parts"]
            end = ends[f"{e['job']}:{e['node']}"]
            first, last = end["sampled"][0]
            head, plan = tokenizer.decode(end["token_ids"][first:last]).strip().split("\n", 1)
            if '"await"' in plan or '"atomic"' in plan:  # not cut by a limit
                children = plan.count('{"type":"child"')
                assert head == f"Parts: {max(1, children)}"
                seen.add(head)
    assert "Parts: 1" in seen and len(seen) > 1


def test_a_node_that_read_events_writes_none_when_it_solves(opened: Recorded) -> None:
    kinds = [e for e in opened.events if e["event"] in ("start", "resume", "event")]
    phase: dict[str, str] = {}
    for e in kinds:
        key = f"{e['job']}:{e['node']}"
        if e["event"] != "event":
            phase[key] = e["phase"]
        else:
            assert phase[key] != "solver"
    assert "solver" in phase.values()


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Let x = \\frac{1}{2} and {a, b}.\n{{x}}\nFINAL: 3", True),
        ('{"type":"atomic"}', False),
        ('so {  \n "type" : "child"', False),
        ("{{'type':", False),
        ("{ “type”:", False),
    ],
)
def test_the_grammar_of_a_solver_has_no_objects(lab: Lab, text: str, allowed: bool) -> None:
    grammars = engine_of(lab.solver()), lab.model.tokenizer
    from rrm_engine.protocol.grammar import EventGrammars

    matcher = EventGrammars(grammars[1], eos_ids=lab.model.eos_ids).matcher(
        event_grammar(2, may_split=True, phase="solver")
    )
    try:
        for token in lab.model.tokenizer.encode(text, add_special_tokens=False):
            matcher.accept(token)
        read = True
    except ValueError:
        read = False
    assert read == allowed
    found = EventParser().feed(text + "}")
    assert allowed <= (not [one for one in found if not isinstance(one, Malformed)])


def test_a_runs_instructions_are_prefilled_once(lab: Lab) -> None:
    """Nodes that plan share the blocks of their system text, task after task."""
    long = STYLE.replace("Split or solve. Write events.", "Split or solve. " + "Write events. " * 40)
    solver_style = lab.style.with_name("long.toml")
    solver_style.write_text(long)
    run = recorded(lab, concurrency=1, prompt_style=str(solver_style), max_depth=1, max_sequence_tokens=1600)
    prompts = [e["prompt_tokens"] for e in run.events if e["event"] == "start" and e["node"] == "root"]
    rows = list(run.results.values())
    assert len(rows) == len(TASKS) and min(prompts) > 100
    assert rows[0].reused == 0 or rows[0].reused < rows[1].reused
    assert all(row.reused >= 100 for row in rows[1:])
