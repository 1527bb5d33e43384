"""Models of a published geometry with random weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import VOCABULARY
from replays import FLAT, drawn, memory_for, run
from transformers import AutoConfig, AutoModelForCausalLM

from rrm_engine.loading.geometry import GEOMETRIES, random_model
from rrm_engine.loading.prepare import load_model, prepare_model


@pytest.mark.parametrize(
    ("geometry", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_geometries_have_the_published_number_of_parameters(geometry: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GEOMETRIES[geometry]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_random_model_is_always_the_same_and_runs() -> None:
    no_tokenizer: Any = SimpleNamespace(eos_token_id=None)
    small = GEOMETRIES["qwen3-0.6b"] | {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    graph = drawn(FLAT)
    models = [prepare_model(random_model(small, "float32"), no_tokenizer, "random") for _ in range(2)]
    sampled = [run("pin", memory_for(model, graph), graph).sampled for model in models]
    assert sampled[0] == sampled[1]
    with pytest.raises(ValueError, match="--model random:gpt-9: the geometries are smollm2-135m, qwen3"):
        load_model("random:gpt-9")
