"""The engine on the Triton kernels: greedy tokens in fp32 equal plain transformers, shared runs included."""

from typing import Any

import pytest
import torch
from graph_scripts import Script, mistakes, short_graph
from oracle import engine_for, plain_model, prepared
from rrm_kernels.sharing import SharingCost
from rrm_kernels.triton_attention import TritonAttention, TritonUnavailable, load_triton

from rrm_engine.models.attention import choose_attention

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels import ragged, tile

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not tile.INTERPRETED, reason="TRITON_INTERPRET=0: this test's models are on CPU")


class Spy:
    """The kernel, with a count of the pieces of shared runs that its calls were given."""

    def __init__(self) -> None:
        self.calls = 0
        self.pieces = 0

    def __call__(self, query: Any, key_cache: Any, value_cache: Any, metadata: Any, *options: Any) -> torch.Tensor:
        self.calls += 1
        self.pieces += metadata.capacity.pieces
        return ragged.ragged_attention(query, key_cache, value_cache, metadata, *options)


def graph_on(plain: Any, attend: TritonAttention) -> Script:
    model = prepared(plain, "sdpa")
    model.attend = attend
    return short_graph(engine_for(model))


@interpreted
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])  # windows, soft-cap, sinks, widths
def test_tokens_equal_plain_transformers(family: str) -> None:
    plain = plain_model(family)
    spy = Spy()
    script = graph_on(plain, TritonAttention(spy, SharingCost(member=0, crossover=0)))
    assert mistakes(plain, script) == {}
    assert spy.calls > 0
    assert spy.pieces > 0  # the two children read their parent's blocks once


@interpreted
def test_a_broken_shared_run_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the shared keys the tokens are others."""
    plain = plain_model("qwen3")
    monkeypatch.setattr(ragged, "attend_shared", lambda *_: None)
    script = graph_on(plain, TritonAttention(ragged.ragged_attention, SharingCost(member=0, crossover=0)))
    assert mistakes(plain, script) != {}


@interpreted
def test_by_default_nothing_so_short_is_shared() -> None:
    spy = Spy()
    graph_on(plain_model("llama", num_hidden_layers=1), TritonAttention(spy, load_triton(CPU).sharing))
    assert spy.calls > 0
    assert spy.pieces == 0


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # padding rows hold anything
def test_chosen_by_name_it_passes_the_check_at_load() -> None:
    model = prepared(plain_model("qwen3", num_hidden_layers=1), "triton")
    assert model.attention == "Triton kernels, interpreted"
    assert isinstance(model.attend, TritonAttention)
    assert model.load_check_error < 1e-4


def test_where_it_cannot_run_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "INTERPRETED", False)
    with pytest.raises(TritonUnavailable, match="on CUDA, not on cpu"):
        load_triton(CPU)
    with pytest.raises(ValueError, match=r"--attention triton: .*; --attention sdpa works everywhere"):
        choose_attention("triton", CPU, torch.float32)
    assert not isinstance(choose_attention("auto", CPU, torch.float32)[1], TritonAttention)


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rrm_kernels.ragged", None)
    with pytest.raises(TritonUnavailable, match="pip install triton"):
        load_triton(torch.device("cuda"))
    assert choose_attention("auto", torch.device("cuda"), torch.float32)[0].startswith("torch reference (")
