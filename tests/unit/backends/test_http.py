"""The same graphs over servers: real ones over HTTP, with the packaged model, that break in every way there is."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.solver.result import JobResult

pytest.importorskip("openai", reason="the client of the servers: pip install 'rrm-engine[servers]'")
from over_servers import JOB, Events, graph, over, run, tokens
from served import served
from short_task import TASK

from rrm_engine.backends.http.pool import Gate
from rrm_engine.backends.http.solver import HttpSolver


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[JobResult, Events]]:
    """The engine in this process."""
    solver = Solver.load(RunConfig())
    yield run(solver)
    solver.close()


@pytest.mark.parametrize("per_chunk", [1, 7])
def test_token_exact(here: Any, per_chunk: int) -> None:
    pace = 0.002 if per_chunk == 1 else 0.03  # few chunks must leave time to hang up before the last one
    with served(per_chunk=per_chunk, pace=pace) as server:
        result, events = over(server)
    assert graph(result) == graph(here[0]) and result.nodes > 2 and result.resumes == 1
    assert tokens(events) == tokens(here[1])
    assert result.critical_path_tokens == here[0].critical_path_tokens
    assert result.servers["continued_by"] == "tokens"
    assert result.servers["replicas"] == {node: [server.url] for node in result.finish_reasons}
    assert result.servers["attempts"] == len(server.habits.asked) == result.nodes + 1
    resumed = max(server.habits.asked, key=lambda asked: len(asked.body["prompt"])).body["prompt"]
    assert resumed == tokens(here[1])["root"][0][: len(resumed)]  # the whole context, token by token
    ended = [asked for asked in server.habits.asked if asked.hung_up]
    assert ended  # a node that awaits, or has answered, is written no further


def test_children_start_while_their_parent_writes() -> None:
    with served() as server:
        _, events = over(server)
    happened = [(e["event"], e["node"]) for e in events]
    assert happened.index(("start", "root.a")) < happened.index(("pause", "root"))


def test_work_ends_where_nobody_listens() -> None:
    with served(pace=0.02) as server:
        solver = HttpSolver.load(RunConfig(backend="openai", base_urls=(server.url,)))
        stream: Any = solver.stream(TASK, "direct")
        while next(stream)["event"] != "first_token":
            pass
        stream.close()
        wait_until(lambda: server.habits.asked[0].hung_up)
        assert server.habits.asked[0].sent < 60
        solver.close()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    "faults",
    [
        [429, 500, 503],
        [("cut", 0), ("malformed", 0), ("shape", 0)],
        [("error", 0), *((kind, 9) for kind in ("cut", "malformed", "shape", "error"))],
    ],
    ids=["statuses", "before the first token", "in the middle"],
)
def test_faults_cost_nothing(here: Any, faults: list[Any]) -> None:
    """The root's first streams break one after the other; what had come by then is not asked for again."""
    with served() as server:
        server.habits.faults.extend(faults)
        result, events = over(server)
    assert graph(result) == graph(here[0]) and tokens(events) == tokens(here[1])
    assert result.servers["attempts"] == result.nodes + 1 + len(faults)
    assert result.servers["restarts"] == sum(isinstance(one, tuple) and one[1] > 0 for one in faults)
    contexts = [ids for ids, _ in tokens(events).values()]
    prompts = [asked.body["prompt"] for asked in server.habits.asked]
    assert all(any(ids[: len(prompt)] == prompt for ids in contexts) for prompt in prompts)


def test_a_hanging_server_is_left(here: Any) -> None:
    with served() as first, served() as second:
        first.habits.faults.append(("hang", 5))
        result, events = over(first, second, request_timeout=1.0)
    assert graph(result) == graph(here[0]) and tokens(events) == tokens(here[1])
    assert result.servers["restarts"] == 1
    assert result.servers["replicas"]["root"] == [first.url, second.url]


def test_what_stays_broken_is_an_error_of_the_row() -> None:
    with served() as server:
        server.habits.faults.extend([500] * 9)
        result, events = over(server)
        assert result.status == "failed" and "root: " in str(result.error) and "500" in str(result.error)
        assert result.servers["attempts"] == 4 and result.traceback is None
        assert not server.habits.asked[4:]
    assert events[-1]["event"] == "finish"


