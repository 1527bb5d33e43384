"""What a dry run says that nodes would be told is what they are told."""

from pathlib import Path
from typing import Any

import pytest
from lab import STYLE, TASKS, Lab, recorded

from rrm_engine.bench.cli import main
from rrm_engine.bench.dry_run import Kinds, describe
from rrm_engine.bench.tasks import Task, TaskSet
from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.protocol.style import load_style

OPENS = """
[opens]
direct = "Well:"
solve = "I solve."
"""


@pytest.mark.parametrize("context", ["task", "parent"])
@pytest.mark.parametrize("opens", ["", OPENS])
def test_every_prompt_is_that_of_a_run(lab: Lab, tmp_path: Path, context: str, opens: str) -> None:
    """All nodes that start or stay whole, token for token; with another style's words none is."""
    path, other = tmp_path / "own.toml", tmp_path / "other.toml"
    path.write_text(STYLE + opens)
    other.write_text(
        STYLE.replace("Problem: ", "Task: ")
        .replace("solve it", "do it")
        .replace("You are", "Be")
        .replace("Solve.", "Do.")
        + opens
    )
    run = recorded(lab, prompt_style=str(path), child_context=context, max_depth=2 if context == "task" else 1)
    chat, ends, seen = run.solver.backend.writing.chat, run.ends(), set()
    for event in run.events:
        kind = _kind(event, context)
        if kind is None:
            continue
        written = ends[f"{event['job']}:{event['node']}"]["token_ids"][: event["tokens"]]
        for style in (path, other):
            kinds = Kinds(
                run.solver.resolved, load_style(style), chat, TASKS[int(event["job"][1])], event.get("task", "")
            )
            (ids,) = [told.ids for told in kinds.all() if told.what == kind]
            assert (written[-len(ids) :] == ids) == (style is path), (kind, event["node"])
        seen.add(kind)
    assert len(seen) >= 3


def _kind(event: dict[str, Any], context: str) -> str | None:
    """What a dry run calls this; None for nodes that are given results, and forks, which are told their id, but c1."""
    if event["event"] == "resume" and event["phase"] == "solver":
        return "node that stays whole, appended"
    if event["event"] != "start" or "=" in event["prompt"]:
        return None
    if event["node"].startswith("root!"):
        return "direct solve"
    if event["node"] == "root":
        return "root, planning"
    if context == "parent":
        return "child, after its parent's context" if event["node"] == "root.c1" else None
    return "child that may split" if event["phase"] == "graph" else "child"


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "=== root, planning: " in printed and "then at most 600" in printed and "Zeno has 702 frogs" in printed


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run", "--resume", str(tmp_path)])
    assert caught.value.code == 2 and "leave --resume out" in capsys.readouterr().err
    tasks = TaskSet("t", "t", (Task("a", "Add.", "1"),))
    with pytest.raises(RrmError, match="there is no prompt style 'x'"):
        list(describe(RunConfig(prompt_style="x"), tasks))
    with pytest.raises(RrmError, match="there is no such directory"):
        list(describe(RunConfig(model=str(tmp_path / "none")), tasks))
