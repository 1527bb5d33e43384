"""Emulated GPUs with a clock: what computes at the same time, and what waits for what."""

from dataclasses import dataclass

import pytest
import torch
from graph_scripts import GREEDY
from oracle import plain_model, prompt

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from emulated_cuda import Emulation
from launched import engine_on, on_cuda, reference_attention

from rrm_engine.device.transfer import Readback
from rrm_engine.engine.engine import Engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there")
ROUNDS = 12  # tokens of each sequence


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
        self.sample(ROUNDS * sequences)  # until everything is under way, and every size has been captured

    def sample(self, tokens: int) -> None:
        while tokens > 0:
            tokens -= len(self.engine.step())
            self.cuda.time += self.host

    def units_a_token(self, sequences: int) -> float:
        """Time from one token of a sequence to its next."""
        self.start(sequences)
        began = self.cuda.time
        self.sample(ROUNDS * sequences)
        return (self.cuda.time - began) / ROUNDS


@pytest.mark.parametrize(("lookahead", "expected"), [(True, 8), (False, 8 + 5)])
def test_one_device_computes_while_the_host_works(cuda: Emulation, fast: None, lookahead: bool, expected: int) -> None:
    engine = engine_on(on_cuda(plain_model("qwen3")), lookahead=lookahead)
    assert Pace(cuda, engine, host=5).units_a_token(3) == pytest.approx(expected)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("sequences", [1, 4, 8])
def test_all_stages_of_a_pipeline_compute_at_once(cuda: Emulation, fast: None, sequences: int, lookahead: bool) -> None:
    """A step takes each of four devices 4 units: a token takes as long as all four together, whatever others run.

    Without lookahead the host's work comes on top, for the next step is launched when the token is known.
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