@pytest.mark.parametrize("status", [400, 404])
def test_what_is_refused_is_not_asked_again(status: int) -> None:
    with served() as server:
        server.habits.faults.append(status)
        result, _ = over(server)
    assert result.status == "failed" and f"refuses with {status}: as told" in str(result.error)
    assert result.servers["attempts"] == 1


def test_a_context_that_is_too_long(here: Any) -> None:
    with served(longest=len(tokens(here[1])["root"][0]) - 20) as server:
        result, _ = over(server)
        assert result.cut.get("max_sequence_tokens")
    with served(longest=40) as server:
        result, _ = over(server)
        assert result.status == "invalid" and "the servers take 40" in str(result.error)
        assert not server.habits.asked


def test_a_killed_replica_costs_nothing(here: Any) -> None:
    """Two servers of their own, one of which is killed in the middle of its stream, by its process id."""
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
    program = Path(sys.modules["served"].__file__ or "")
    both = [subprocess.Popen([sys.executable, str(program), str(port), "0.01"]) for port in ports]
    try:
        wait_until(lambda: all(answers(port) for port in ports), 120)
        solver = HttpSolver.load(RunConfig(backend="openai", base_urls=tuple(urls)))
        events: Events = []

        def kill_one(event: dict[str, Any]) -> None:
            events.append(event)
            if (event["event"], event["node"]) == ("first_token", "root.b"):
                os.kill(both[0].pid, signal.SIGKILL)

        (result,) = solver.run([JOB], kill_one)
        solver.close()
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert graph(result) == graph(here[0]) and tokens(events) == tokens(here[1])
    assert result.servers["restarts"] >= 1
    replicas = result.servers["replicas"]
    assert replicas["root"] == urls  # begun on the first, gone on with on the second
    assert any(one[0] == urls[1] for one in replicas.values())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_replica_is_left() -> None:
    with served() as server:
        solver = HttpSolver.load(RunConfig(backend="openai", base_urls=(server.url,)))
    result, _ = run(solver)
    solver.close()
    assert result.status == "failed" and "no replica answers any more" in str(result.error)


def test_least_in_flight_and_least_that_waits() -> None:
    with served(pace=0.01) as first, served(pace=0.01) as second:
        result, _ = over(first, second)
        assert len(first.habits.asked) >= 2 and len(second.habits.asked) >= 1
        home = result.servers["replicas"]["root"]
        assert len(home) == 1  # it went on where it was
        assert {one for many in result.servers["replicas"].values() for one in many} == {first.url, second.url}


def test_a_queue_is_seen_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    import rrm_engine.backends.http.pool as pool

    monkeypatch.setattr(pool, "WATCH_S", 0.02)
    with served(pace=0.02, waiting=50) as first, served(waiting=0) as second:
        result, _ = over(first, second)
    used = result.servers["replicas"]
    assert used["root"] == [first.url] and all(used[node] == [second.url] for node in used if node != "root")


def test_places_are_kept_and_waiting_is_told() -> None:
    with served(pace=0.005) as server:
        result, events = over(server, max_concurrency=1)
    waits = {e["node"]: e["queued_s"] for e in events if e["event"] == "first_token"}
    assert result.status == "graph" and waits["root"] < waits["root.a"] and result.parallel_s > 0
    assert result.servers["queued_s"] >= waits["root.a"] > 0


def test_a_place_is_not_lost_with_a_request_that_was_just_let_in() -> None:
    async def cancelled() -> int:
        gate = Gate(1)
        await gate.enter(0)
        waiting = asyncio.create_task(gate.enter(0))
        await asyncio.sleep(0)
        gate.leave()  # lets it in
        waiting.cancel()
        await asyncio.wait([waiting])
        return gate.free

    assert asyncio.run(cancelled()) == 1


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", ""])
def test_turns(here: Any, field: str) -> None:
    """Without token ids the conversation is sent; thinking that comes apart is no part of the text, nor of the turn."""
    with served(token_ids=False, reasoning=field) as server:
        result, events = over(server)
    assert result.servers["continued_by"] == "turn" and graph(result) == graph(here[0])
    assert result.total_tokens > 100 and not any(ids for ids, _ in tokens(events).values())
    last = server.habits.asked[-1].body["messages"]
    assert [one["role"] for one in last] == ["system", "user", "assistant", "user"]
    assert last[2]["content"].startswith('{"type"') and "Let me see" not in last[2]["content"]
    assert all(asked.body["chat_template_kwargs"]["enable_thinking"] is False for asked in server.habits.asked)


