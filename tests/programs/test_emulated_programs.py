"""Whole programs on emulated GPUs, from the loading of the weights to what they write."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_task import written

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import emulated

from rrm_engine.bench.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")
ROOT = Path(__file__).parents[2]
EVERY = ["--wait-policy", "auto"]  # measures what copies cost when it starts


def transcripts(run: Path) -> dict[str, list[int]]:
    events = map(json.loads, (run / "trace.jsonl").read_text().splitlines())
    return {event["node"]: event["token_ids"] for event in events if "token_ids" in event}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("tasks") / "tasks.jsonl")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, tasks: str) -> dict[str, list[int]]:
    run = tmp_path_factory.mktemp("run")
    assert main([tasks, "--modes", "rrm", "--out", str(run)]) == 0
    return transcripts(run)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, ["--device", "cuda", *EVERY]),
        (4, ["--devices", "cuda:0,cuda:1,cuda:2,cuda:3", "--placement", "pipeline"]),
        (2, ["--devices", "cuda:0,cuda:1", "--placement", "replicate", "--eager", "on"]),
    ],
)
def test_the_bench(
    devices: int,
    options: list[str],
    tasks: str,
    on_cpu: dict[str, list[int]],
    fast: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights go straight to their devices, in this thread: what other threads do is not emulated."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with emulated(devices, monkeypatch) as cuda:
        assert main([tasks, "--modes", "rrm", "--out", str(tmp_path), *options]) == 0
        assert cuda.launches > 1000
    assert transcripts(tmp_path) == on_cpu


def test_the_gpu_suite(fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way on CUDA; transformers' continuous batching runs in threads of its own, so the peers are left out."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    suite: Any = importlib.import_module("gpu_suite")
    chosen = "kernels,logits,decode,moves,graphs,pipeline"
    with emulated(1, monkeypatch):
        assert suite.main(["--tiny", "--device", "cuda:0", "--out", str(tmp_path), "--only", chosen]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    sections = result["sections"]
    assert result["device"] == "emulated" and ",".join(sections) == chosen
    assert all(row["ok"] for row in sections["kernels"]["rows"])
    assert all(row["agreement"] == 1 for row in sections["logits"]["rows"] if row["dtype"] == "float32")
    replayed = {row["host_work"]: row["graphs"] for row in sections["decode"]["rows"] if "host_work" in row}
    assert replayed == {"lookahead": True, "graphs": True, "eager": False}
