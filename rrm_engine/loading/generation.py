"""What a checkpoint says about generation, carried out as transformers' ``generate`` would: by its own processors.

``generate`` takes the checkpoint's ``generation_config``, fills in defaults of its own (``top_k`` is 50) and makes a
list of logits processors of it. Both come from transformers here, so they are those of the release that is installed.
What in ``generate`` is the prompt is here all tokens in front of the phase: its system text and task, and after a
resume or a fork also what the node or its parent wrote before. So penalties see the whole transcript, and minima of
new tokens count from the first token of the phase.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import logits_process as library
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from rrm_engine.errors import RrmError

FILE = "generation_config.json"
WARPERS = ("temperature", "top_k", "top_p", "min_p")
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
FILTERS = (
    library.TemperatureLogitsWarper,
    library.TopKLogitsWarper,
    library.TopPLogitsWarper,
    library.MinPLogitsWarper,
)
# Processors that change the scores of tokens that are there already, each by itself and never to nothing.
OF_TOKENS = (library.RepetitionPenaltyLogitsProcessor,)
# When processors that are for some lengths alone have nothing to do.
RESTS: dict[type, Callable[[Any, int], bool]] = {
    library.MinLengthLogitsProcessor: lambda one, length: length >= one.min_length,
    library.MinNewTokensLengthLogitsProcessor: lambda one, length: (
        length >= one.prompt_length_to_skip + one.min_new_tokens
    ),
    library.SuppressTokensAtBeginLogitsProcessor: lambda one, length: length != one.begin_index,
    library.ExponentialDecayLengthPenalty: lambda one, length: length <= one.regulation_start,
}
# Processors that look at nothing but which tokens there are, and at each row by itself: rows of any lengths go through
# them together.
TOGETHER = (
    *FILTERS,
    *OF_TOKENS,
    library.SuppressTokensLogitsProcessor,
    library.InfNanRemoveLogitsProcessor,
    library.LogitNormalization,
    library.TopHLogitsWarper,
    library.TypicalLogitsWarper,
    library.EpsilonLogitsWarper,
    library.EtaLogitsWarper,
)


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


class _Here(LogitsProcessor):
    """Marks the place in a list where ``generate`` puts processors of the caller's own, such as grammars."""


class _Generator(GenerationMixin):
    """What ``generate`` is a method of, without a model."""

    def __init__(self, vocabulary: int) -> None:
        self.config = PretrainedConfig(vocab_size=vocabulary)


@dataclass(frozen=True, slots=True)
class Rules:
    """A phase's logits processors: those before a grammar and those after it. Each is called with the tokens so
    far, int64 ``[rows, n]``, and scores fp32 ``[rows, vocabulary]``.

    ``together``: rows of any lengths may go through them at once, tokens repeated at the shorter ones' ends.
    ``only_filters``: after a grammar there is only what samplers do themselves, temperature, top-k, top-p and min-p.
    ``forbids``: one of the first might leave no token.
    """

    before: Sequence[Any]
    after: Sequence[Any]
    together: bool = field(init=False)
    only_filters: bool = field(init=False)
    forbids: bool = field(init=False)

    def __post_init__(self) -> None:
        def all_are(processors: Iterable[Any], kinds: tuple[type, ...]) -> bool:
            return all(type(processor) in kinds for processor in processors)

        object.__setattr__(self, "together", all_are((*self.before, *self.after), TOGETHER))
        object.__setattr__(self, "only_filters", all_are(self.after, FILTERS))
        object.__setattr__(self, "forbids", not all_are(self.before, OF_TOKENS))


def process(processors: Iterable[Any], tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """``scores`` fp32 ``[rows, vocabulary]`` of what comes after ``tokens`` int64 ``[rows, n]``, after all processors.

    Writes into ``scores``. Those that have nothing to do at this length are left out, and those that only change what
    stands in ``tokens`` are given no more than that: both because a vocabulary is large.
    """
    for processor in processors:
        if type(processor) in OF_TOKENS:
            known = torch.where(tokens < scores.shape[1], tokens, tokens[:, :1])  # some models have no score for a few
            columns = torch.arange(known.shape[1], device=known.device).expand_as(known)
            scores.scatter_(1, known, processor(columns, scores.gather(1, known)))
        elif not (type(processor) in RESTS and RESTS[type(processor)](processor, tokens.shape[1])):
            scores = processor(tokens, scores)
    return scores


def make_rules(
    settings: Mapping[str, Any], *, eos_ids: Collection[int], prompt: torch.Tensor, longest: int, vocabulary: int
) -> Rules:
    """The processors of ``generate`` under ``settings`` after ``prompt`` int64 ``[1, n]``, and on its device.

    ``longest`` are the tokens that prompt and answer may have. Raises whatever transformers does where it does not
    take a setting.
    """
    values = dict(settings)
    sampling = values.get("temperature", 0.0) != 0
    if not sampling:
        values = {name: value for name, value in values.items() if name not in WARPERS}
    if not values.get("min_p"):
        values.pop("min_p", None)
    config = GenerationConfig(**values, do_sample=sampling, max_length=longest)
    config._eos_token_tensor = torch.tensor(sorted(eos_ids), device=prompt.device) if eos_ids else None
    found = _Generator(vocabulary)._get_logits_processor(
        config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        logits_processor=LogitsProcessorList([_Here()]),
        device=prompt.device,
    )
    place = next(index for index, one in enumerate(found) if isinstance(one, _Here))
    return Rules(found[:place], found[place + 1 :])


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
