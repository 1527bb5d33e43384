"""Hugging Face side: find and load a model; every failure is one sentence that says what to do."""

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rrm_engine.errors import RrmError
from rrm_engine.models.attention import ATTENTION_NAME, register_attention
from rrm_engine.models.geometry import find_geometry, random_model

EMBEDDED = "embedded"


def resolve_device(device: str, flag: str = "--device") -> torch.device:
    """``auto`` is the first CUDA device, else the CPU. Raises RrmError for a device this torch does not have.

    The device is named as tensors on it name theirs: ``cuda:0``, never ``cuda``, for the two are not equal.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise RrmError(f"{flag} {device} cannot be used by this torch: {str(e).splitlines()[0]}") from e


def load_pretrained(
    name: str, dtype: str, device: torch.device, places: Mapping[str, torch.device] | None = None
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load ``name`` (``embedded``, a hub id, a directory or a GGUF file) as it was published, or ``random:GEOMETRY``.

    ``dtype`` is ``auto`` or a torch dtype's name. ``places`` are the devices of its modules by their names, where they
    are not all on ``device``. Raises RrmError with one sentence that says what to do.
    """
    register_attention()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if (geometry := find_geometry(name)) is not None:
        tokenizer = AutoTokenizer.from_pretrained(_locate(EMBEDDED)[0])  # to have one: nothing it writes means anything
        return random_model(geometry, dtype, device), tokenizer
    source, extra = _locate(name)
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == EMBEDDED and dtype == "auto":
        wanted = torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, attn_implementation=ATTENTION_NAME, **_placement(device, places), **extra
        )
        if places:  # the hooks that come with them: layers fetch their inputs in a way of their own
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(model, recurse=True)
        extra.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise RrmError(_load_failure(name, e)) from e
    return model, tokenizer


def load_skeleton(name: str, dtype: str) -> Any:
    """The model ``name`` on the meta device: its modules and their shapes without the weights. Raises RrmError."""
    if (geometry := find_geometry(name)) is not None:
        return random_model(geometry, dtype, "meta")
    source, extra = _locate(name)
    gguf = {key: extra[key] for key in extra if key == "gguf_file"}
    try:
        config = AutoConfig.from_pretrained(source, **gguf)
        published = torch.float32 if name == EMBEDDED else getattr(config.get_text_config(), "dtype", None)
        wanted = (published or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise RrmError(_load_failure(name, e)) from e


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Where ``from_pretrained`` finds the model, and the keywords it needs besides."""
    if name == EMBEDDED:
        return str(files("rrm_engine.data") / "embedded_model"), {}
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise RrmError(f"--model {name}: there is no such GGUF file")
        return str(path.parent), {"gguf_file": path.name, **_dense_gguf()}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RrmError(f"--model {name}: the directory has no config.json, so it is not a saved model")
        return str(path), {}
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RrmError(f"--model {name}: there is no such directory or GGUF file")
    return name, {}


def _dense_gguf() -> dict[str, Any]:
    """Unpack every weight at load: newer transformers would otherwise keep them packed, in layers of their own."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _placement(device: torch.device, places: Mapping[str, torch.device] | None) -> dict[str, Any]:
    """Stream the weights straight to CUDA devices; on CPU they are loaded in place."""
    if places and len(set(places.values())) > 1:
        return {"device_map": dict(places)}
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
