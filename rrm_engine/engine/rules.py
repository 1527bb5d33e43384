"""A phase's logits processors: those that transformers' ``generate`` makes of the same settings.

What in ``generate`` is the prompt is here all tokens in front of the phase: its system text and task, and after a
resume or a fork also what the node or its parent wrote before. So penalties see the whole transcript, and minima of
new tokens count from the first token of the phase.
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