def test_turns_go_on_elsewhere_in_the_middle(here: Any) -> None:
    with served(token_ids=False) as server:
        server.habits.faults.append(("cut", 9))
        result, _ = over(server)
        assert graph(result) == graph(here[0]) and result.servers["restarts"] == 1
        assert server.habits.asked[1].body["continue_final_message"] is True
    with served(token_ids=False, continues=False) as server:
        server.habits.faults.append(("cut", 9))
        result, _ = over(server)
        assert result.status == "failed" and "cannot go on in the middle of an answer" in str(result.error)


def test_fields_that_a_server_does_not_know() -> None:
    strict = ("chat_template_kwargs", "seed", "stream_options", "min_p")
    with served(token_ids=False, unknown=strict) as server:
        result, _ = over(server, temperature=0.0)
        assert result.status == "graph"
        assert not any(name in asked.body for asked in server.habits.asked for name in strict)
        with pytest.raises(RrmError, match=r"--min-p: .* unknown: .*leave the flag out"):
            over(server, min_p=0.1)
        with pytest.raises(RrmError, match="--graph-thinking: "):
            over(server, graph_thinking=False)


@pytest.mark.parametrize("field", ["reasoning", ""])
def test_responses(here: Any, field: str) -> None:
    with served(reasoning=field) as server:
        result, _ = over(server, backend="responses")
    assert graph(result) == graph(here[0]) and result.servers["continued_by"] == "turn"
    assert {asked.path for asked in server.habits.asked} == {"/v1/responses"}
    assert [one["role"] for one in server.habits.asked[-1].body["input"]] == ["system", "user", "assistant", "user"]


def test_responses_break() -> None:
    with served() as server:
        server.habits.faults.extend([503, ("cut", 9)])
        result, _ = over(server, backend="responses")
    assert result.status == "failed" and "cannot go on in the middle of an answer" in str(result.error)
    assert result.servers["attempts"] == 2


def test_keys_stay_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrm_engine.bench.cli import main

    key = "sk-very-secret-0123"
    monkeypatch.setenv("MY_KEY", key)
    with served(key=key) as server:
        base = ["--backend", "openai", "--base-urls", server.url, "--limit", "1", "--quiet"]
        assert main([*base, "--api-key-env", "MY_KEY", "--out", str(tmp_path / "run"), "--modes", "rrm"]) == 0
        assert {asked.key for asked in server.habits.asked} == {key}
        server.habits.faults.append(401)
        server.habits.key = ""
        assert main([*base, "--api-key-env", "MY_KEY", "--out", str(tmp_path / "failed"), "--modes", "rrm"]) == 1
        monkeypatch.setenv("OTHER", "wrong")
        server.habits.key = key
        assert main([*base, "--api-key-env", "OTHER", "--out", str(tmp_path / "x")]) == 2
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"MY_KEY" in written and key.encode() not in written
    row = json.loads((tmp_path / "run" / "rows.jsonl").read_text())
    assert all("expected" not in asked.body for asked in server.habits.asked) and row["expected"]
    assert "max_nodes" in row["settings"] and not {"kv_blocks", "wait_policy", "join"} & row["settings"].keys()


def test_what_cannot_be_asked() -> None:
    with pytest.raises(RrmError, match="no server answers there"):
        over(f"http://127.0.0.1:{free_port()}/v1")
    with served() as server, pytest.raises(RrmError, match="--api-key-env NOT_THERE: there is no such"):
        over(server, api_key_env="NOT_THERE")
    with served(token_ids=False) as server, pytest.raises(RrmError, match="does not return token ids"):
        over(server, continue_by="tokens")
    with served() as server, pytest.raises(RrmError, match="give --tokenizer"):
        over(server, tokenizer="/nowhere/at/all")
