"""Models of a published geometry with random weights: the time of a forward does not depend on what they are."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rrm_engine.engine.prepare import LoadedModel, load_model, prepare_model
from rrm_engine.models.attention import ATTENTION_NAME, register_attention
from rrm_engine.models.load import resolve_device

PREFIX = "random:"
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6,
}


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return QWEN3 | {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


# As the models' published config.json files have them.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, tied=False),
}


def load_any_model(name: str, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> LoadedModel:
    """``load_model``, or random weights for ``random:GEOMETRY``. Raises ValueError with one sentence."""
    if not name.startswith(PREFIX):
        return load_model(name, dtype, device, attention)
    geometry = name.removeprefix(PREFIX)
    if geometry not in GEOMETRIES:
        raise ValueError(f"--model {name}: the geometries are {', '.join(GEOMETRIES)}")
    return random_model(GEOMETRIES[geometry], name, dtype, device, attention)


def random_model(
    geometry: dict[str, Any], name: str, dtype: str = "auto", device: str = "auto", attention: str = "auto"
) -> LoadedModel:
    """A model with always the same random weights, made on ``device`` at once; ``dtype`` ``auto`` is bfloat16."""
    register_attention()
    target = resolve_device(device)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = AutoConfig.for_model(**geometry)
    torch.manual_seed(0)
    with target:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=wanted)
    no_tokenizer: Any = SimpleNamespace(eos_token_id=None)  # nothing is read or written as text
    return prepare_model(model, no_tokenizer, name, target, attention)
