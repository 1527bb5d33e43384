"""A phase's logits processors: those that transformers' ``generate`` makes from the same settings.

Where ``generate`` has a prompt, a phase has all tokens before it: system text and task, and after a resume or a fork
also what the node or its parent wrote earlier. So penalties see the whole transcript, and a minimum of new tokens is
counted from the first token of the phase.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import logits_process as library
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

WARPERS = ("temperature", "top_k", "top_p", "min_p")
FILTERS = (
    library.TemperatureLogitsWarper,
    library.TopKLogitsWarper,
    library.TopPLogitsWarper,
    library.MinPLogitsWarper,
)
# Processors that only change scores of tokens that the transcript holds, each independently, and never forbid one.
OF_TOKENS = (library.RepetitionPenaltyLogitsProcessor,)
# Processors that act at some lengths only: whether one has nothing to do at this length.
RESTS: dict[type, Callable[[Any, int], bool]] = {
    library.MinLengthLogitsProcessor: lambda one, length: length >= one.min_length,
    library.MinNewTokensLengthLogitsProcessor: lambda one, length: (
        length >= one.prompt_length_to_skip + one.min_new_tokens
    ),
    library.SuppressTokensAtBeginLogitsProcessor: lambda one, length: length != one.begin_index,
    library.ExponentialDecayLengthPenalty: lambda one, length: length <= one.regulation_start,
}
# Processors for which a row's result depends only on its set of tokens, not on their number, nor on other rows: rows of
# different lengths can go through them together, padded with tokens that they have.
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


class _Here(LogitsProcessor):
    """Marks where in its list ``generate`` puts the caller's own processors, which is where our grammars act."""


class _Generator(GenerationMixin):
    """``GenerationMixin`` without a model: enough for it to make logits processors."""

    def __init__(self, vocabulary: int) -> None:
        self.config = PretrainedConfig(vocab_size=vocabulary)


@dataclass(frozen=True, slots=True)
class Rules:
    """A phase's logits processors: those before a grammar and those after it. Each is called with the tokens so
    far, int64 ``[rows, n]``, and scores fp32 ``[rows, vocabulary]``.

    ``together``: rows of different lengths may go through them at once, shorter ones padded with tokens of their own.
    ``only_filters``: ``after`` holds only what the sampler does itself (temperature, top-k, top-p, min-p).
    ``forbids``: those ``before`` may forbid tokens, so that none may be left of those that a grammar allows.
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
    """Apply all processors to ``scores`` fp32 ``[rows, vocabulary]`` of the token after ``tokens`` int64 ``[rows, n]``.

    Writes into ``scores``. To save passes over the vocabulary, processors that do nothing at this length are skipped,
    and those that only change scores of ``tokens`` are given the scores of those tokens alone.
    """
    for processor in processors:
        if type(processor) in OF_TOKENS:
            # Some models have no scores for the last few ids of their tokenizer.
            known = torch.where(tokens < scores.shape[1], tokens, tokens[:, :1])
            columns = torch.arange(known.shape[1], device=known.device).expand_as(known)
            scores.scatter_(1, known, processor(columns, scores.gather(1, known)))
        elif not (type(processor) in RESTS and RESTS[type(processor)](processor, tokens.shape[1])):
            scores = processor(tokens, scores)
    return scores


def make_rules(
    settings: Mapping[str, Any], *, eos_ids: Collection[int], prompt: torch.Tensor, longest: int, vocabulary: int
) -> Rules:
    """The processors of ``generate`` under ``settings`` for ``prompt`` int64 ``[1, n]``, on its device.

    ``longest``: most tokens of prompt and answer together. Raises what transformers raises for a setting that it
    rejects.
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
