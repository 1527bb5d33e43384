"""Models of a published geometry with random weights: the time of a forward does not depend on what they are.

The numbers are those of the config.json that lies beside each model on the Hugging Face hub: Qwen/Qwen3-0.6B, -1.7B,
-4B, -8B, -14B and -32B, and HuggingFaceTB/SmolLM2-135M.
"""

from typing import TYPE_CHECKING, Any

from rrm_engine.errors import RrmError

if TYPE_CHECKING:
    import torch

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
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, tied=False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, tied=False),
}


def find_geometry(name: str) -> dict[str, Any] | None:
    """The geometry that ``random:GEOMETRY`` names; None for other names. Raises RrmError for an unknown one."""
    if not name.startswith(PREFIX):
        return None
    geometry = GEOMETRIES.get(name.removeprefix(PREFIX).lower())
    if geometry is None:
        raise RrmError(f"--model {name}: the geometries are {', '.join(GEOMETRIES)}")
    return geometry


def random_model(geometry: dict[str, Any], dtype: str = "auto", device: "torch.device | str" = "cpu") -> Any:
    """A causal LM with always the same random weights, made on ``device`` at once; ``dtype`` ``auto`` is bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rrm_engine.models.attention import ATTENTION_NAME, register_attention

    register_attention()
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = AutoConfig.for_model(**geometry)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=wanted)
