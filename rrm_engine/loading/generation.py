"""What a checkpoint says about generation: its ``generation_config``, and defaults of transformers' ``generate``
(``top_k`` is 50), as the release that is installed has them.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from rrm_engine.engine.rules import WARPERS, make_rules
from rrm_engine.errors import RrmError

FILE = "generation_config.json"
# Settings that processors are made of, besides WARPERS.
HONOURED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "watermarking_config",
    "renormalize_logits",
)
# Settings that do not change what one sequence is given: how it is computed, how results are returned, how padding
# is done, and what only beams or an assistant model use.
WITHOUT_EFFECT = (
    "do_sample",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_config",
    "max_cache_len",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "prefill_chunk_size",
    "transformers_version",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "speculation_type",
    "use_mtp",
)
INSTEAD = {
    "max_length": "each phase has its own budget",
    "max_new_tokens": "each phase has its own budget",
    "num_return_sequences": "--samples",
}
NEUTRAL = {"guidance_scale": 1, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": 0}


@dataclass(frozen=True, slots=True)
class Generation:
    """``sampling`` are the settings that are honoured, by transformers' names, as far as they do something; a
    ``temperature`` of 0 is greedy. ``ignored`` are those that are not, each with its value, in words.
    """

    sampling: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


def try_file(folder: Path) -> None:
    """Raises whatever transformers does where it cannot use the generation_config.json of ``folder``: loading a model,
    it would do without it and say nothing.
    """
    path = folder / FILE
    if path.is_file():
        GenerationConfig(**json.loads(path.read_text(encoding="utf-8")))


def eos_ids(*sources: Any) -> frozenset[int]:
    """All that they call an end of sequence: generation config, text config and tokenizer; None has nothing to say."""
    ids: set[int | None] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(int(i) for i in ids if i is not None and i >= 0)


def read_generation(model: Any) -> Generation:
    """The generation settings of a transformers model, defaults of ``generate`` filled in."""
    config = getattr(model, "generation_config", None) or GenerationConfig()
    defaults: Mapping[str, Any] = GenerationConfig._get_default_generation_params()
    given = {name: _plain(value) for name, value in vars(config).items() if not name.startswith("_")}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = {name: given.get(name, defaults.get(name)) for name in WARPERS}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if not given.get("do_sample", defaults["do_sample"]):
        sampling["temperature"] = 0.0
    telling = {name: value for name, value in given.items() if value != defaults.get(name)}
    sampling |= {name: telling[name] for name in HONOURED if name in telling}
    return Generation(sampling, tuple(_ignored(telling)))


def _ignored(settings: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in settings.items():
        known = name in WARPERS or name in HONOURED or name in WITHOUT_EFFECT
        if name == "cache_implementation":
            known = value != "quantized"  # the others hold the same numbers
        if known or value is False or value == NEUTRAL.get(name):
            continue
        shown = json.dumps(value, ensure_ascii=True, default=str)
        reason = INSTEAD.get(name)
        found.append(f"{name} {shown if len(shown) <= 40 else shown[:37] + '...'}" + (f" ({reason})" if reason else ""))
    return found


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping) and any(isinstance(key, tuple) for key in value):
        return [[list(key), number] for key, number in value.items()]  # a sequence_bias
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    return value


def refuse_unusable(settings: Mapping[str, Any], eos_ids: Collection[int], vocabulary: int, source: str) -> None:
    """Raises RrmError, with one sentence that begins with ``source``, if transformers' processors do not take
    ``settings``: they are made and called once.
    """
    prompt, scores = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, vocabulary)
    try:
        rules = make_rules(settings, eos_ids=eos_ids, prompt=prompt, longest=10, vocabulary=vocabulary)
        for processor in (*rules.before, *rules.after):
            scores = processor(prompt, scores)
    except Exception as error:  # whatever it is, a setting is the cause: there is nothing else in it
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RrmError(
            f"{source}: transformers does not take these settings ({first}): mend the checkpoint's {FILE}, override "
            f"it, or give --generation-config ignore"
        ) from error
