"""The engine on emulated GPUs: rules of CUDA that a fast machine would forgive are kept, and tokens are right."""

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from graph_scripts import crowded, live_graph, mistakes, policy_engine, short_graph, waiting_graph
from lab import JOBS, Lab, recorded
from oracle import plain_model
from settled import IN_A_GRAPH, Settled

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation
from launched import engine_on, on_cuda

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.cuda_graphs import CudaGraphs
from rrm_engine.engine.replicas import Replicas
from rrm_engine.loading.prepare import prepare_model
from rrm_engine.models.lean import LeanForward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SMALL = [JOBS[0], JOBS[2]]


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("eager", [True, False])
def test_one_device(cuda: Emulation, fast: None, eager: bool, lookahead: bool) -> None:
    plain = plain_model("qwen3")
    engine = engine_on(on_cuda(plain), eager, lookahead=lookahead)
    assert mistakes(plain, live_graph(engine)) == {}
    assert engine.runner.static is not None
    (share,) = engine.runner.static.shares
    assert isinstance(share.recorder, CudaGraphs)
    assert eager or share.replays > 3 * share.captures > 0


def test_triton_kernels_are_given_what_is_on_their_device(cuda: Emulation) -> None:
    """On the second device, with the real kernels in Triton's interpreter."""
    plain = plain_model("qwen3", num_hidden_layers=1)
    engine = engine_on(on_cuda(plain, first=1), lookahead=True)
    assert mistakes(plain, short_graph(engine)) == {}


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("devices", [2, 4])
def test_pipeline(cuda: Emulation, fast: None, devices: int, eager: bool, lookahead: bool) -> None:
    plain = plain_model("qwen3", num_hidden_layers=4)
    model = on_cuda(plain, devices)
    assert isinstance(model.forward, LeanForward) and len(model.forward.stages) == devices
    engine = engine_on(model, eager, lookahead=lookahead, stages=devices)
    assert mistakes(plain, live_graph(engine)) == {}


@pytest.mark.parametrize("devices", [1, 2])
def test_models_that_keep_their_modules(cuda: Emulation, fast: None, devices: int) -> None:
    plain = plain_model("gemma2")
    model = on_cuda(plain, devices)
    assert not isinstance(model.forward, LeanForward)
    engine = engine_on(model, stages=devices, lookahead=True)
    assert mistakes(plain, live_graph(engine)) == {}


def test_replicas(cuda: Emulation, fast: None) -> None:
    plain = plain_model("qwen3")
    engine: Any = Replicas([engine_on(on_cuda(plain, first=i), lookahead=True) for i in range(2)])
    assert mistakes(plain, live_graph(engine)) == {}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("policy", get_args(WaitPolicy))
def test_every_wait_policy(cuda: Emulation, fast: None, policy: Any, devices: int) -> None:
    plain = plain_model("qwen3")
    model = on_cuda(plain, devices)
    for blocks in (200, 30):
        engine = policy_engine(model, policy, blocks, max_sequence_tokens=110, lookahead=True, stages=devices)
        assert mistakes(plain, waiting_graph(engine)) == {}


@pytest.mark.parametrize("devices", [1, 2])
def test_preemption_and_cancellation(cuda: Emulation, fast: None, devices: int) -> None:
    plain = plain_model("qwen3")
    changes: dict[str, Any] = {"blocks": 22, "max_sequence_tokens": 88, "lookahead": True, "stages": devices}
    assert mistakes(plain, crowded(engine_on(on_cuda(plain, devices), **changes))) == {}


@pytest.mark.parametrize("devices", [1, 2])
def test_generation_settings(cuda: Emulation, fast: None, devices: int) -> None:
    """Logits processors read on the device what was sampled there, while the host has not read it yet."""
    plain = plain_model("qwen3")
    engine = engine_on(on_cuda(plain, devices), lookahead=True, stages=devices)
    listed = {"sequence_bias", "bad_words_ids"}  # index a tensor with a Python list, which is not emulated
    settled = Settled(engine, [settings for settings in IN_A_GRAPH if not listed & settings.keys()])
    assert settled.unlike_generate(plain, live_graph(engine)) == []


@pytest.mark.parametrize(("devices", "changes"), [(1, {}), (2, {}), (1, {"join": "splice"})])
def test_whole_runs(cuda: Emulation, fast: None, lab: Lab, devices: int, changes: dict[str, Any]) -> None:
    """Under a grammar and with noise, which need tokens on the host and logits that are kept for them."""
    layers = [FIRST, SECOND if devices == 2 else FIRST]
    plain, tokenizer = copy.deepcopy(lab.plain), lab.model.tokenizer
    model = replace(prepare_model(plain, tokenizer, "tiny", FIRST, "auto", layers), stages=devices)
    there = recorded(replace(lab, model=model), SMALL, **changes)
    assert there.solver.resolved.lookahead == ("off" if changes else "on")
    assert there.rows() == recorded(lab, SMALL, **changes).rows()
