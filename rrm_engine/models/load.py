"""Hugging Face side: find and load a model; every failure is one sentence that says what to do."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rrm_engine.models.attention import ATTENTION_NAME, register_attention

EMBEDDED = "embedded"


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU. Raises ValueError for a device this torch does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device} cannot be used by this torch: {str(e).splitlines()[0]}") from e
    return resolved


def load_pretrained(name: str, dtype: str, device: torch.device) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load ``name`` (``embedded``, a hub id, a directory or a GGUF file) as it was published.

    ``dtype`` is ``auto`` or a torch dtype's name. Raises ValueError with one sentence that says what to do.
    """
    register_attention()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source, extra = _locate(name)
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == EMBEDDED and dtype == "auto":
        wanted = torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, attn_implementation=ATTENTION_NAME, **_placement(device), **extra
        )
        extra.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise ValueError(_load_failure(name, e)) from e
    return model, tokenizer


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` finds the model, and the keywords it needs besides."""
    if name == EMBEDDED:
        return str(files("rrm_engine.data") / "embedded_model"), {}
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"--model {name}: there is no such GGUF file")
        return str(path.parent), {"gguf_file": path.name, **_dense_gguf()}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {name}: the directory has no config.json, so it is not a saved model")
        return str(path), {}
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"--model {name}: there is no such directory or GGUF file")
    return name, {}


def _dense_gguf() -> dict[str, Any]:
    """Unpack every weight at load: newer transformers would otherwise keep them packed, in layers of their own."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _placement(device: torch.device) -> dict[str, Any]:
    """Stream the weights straight to a CUDA device; on CPU they are loaded in place."""
    return {"device_map": {"": device}} if device.type == "cuda" else {}


def _load_failure(name: str, error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if isinstance(error, ImportError) and "gguf" in str(error).lower():
        return f"--model {name}: reading GGUF needs one more package: pip install 'rrm-engine[gguf]'"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or "connect" in str(error).lower()
    if isinstance(error, OSError) and (offline or "couldn't connect" in str(error).lower()):
        return (
            f"--model {name} is not on this machine and the hub cannot be reached: "
            f"pass a local directory or a GGUF file, or leave --model out for the embedded model"
        )
    return f"--model {name} cannot be loaded: {first}"
