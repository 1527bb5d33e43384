"""Negative controls on emulated GPUs: what is done for CUDA's sake is left out, and the rule that breaks is named."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graph_scripts import live_graph, mistakes, policy_engine, waiting_graph
from oracle import plain_model
from rrm_kernels.staging import Staging

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation, OnDevice, emulated
from emulated_streams import Stream
from launched import engine_on, on_cuda

from rrm_engine.device.transfer import Readback
from rrm_engine.engine.cuda_graphs import CudaGraphs, Share
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import OnOwnDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")


def piped() -> bool:
    """Whether a pipeline's tokens are right."""
    plain = plain_model("qwen3")
    engine = engine_on(on_cuda(plain, 2), stages=2, lookahead=True)
    return mistakes(plain, live_graph(engine)) == {}


def moved() -> bool:
    """Whether they are where blocks move to the host and back."""
    plain = plain_model("qwen3")
    engine = policy_engine(on_cuda(plain), "offload", 200, max_sequence_tokens=110, lookahead=True)
    return mistakes(plain, waiting_graph(engine)) == {}


def with_modules() -> bool:
    """Whether they are where a model over two devices keeps transformers' forward."""
    plain = plain_model("gemma2")
    engine = engine_on(on_cuda(plain, 2), stages=2, lookahead=True)
    return mistakes(plain, live_graph(engine)) == {}


def complaint(scenario: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> str:
    """The rule that is broken, or that tokens are wrong; nothing if all is right."""
    try:
        with emulated(2, monkeypatch):
            return "" if scenario() else "wrong tokens"
    except AssertionError as error:
        return str(error)


def early(self: Readback, device: torch.device) -> torch.Tensor:
    return self._host.to(device, non_blocking=True)


def forgotten(self: KVCache, *given: Any) -> None:
    self._streams.clear()
    SWAP_IN(self, *given)


def on_one_stream(self: CudaGraphs, call: Any) -> Any:
    """The first device that captures is where all do, as with torch's own stream."""
    cuda = Emulation.current
    cuda.capture_stream = self._stream = getattr(cuda, "capture_stream", None) or cuda.new_stream()  # type: ignore
    return RECORD(self, call)


SWAP_IN, RECORD = KVCache.swap_in, CudaGraphs.record


LEFT_OUT: list[tuple[Any, str, Any, str, list[Callable[[], bool]]]] = [  # what is said of that, and where
    (OnDevice, "clone", lambda self: self, "a race", [piped, with_modules]),
    (OnDevice, "record_stream", lambda self, stream: None, "given back", [piped, moved, with_modules]),
    (Stream, "wait_stream", lambda self, stream: None, "a race", [piped, moved]),
    (Stream, "wait_event", lambda self, event: None, "a race", [piped, moved]),
    (Staging, "begin", lambda self: None, "overwritten", [piped]),
    (Readback, "tolist", lambda self: self._host.tolist(), "wrong tokens", [piped]),
    (Readback, "on", early, "host memory is read", [piped]),
    (KVCache, "swap_in", forgotten, "host memory is read", [moved]),
    (Share, "on_device", lambda self: nullcontext(), "a kernel launched on cuda:0", [piped]),
    (OnOwnDevice, "__call__", lambda self, *given: self.attend(*given), "a kernel launched on cuda:0", [with_modules]),
    (CudaGraphs, "record", on_one_stream, "a stream of another device", [piped]),
]


@pytest.mark.parametrize("scenario", [piped, moved, with_modules])
def test_nothing_is_noticed_where_nothing_is_left_out(
    fast: None, scenario: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complaint(scenario, monkeypatch) == ""


@pytest.mark.parametrize(
    ("owner", "name", "broken", "said", "scenario"),
    [(*left_out, scenario) for *left_out, noticed in LEFT_OUT for scenario in noticed],
)
def test_what_is_left_out_is_noticed(
    fast: None,
    owner: Any,
    name: str,
    broken: Any,
    said: str,
    scenario: Callable[[], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert said in complaint(scenario, monkeypatch)
