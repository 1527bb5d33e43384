"""The engine on emulated GPUs: rules of CUDA that a fast machine would forgive are kept, and tokens are right.

The devices and the models on them are the same for all tests of this file, as they are in a process.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from graph_scripts import live_graph, mistakes, short_graph
from lab import JOBS, Lab, recorded
from matrix import CROWDED, SHORT, Matrix, Row, rows
from oracle import plain_model
from settled import IN_A_GRAPH, Settled

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation, emulated
from launched import engine_on, launch_references, on_cuda

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.cuda_graphs import CudaGraphs
from rrm_engine.engine.replicas import Replicas
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.models.lean import LeanForward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SMALL = JOBS[:2]
BOTH = (False, True)
ROWS = [
    row
    for n in (1, 2, 4)
    for row in (
        *rows(Row(form="captured", devices=n, stages=n), lookahead=BOTH),
        *rows(Row(short_graph, form="eager", devices=n, stages=n), lookahead=BOTH),
    )
]
for n in (1, 2):
    on: dict[str, Any] = {"devices": n, "stages": n, "lookahead": True}
    ROWS += [Row(family="gemma2", **on), replace(CROWDED, form="captured", **on)]
    ROWS += rows(replace(SHORT, form="captured", **on), policy=get_args(WaitPolicy))


@pytest.fixture(scope="module")
def machine() -> Iterator[Emulation]:
    """Four GPUs."""
    patch = pytest.MonkeyPatch()
    with emulated(4, patch) as emulation:
        yield emulation


@pytest.fixture(scope="module")
def model(machine: Emulation) -> Callable[..., LoadedModel]:
    """``(plain, devices)`` to the model there, with kernels that are computed faster than in Triton's interpreter."""

    def loaded(plain: Any, devices: int = 1, first: int = 0) -> LoadedModel:
        with pytest.MonkeyPatch.context() as patch:
            launch_references(patch)
            return on_cuda(plain, devices, first)

    return cache(loaded)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return Matrix()


@pytest.fixture(autouse=True)
def no_errors(machine: Emulation) -> Iterator[None]:
    """What went wrong where nothing could be raised belongs to the test before."""
    yield
    gc.collect()
    for i in range(machine.devices):
        machine.synchronize(i)
    errors, machine.errors = machine.errors, []
    assert not errors, errors


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tokens_equal_plain_transformers(row: Row, model: Callable[..., LoadedModel], matrix: Matrix) -> None:
    there = model(matrix.plain(row.family, row.devices), row.devices)
    lived = matrix.live(row, there)
    assert not lived.wrong
    assert isinstance(there.forward, LeanForward) == (row.family == "qwen3")
    if row.form == "captured":
        assert len(lived.shares) == row.devices
        assert all(isinstance(share.recorder, CudaGraphs) for share in lived.shares)
        assert all(share.replays > share.captures > 0 for share in lived.shares)
    else:
        assert not any(share.captures for share in lived.shares)


def test_triton_kernels_are_given_what_is_on_their_device(machine: Emulation) -> None:
    """On the second device, with the real kernels in Triton's interpreter."""
    plain = plain_model("qwen3", num_hidden_layers=1)
    engine = engine_on(on_cuda(plain, first=1), lookahead=True)
    assert mistakes(plain, short_graph(engine)) == {}


def test_replicas(model: Callable[..., LoadedModel], matrix: Matrix) -> None:
    plain = matrix.plain("qwen3", 1)
    engine: Any = Replicas([engine_on(model(plain, 1, i), lookahead=True) for i in range(2)])
    assert mistakes(plain, live_graph(engine)) == {}


@pytest.mark.parametrize("devices", [1, 2])
def test_generation_settings(model: Callable[..., LoadedModel], matrix: Matrix, devices: int) -> None:
    """Logits processors read on the device what was sampled there, while the host has not read it yet."""
    plain = matrix.plain("qwen3", 1)
    engine = engine_on(model(plain, devices), lookahead=True, stages=devices)
    listed = {"sequence_bias", "bad_words_ids"}  # index a tensor with a Python list, which is not emulated
    settled = Settled(engine, [settings for settings in IN_A_GRAPH if not listed & settings.keys()])
    assert settled.unlike_generate(plain, live_graph(engine)) == []


@pytest.mark.parametrize(("devices", "changes"), [(1, {}), (2, {}), (1, {"join": "splice"})])
def test_whole_runs(machine: Emulation, fast: None, lab: Lab, devices: int, changes: dict[str, Any]) -> None:
    """Under a grammar and with noise, which need tokens on the host and logits that are kept for them."""
    layers = [FIRST, SECOND if devices == 2 else FIRST]
    plain, tokenizer = copy.deepcopy(lab.plain), lab.model.tokenizer
    model = replace(prepare_model(plain, tokenizer, "tiny", FIRST, "auto", layers), stages=devices)
    there = recorded(replace(lab, model=model), SMALL, **changes, draft="auto")
    assert there.solver.resolved.lookahead == ("off" if changes else "on")
    assert there.solver.resolved.draft == "off"
    assert there.rows() == recorded(lab, SMALL, **changes).rows()
