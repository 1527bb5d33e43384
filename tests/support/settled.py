"""Generation settings given to an engine's sequences in turn, and generate under the same ones."""

from typing import Any

import torch
from graph_scripts import Script
from transformers import GenerationConfig

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import Driven
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence

Settings = dict[str, Any]
IN_A_GRAPH: list[Settings] = [
    {"repetition_penalty": 2.5},
    {"no_repeat_ngram_size": 1, "suppress_tokens": [*range(0, 500, 3)]},
    {"repetition_penalty": 1.8, "begin_suppress_tokens": [*range(0, 500, 2)], "renormalize_logits": True},
    {"encoder_repetition_penalty": 0.6, "sequence_bias": [[[5], 4.0], [[5, 9], 9.0], [[17], 3.0]]},
    {"bad_words_ids": [*([i] for i in range(0, 500, 2)), *([1, i] for i in range(500))], "forced_eos_token_id": 4},
]


class Settled:
    """Gives an engine's sequences settings in turn, whatever they are submitted with, and notes their phases."""

    def __init__(self, engine: Driven, choices: list[Settings]) -> None:
        self.settings: dict[str, Settings] = {}
        self.phases: dict[str, list[tuple[int, int]]] = {}  # tokens in front, budget
        for one in engine.engines:
            self._watch(one, choices)

    def _watch(self, engine: Engine, choices: list[Settings]) -> None:
        submit, resume = engine.submit, engine.resume

        def settled(key: str, tokens: list[int], budget: int, sampling: SamplingParams, **options: Any) -> Sequence:
            self.settings[key] = choices[len(self.settings) % len(choices)]
            self.phases[key] = [(len(tokens), budget)]
            return submit(key, tokens, budget, SamplingParams.of(self.settings[key]), **options)

        def resumed(sequence: Sequence, tokens: list[int], budget: int, *more: Any) -> None:
            resume(sequence, tokens, budget, *more)
            self.phases[sequence.key].append((len(sequence.tokens), budget))

        engine.submit, engine.resume = settled, resumed  # type: ignore[method-assign, assignment]

    def unlike_generate(self, plain: Any, script: Script, choices: list[Settings] | None = None) -> list[str]:
        """Keys of the sequences whose tokens are not, phase by phase, what ``generate`` writes after the transcript.

        ``choices`` are the settings of ``generate``, where they are not those of the engine.
        """
        wrong = []
        for index, (key, tokens) in enumerate((key, script.done[key]) for key in self.settings if key in script.done):
            settings = self.settings[key] if choices is None else choices[index % len(choices)]
            for (first, budget), (_, stop) in zip(self.phases[key], script.ranges[key], strict=True):
                if generated(plain, tokens[:first], settings, budget, None)[: stop - first] != tokens[first:stop]:
                    wrong.append(key)
        return wrong


def generated(plain: Any, tokens: list[int], settings: Settings, budget: int, ends: list[int] | None) -> list[int]:
    """What ``generate`` writes after ``tokens``."""
    config = GenerationConfig(**settings, eos_token_id=ends, pad_token_id=0, do_sample=False, max_new_tokens=budget)
    return plain.generate(torch.tensor([tokens]), generation_config=config)[0, len(tokens) :].tolist()
