"""Hugging Face side: find and load a model; every failure is one sentence that says what to do."""

import contextlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from rrm_engine.errors import RrmError
from rrm_engine.loading import generation
from rrm_engine.loading.checkpoint import EMBEDDED, Checkpoint, find, inspect
from rrm_engine.loading.geometry import find_geometry, random_model
from rrm_engine.loading.tensors import (
    refuse_foreign_tensors,
    refuse_missing_rows,
    refuse_no_numbers,
    refuse_partial_blocks,
)
from rrm_engine.models.attention import ATTENTION_NAME, register_attention

# How a quantised checkpoint's weights are unpacked to --dtype at load, by its quant_method: transformers' classes.
UNPACKED = {"fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
UNUSED = "rrm_unused"  # of a loaded model: the names of the modules that its checkpoint has besides


def resolve_device(device: str, flag: str = "--device") -> torch.device:
    """``auto`` is the first CUDA device, else the CPU. Raises RrmError for a device this torch does not have.

    The device is named as tensors on it name theirs: ``cuda:0``, never ``cuda``, for the two are not equal.
    """
    asked = f"{flag} {device or repr(device)}"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        asked = f"{device}, which {flag} auto found,"
    try:
        kind, number = torch.device(device).type, torch.device(device).index
        found = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise RrmError(f"{asked} cannot be used by this torch: {str(e).splitlines()[0]}") from e
    if kind not in ("cpu", "cuda") or (kind == "cpu" and number):
        raise RrmError(f"{asked} is no device that models run on here: give cpu, cuda or cuda:N")
    return found


def too_large(name: str, where: str) -> str:
    """What to say where a model's memory could not be had. ``where`` is a device, several, or ``auto``."""
    where = "there is here" if where == "auto" else f"of {where}"
    return (
        f"--model {name} does not fit into the memory {where}: free some of it, or use a smaller model, a smaller "
        f"--dtype or another --device"
    )


def load_pretrained(
    name: str,
    dtype: str,
    device: torch.device,
    places: Mapping[str, torch.device] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load ``name`` (``embedded``, a hub id, a directory or a GGUF file) as it was published, or ``random:GEOMETRY``.

    ``dtype`` is ``auto`` or a torch dtype's name. ``places`` are the devices of its modules by their names, where they
    are not all on ``device``. ``trust_remote_code`` runs the code that a checkpoint brings. Raises RrmError with one
    sentence that says what to do.
    """
    if (geometry := find_geometry(name)) is not None:
        tokenizer = AutoTokenizer.from_pretrained(find(EMBEDDED).folder)  # nothing it writes means anything
        return random_model(geometry, dtype, device), tokenizer
    checkpoint = find(name)
    inspect(checkpoint)
    with _about(checkpoint, f"transformers cannot use {generation.FILE}"):
        generation.try_file(checkpoint.folder)
    config = _read_config(checkpoint, trust_remote_code)
    tokenizer = _read_tokenizer(checkpoint, config, trust_remote_code)
    skeleton = _build(checkpoint, config, dtype, trust_remote_code)
    refuse_missing_rows(checkpoint, skeleton, tokenizer)
    del skeleton
    model = _read_weights(checkpoint, config, dtype, _placement(device, places), trust_remote_code)
    if places:  # the hooks that come with them: layers fetch their inputs in a way of their own
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
    return model, tokenizer


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model ``name``, without its weights. Raises RrmError."""
    checkpoint = find(EMBEDDED if find_geometry(name) is not None else name)
    return _read_tokenizer(checkpoint, _read_config(checkpoint, trust_remote_code), trust_remote_code)


class Words(NamedTuple):
    """The tokenizer of a model, the ids of its end-of-sequence tokens and its kind."""

    tokenizer: PreTrainedTokenizerFast
    eos_ids: frozenset[int]
    model_type: str


def load_words(name: str, trust_remote_code: bool = False) -> Words:
    """What the small files of the model ``name`` say, without its weights. Raises RrmError."""
    checkpoint = find(EMBEDDED if find_geometry(name) is not None else name)
    config = _read_config(checkpoint, trust_remote_code)
    tokenizer = _read_tokenizer(checkpoint, config, trust_remote_code)
    settings = None
    if checkpoint.gguf is None and (checkpoint.folder / generation.FILE).is_file():
        with _about(checkpoint, f"transformers cannot use {generation.FILE}"):
            settings = GenerationConfig.from_pretrained(checkpoint.folder)
    ids = generation.eos_ids(settings, config.get_text_config(), tokenizer)
    return Words(cast(PreTrainedTokenizerFast, tokenizer), ids, config.model_type)


def load_skeleton(name: str, dtype: str, trust_remote_code: bool = False) -> Any:
    """The model ``name`` on the meta device: its modules and their shapes without the weights. Raises RrmError."""
    if (geometry := find_geometry(name)) is not None:
        return random_model(geometry, dtype, "meta")
    checkpoint = find(name)
    inspect(checkpoint)
    return _build(checkpoint, _read_config(checkpoint, trust_remote_code), dtype, trust_remote_code)


# In each of the three steps below all that transformers is given is a file of the checkpoint that is whole, so whatever
# it raises is about what that file says. Where it reads weights, only known complaints are.


def _read_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    _quiet()
    what = "the GGUF file" if checkpoint.gguf else "config.json"
    with _about(checkpoint, f"transformers cannot use {what}"):
        code = None if checkpoint.gguf else _own_code(checkpoint)
        if code and not trust_remote_code:
            raise checkpoint.refusal(
                f"it brings Python code that transformers would have to run ({code}): read it, and give "
                f"--trust-remote-code if you trust it"
            )
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=bool(code), **_gguf(checkpoint))
    _refuse_packed(checkpoint, config)
    refuse_partial_blocks(checkpoint, getattr(config, "quantization_config", None))
    return config


def _own_code(checkpoint: Checkpoint) -> str | None:
    """The class that a checkpoint brings for its configuration, where transformers has none of its own."""
    keys, _ = transformers.PreTrainedConfig.get_config_dict(checkpoint.folder)
    return None if keys.get("model_type") in CONFIG_MAPPING else keys.get("auto_map", {}).get("AutoConfig")


def _read_tokenizer(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    known = {"config": config} if checkpoint.gguf else {}  # else the whole file is read again for it
    with _about(checkpoint, "transformers cannot use its tokenizer"):
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, **_gguf(checkpoint), **known
        )


def _build(checkpoint: Checkpoint, config: Any, dtype: str, trust_remote_code: bool) -> Any:
    """The model without its weights."""
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (own and trust_remote_code):
        raise checkpoint.refusal(
            f"transformers has no causal language model of the {config.model_type} family, nothing that continues "
            f"text alone: use a text-only checkpoint"
        )
    published = torch.float32 if checkpoint.name == EMBEDDED else getattr(config.get_text_config(), "dtype", None)
    wanted = (published or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with _about(checkpoint, "transformers cannot build what config.json describes"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    if not model._can_set_attn_implementation():
        raise checkpoint.refusal(
            f"{type(model).__name__} computes attention itself, and transformers lets nothing be put in its place: "
            f"the {config.model_type} family is not supported"
        )
    return model


def _read_weights(
    checkpoint: Checkpoint, config: Any, dtype: str, placement: dict[str, Any], trust_remote_code: bool
) -> Any:
    register_attention()
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if checkpoint.name == EMBEDDED and dtype == "auto":
        wanted = torch.float32
    # It shows the progress of unpacking a GGUF file whatever it is told.
    silence = contextlib.redirect_stderr(io.StringIO()) if checkpoint.gguf else contextlib.nullcontext()
    try:
        with silence:
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=wanted,
                attn_implementation=ATTENTION_NAME,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come with the report
                **_unpacking(checkpoint, config),
                **_gguf(checkpoint),
                **placement,
            )
    except pickle.UnpicklingError as error:
        raise checkpoint.refusal(
            "its pytorch_model.bin holds other objects than tensors, which may be code: use a checkpoint in safetensors"
        ) from error
    setattr(model, UNUSED, refuse_foreign_tensors(checkpoint, model, report))
    refuse_no_numbers(checkpoint, model)
    # What was unpacked may have another type than was asked for.
    return model.to(model.dtype if dtype == "auto" else wanted) if _quant_method(config) else model


@contextlib.contextmanager
def _about(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    try:
        yield
    except (RrmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise checkpoint.refusal(f"{what}: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    """What an exception of another library says, up to where it goes into details."""
    if isinstance(error, KeyError):  # whose message is the key alone
        return repr(error)
    said = []
    for line in str(error).splitlines():
        said.append(line.strip())
        if said[-1] and not said[-1].endswith(":"):
            break
    return " ".join(filter(None, said)) or repr(error)


def _quiet() -> None:
    """transformers is not to speak: what matters is in our sentences."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _refuse_packed(checkpoint: Checkpoint, config: Any) -> None:
    method = _quant_method(config)
    if method is None or checkpoint.gguf or (method in UNPACKED and hasattr(transformers, UNPACKED[method])):
        return
    raise checkpoint.refusal(
        f"its weights are quantised by {method}; of such checkpoints {', '.join(UNPACKED)} and GGUF files can be "
        f"unpacked to --dtype: use one of those, or the one that it was made from"
    )


def _quant_method(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))


def _unpacking(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """Unpack every weight at load: there are no products of packed ones here."""
    if checkpoint.gguf:  # newer transformers would otherwise keep them packed, in layers of their own
        kind = getattr(transformers, "GgufConfig", None)
    else:
        method = _quant_method(config)
        kind = getattr(transformers, UNPACKED[method]) if method else None
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def _gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}


def _placement(device: torch.device, places: Mapping[str, torch.device] | None) -> dict[str, Any]:
    """Stream the weights straight to CUDA devices; on CPU they are loaded in place."""
    if places and len(set(places.values())) > 1:
        return {"device_map": dict(places)}
    return {"device_map": {"": device}} if device.type == "cuda" else {}
