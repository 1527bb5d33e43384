"""What cannot be loaded, or would run but not exactly, is refused with one sentence that says why."""

import re
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import MOE, Attending, plain_model, prepared
from rrm_kernels import reference
from transformers import AutoConfig, AutoModelForCausalLM

from rrm_engine.loading import check
from rrm_engine.loading.load import resolve_device
from rrm_engine.loading.prepare import UnsupportedModel, load_model

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}
LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
LONGROPE |= {"original_max_position_embeddings": 256, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def refusal(plain: Any, attention: str = "auto") -> str:
    with pytest.raises(UnsupportedModel) as caught:
        prepared(plain, attention)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# devices


def test_a_device_this_torch_does_not_have() -> None:
    for name in ("cuda:99", "warp", "cpu:-1"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used by this torch: ."):
            resolve_device(name)
    for name in ("meta", "cpu:5"):
        with pytest.raises(
            ValueError, match=f"--device {name} is no device that models run on here: give cpu, cuda or"
        ):
            resolve_device(name)
    with pytest.raises(ValueError, match="--device '' cannot be used by this torch: "):
        resolve_device("")
    assert resolve_device("cpu:0") == torch.device("cpu")


def test_auto_is_a_device_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on ``cuda`` says that it is on ``cuda:0``, which is another device to whoever compares the two."""
    if torch.cuda.is_available():
        assert resolve_device("auto") == torch.empty(1, device="cuda").device
        return
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match="cuda, which --device auto found, cannot be used"
    ):  # it was tried, not only named
        resolve_device("auto")


# what would run, but not exactly


def test_layers_that_keep_another_state() -> None:
    for family in ("qwen3_next", "qwen3_5_text"):
        plain = plain_model(family, head_dim=16, **MOE, **LINEAR, layer_types=["linear_attention", "full_attention"])
        assert "linear_attention layers keep a state that is not a KV cache" in refusal(plain)


def test_attention_in_chunks() -> None:
    assert "chunked attention is expressed only in a mask" in refusal(plain_model("llama4_text", **LLAMA4))


@pytest.mark.parametrize(
    ("family", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC), ("qwen3", DYNAMIC)], ids=["phi3", "llama", "qwen3"]
)
def test_positions_that_depend_on_the_longest_sequence(family: str, rope: dict[str, Any]) -> None:
    reason = refusal(plain_model(family, rope_parameters=rope))
    assert f"its {rope['rope_type']} rotary embedding depends on the longest sequence in the batch" in reason


SIZES = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 32},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize("family", SIZES)
def test_attention_that_cannot_be_replaced(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, vocab_size=500, **SIZES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shutil.copy(str(files("rrm_engine.data") / "embedded_model" / "tokenizer.json"), tmp_path)
    reason = f"ForCausalLM computes attention itself, .* the {family} family is not supported"
    with pytest.raises(ValueError, match=reason):
        load_model(str(tmp_path))


def test_a_layer_that_never_calls_our_attention() -> None:
    """What the known families are refused for by name, an unknown one is by the load check."""
    plain = plain_model("qwen3")
    first = plain.model.layers[0].self_attn
    first.forward = lambda hidden_states, **_: (hidden_states * 0, None)
    assert "layers [0] never called the attention function" in refusal(plain)


# what the probe finds


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_probe_passes_what_is_right(family: str) -> None:
    """Counterpart of the tests below: the measured error is far from the bound."""
    model = prepared(plain_model(family))
    assert 0 <= model.load_check_error < 1e-4


def test_a_broken_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed run in which prefill sees one token of its own future."""
    mask = reference.chunk_mask

    def leaky(queries: int, *given: Any) -> torch.Tensor:
        return mask(queries, *given).roll(-1, dims=0).index_fill(0, torch.tensor([queries - 1]), 0)

    monkeypatch.setattr(reference, "chunk_mask", leaky)
    reason = refusal(plain_model("qwen3"))
    assert re.search(r"it differs from plain transformers in the attention (of layer|at token) \d+, by ", reason)
    assert f"times what rounding does (allowed: {check.ALLOWED[torch.float32]:g}); try another --dtype; if" in reason


def test_a_window_that_is_one_too_wide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend: Any = reference.paged_attention

    def wide(query: Any, keys: Any, values: Any, batch: Any, scores: Any) -> torch.Tensor:
        return attend(query, keys, values, batch, replace(scores, window=scores.window and scores.window + 1))

    plain = plain_model("mistral")
    monkeypatch.setattr("rrm_engine.loading.prepare.choose_attention", lambda *_: ("wide", Attending(wide)))
    assert "it differs from plain transformers in the attention" in refusal(plain, "native")


def test_a_cache_that_forgets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV that lands one slot too far is not found by later chunks."""
    store = reference.store_kv
    monkeypatch.setattr(
        "rrm_engine.models.attention.store_kv", lambda cache, new, slots: store(cache, new, slots.roll(1))
    )
    assert re.search("differs from plain transformers in the (keys|values)", refusal(plain_model("olmo2")))


def test_a_forward_that_drops_our_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_model("olmo2")
    kind = type(plain.model.layers[1].self_attn)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, rrm_forward=None, **more: forward(self, *args, **more))
    assert "fails with our attention (it does not hand our arguments to its attention)" in refusal(plain)
