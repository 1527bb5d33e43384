"""The engine on emulated GPUs: rules of CUDA that a fast machine would forgive are kept, and tokens are right."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from graph_scripts import GREEDY, crowded, live_graph, mistakes, policy_engine, short_graph, waiting_graph
from lab import JOBS, Lab, recorded
from oracle import plain_model, prompt
from rrm_kernels.staging import Staging
from settled import IN_A_GRAPH, Settled

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation, OnDevice, emulated
from emulated_streams import Stream
from launched import engine_on, on_cuda, reference_attention

from rrm_engine.config import WaitPolicy
from rrm_engine.device.transfer import Readback
from rrm_engine.engine.cuda_graphs import CudaGraphs, Share
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import Replicas
from rrm_engine.kv.cache import KVCache
from rrm_engine.loading.prepare import prepare_model
from rrm_engine.models.attention import OnOwnDevice
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
    changes = {"blocks": 22, "max_sequence_tokens": 88, "lookahead": True, "stages": devices}
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


# who waits for whom


@dataclass
class Pace:
    """A layer's attention takes its device 4 units of time, all else none; the host takes ``host`` a step."""

    cuda: Emulation
    engine: Engine
    host: float

    def start(self, sequences: int) -> None:
        self.cuda.cost = lambda func, _: 4.0 * (func is reference_attention)
        for i in range(sequences):
            self.engine.submit(f"s{i}", prompt(i, 3), 90, GREEDY, root=i)
        self.sample(24 * sequences)  # until everything is under way, and every size has been captured

    def sample(self, tokens: int) -> None:
        while tokens > 0:
            tokens -= len(self.engine.step())
            self.cuda.time += self.host

    def units_a_token(self, sequences: int) -> float:
        """Time from one token of a sequence to its next."""
        self.start(sequences)
        began = self.cuda.time
        self.sample(24 * sequences)
        return (self.cuda.time - began) / 24


@pytest.mark.parametrize(("lookahead", "expected"), [(True, 8), (False, 8 + 5)])
def test_one_device_computes_while_the_host_works(cuda: Emulation, fast: None, lookahead: bool, expected: int) -> None:
    engine = engine_on(on_cuda(plain_model("qwen3")), lookahead=lookahead)
    assert Pace(cuda, engine, host=5).units_a_token(3) == pytest.approx(expected)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("sequences", [1, 4, 8])
def test_all_stages_of_a_pipeline_compute_at_once(cuda: Emulation, fast: None, sequences: int, lookahead: bool) -> None:
    """A step takes each of four devices 4: so long does a token of a sequence take, whatever others do beside it.

    Without lookahead the host's work comes on top, for the step behind is launched when the token is known.
    """
    model = on_cuda(plain_model("qwen3", num_hidden_layers=4), 4)
    engine = engine_on(model, lookahead=lookahead, stages=4)
    expected = 16 if lookahead else 16 + 3
    assert Pace(cuda, engine, host=3).units_a_token(sequences) == pytest.approx(expected)


@pytest.mark.parametrize("devices", [1, 4])
def test_the_host_waits_for_nothing_but_tokens(
    cuda: Emulation, fast: None, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_cuda(plain_model("qwen3", num_hidden_layers=4), devices)
    engine = engine_on(model, lookahead=True, stages=devices)
    pace = Pace(cuda, engine, host=1)
    pace.start(8)
    waited, read, transfers, steps = cuda.waited, 0.0, cuda.transfers, engine.launched
    tolist = Readback.tolist

    def timed(self: Readback) -> list[int]:
        nonlocal read
        before = cuda.waited
        tokens = tolist(self)
        read += cuda.waited - before
        return tokens

    monkeypatch.setattr(Readback, "tolist", timed)
    pace.sample(100)
    assert cuda.waited - waited == read > 0
    each = 2 if devices == 1 else 3  # the step's arrays there, its tokens back, and in a pipeline there again
    assert cuda.transfers - transfers <= each * (engine.launched - steps + 1)


# negative controls: what is done for CUDA's sake is left out


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
