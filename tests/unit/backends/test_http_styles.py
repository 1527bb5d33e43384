"""What a prompt style asks for beyond texts, over servers: how answers begin, and grammars that are kept to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig

pytest.importorskip("openai", reason="the client of the servers: pip install 'rrm-engine[servers]'")
from over_servers import Events, graph, run, tokens
from served import served

from rrm_engine.backends.http.solver import HttpSolver
from rrm_engine.bench.table import server_line

STYLE = """
base = "embedded"
name = "opening"
description = "How answers begin is the style's."
max_depth = 1
solver_events = {solver_events}

[opens]
solver = "So, {{{{ task | truncate(12, true) }}}}: "
resume = '{{"type":"atomic",'
"""


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("styles"), "true")


def written(folder: Path, solver_events: str) -> str:
    path = folder / f"{solver_events}.toml"
    path.write_text(STYLE.format(solver_events=solver_events))
    return str(path)


def solved(solver: Any) -> tuple[Any, Events, dict[str, Any]]:
    try:
        return *run(solver), solver.describe()
    finally:
        solver.close()


def over(url: str, **settings: Any) -> tuple[Any, Events, dict[str, Any]]:
    return solved(HttpSolver.load(RunConfig(backend="openai", base_urls=(url,), request_timeout=20.0, **settings)))


def described(url: str, **settings: Any) -> dict[str, Any]:
    """What the servers can do, as the header says it."""
    solver = HttpSolver.load(RunConfig(**{"backend": "openai", "base_urls": (url,), **settings}))
    solver.close()
    return solver.describe()


def openings(events: Events) -> dict[tuple[str, str], str]:
    """How the phases of nodes began, by node and event."""
    return {(e["node"], e["event"]): e.get("opens", "") for e in events if e["event"] in ("start", "resume")}


@pytest.fixture(scope="module")
def here(style: str) -> Iterator[tuple[Any, Events, dict[str, Any]]]:
    yield solved(Solver.load(RunConfig(prompt_style=style)))


def test_answers_begin_as_the_style_says_token_for_token(here: Any, style: str) -> None:
    result, events, _ = here
    began = openings(events)
    assert began["root", "start"] == "" and began["root", "resume"] == '{"type":"atomic",'
    assert began["root.a", "start"].startswith("So, ")
    with served() as server:
        there, told, about = over(server.url, prompt_style=style)
    assert graph(there) == graph(result) and tokens(told) == tokens(events)
    assert openings(told) == began and "without_openings" not in about
    servers = there.servers  # streams that are cut tell no usage
    assert 0 < servers["cached_untold"] <= servers["attempts"]
    assert (servers["cached_tokens"] is None) == (servers["cached_untold"] == servers["attempts"])


def test_a_server_of_turns_goes_on_with_what_it_is_given(here: Any, style: str) -> None:
    with served(token_ids=False) as server:
        result, events, about = over(server.url, prompt_style=style)
        bodies = [asked.body for asked in server.habits.asked]
    assert about["continued_by"] == "turn" and "without_openings" not in about
    assert openings(events) == openings(here[1]) and graph(result) == graph(here[0])
    last = bodies[-1]
    assert last["messages"][-1] == {"role": "assistant", "content": '{"type":"atomic",'}
    assert last["continue_final_message"] is True and last["add_generation_prompt"] is False
    assert "continue_final_message" not in bodies[0]  # the planner's


def test_its_answer_goes_on_elsewhere_after_its_beginning(here: Any, style: str) -> None:
    with served(token_ids=False) as server:
        server.habits.faults.extend([("cut", 5)] * 4)
        result, _, _ = over(server.url, prompt_style=style)
        again = [
            asked.body["messages"][-1] for asked in server.habits.asked if "So, " in str(asked.body["messages"][-1])
        ]
    assert graph(result) == graph(here[0]) and result.servers["restarts"] == 4
    assert any(len(one["content"]) > len("So, 123456789012: ") for one in again)


@pytest.mark.parametrize(("continues", "why"), [(False, "continue_final_message is unknown"), (None, "does not show")])
def test_where_answers_cannot_be_begun_the_header_says_so(style: str, continues: bool | None, why: str) -> None:
    """A server that takes the field and does nothing about it would begin another answer instead."""
    with served(token_ids=False, continues=continues) as server:
        about = described(server.url, prompt_style=style)
        assert why in about["without_openings"] and "answers begin as the model likes" in server_line(about)
        assert "without_openings" not in described(server.url)  # there is nothing to begin with
        if continues is None:
            result, events, _ = over(server.url, prompt_style=style)
            assert result.status != "failed" and not any(openings(events).values())
            assert not any(asked.body["messages"][-1]["role"] == "assistant" for asked in server.habits.asked)


def test_the_responses_api_begins_no_answer(style: str) -> None:
    with served() as server:
        about = described(server.url, backend="responses", prompt_style=style)
    assert "Responses API" in about["without_openings"]


def test_phases_are_held_to_the_same_grammars(tmp_path: Path) -> None:
    """Only where a style keeps events out of them is what solvers write held to one."""
    style = written(tmp_path, "false")
    short: dict[str, Any] = {"prompt_style": style, "constrain": "on", "solver_max_tokens": 24}
    result, events, _ = solved(Solver.load(RunConfig(**short)))
    with served(grammars=True) as server:
        free = described(server.url, prompt_style=written(tmp_path, "true"), constrain="on")
        there, told, about = over(server.url, **short)
        held = ["structured_outputs" in asked.body for asked in server.habits.asked]
    assert set(free["grammar"]) == {"graph", "continuation"}
    assert set(about["grammar"]) == {"graph", "continuation", "solver"}
    assert graph(there) == graph(result) and tokens(told) == tokens(events)
    assert held[0]


@pytest.mark.parametrize("token_ids", [True, False])
def test_a_server_that_ignores_grammars_is_found_out(token_ids: bool) -> None:
    with served(token_ids=token_ids, grammars=False) as server:
        about = described(server.url, constrain="on")
        assert about["grammar"] == [] and about["without_grammar"] == "it takes a grammar and does not keep to it"
    with served(token_ids=token_ids, grammars=True) as server:
        about = described(server.url, constrain="on")
        assert about["grammar"] and "without_grammar" not in about
