"""A checkpoint's generation settings: tokens are those of transformers' ``generate`` under the same ones."""

from typing import Any, get_args

import pytest
import torch
from oracle import engine_for, plain_model, prepared, prompt
from test_engine_oracle import Script, crowded, live_graph
from test_wait_policies import policy_engine, waiting_graph
from transformers import GenerationConfig

from rrm_engine.engine.prepare import LoadedModel
from rrm_engine.engine.replicas import AnyEngine, Replicas
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import WaitPolicy
from rrm_engine.engine.sequence import Sequence
from rrm_engine.models.generation import HONOURED

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
Settings = dict[str, Any]
ENDS = list(range(4, 500, 9))  # so many that a random model meets them
BUDGET = 16
WIDE = [[*range(2, 302, 2)], [*range(1, 301, 2)]]  # prompts with many tokens of the vocabulary
AFTER_SEVEN = [*(i for other in range(2, 182) for i in (7, other)), 7]
SHORT = {"no_repeat_ngram_size": 1, "suppress_tokens": [*range(0, 500, 3)]}
# By setting: some that show it, and what to write them behind where an ordinary prompt would not.
CASES: dict[str, tuple[Settings, list[list[int]]]] = {
    "repetition_penalty": ({"repetition_penalty": 1.4}, WIDE),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 2.0}, WIDE),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, [AFTER_SEVEN]),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 1}, WIDE),
    "bad_words_ids": ({"bad_words_ids": [*([i] for i in range(0, 500, 2)), *([1, i] for i in range(500))]}, []),
    "sequence_bias": ({"sequence_bias": [[[5], 4.0], [[5, 9], 9.0], [[17], 3.0]]}, []),
    "suppress_tokens": ({"suppress_tokens": [*range(0, 500, 2)]}, []),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [*range(0, 500, 2)]}, []),
    "min_length": ({"min_length": 30}, [prompt(1, 28), prompt(2, 29), prompt(3, 27)]),
    "min_new_tokens": ({"min_new_tokens": 9}, []),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": [2, 1.6]}, []),
    "forced_bos_token_id": ({"forced_bos_token_id": 33}, [[3], [9]]),
    "forced_eos_token_id": ({"forced_eos_token_id": 4, "min_new_tokens": BUDGET - 1}, []),
    "remove_invalid_values": ({"remove_invalid_values": True, "suppress_tokens": [*range(0, 500, 2)]}, []),
    "renormalize_logits": ({"renormalize_logits": True, "repetition_penalty": 1.4}, WIDE),
    "watermarking_config": ({"watermarking_config": {"bias": 3.0, "greenlist_ratio": 0.4}}, []),
    "several": ({**SHORT, "repetition_penalty": 1.2, "min_new_tokens": 12, "sequence_bias": [[[5], 4.0]]}, []),
    "suppressed and penalised": ({"suppress_tokens": [*range(0, 500, 2)], "repetition_penalty": 1.7}, []),
}
FILTERS = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}  # of sampling alone
# Without what needs an end of sequence, for graphs here have none.
MIXED = [{}, *(settings for name, (settings, _) in CASES.items() if name != "exponential_decay_length_penalty")]


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.set_num_threads(1)
    return plain_model("qwen3")


@pytest.fixture(scope="module")
def tiny(plain: Any) -> LoadedModel:
    return prepared(plain)


def generated(plain: Any, tokens: list[int], settings: Settings, budget: int, ends: list[int] | None) -> list[int]:
    """What ``generate`` writes behind ``tokens``."""
    config = GenerationConfig(**settings, eos_token_id=ends, pad_token_id=0, do_sample=False, max_new_tokens=budget)
    return plain.generate(torch.tensor([tokens]), generation_config=config)[0, len(tokens) :].tolist()


class Settled:
    """Gives an engine's sequences settings in turn, whatever they are submitted with, and notes their phases."""

    def __init__(self, engine: AnyEngine, choices: list[Settings]) -> None:
        self.settings: dict[str, Settings] = {}
        self.phases: dict[str, list[tuple[int, int]]] = {}  # tokens in front, budget
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
        """Keys of the sequences that have other tokens than ``generate`` writes, phase by phase, behind the transcript.

        ``choices`` are the settings of ``generate``, where they are not those of the engine.
        """
        wrong = []
        for index, (key, tokens) in enumerate((key, script.done[key]) for key in self.settings if key in script.done):
            settings = self.settings[key] if choices is None else choices[index % len(choices)]
            for (first, budget), (_, stop) in zip(self.phases[key], script.ranges[key], strict=True):
                if generated(plain, tokens[:first], settings, budget, None)[: stop - first] != tokens[first:stop]:
                    wrong.append(key)
        return wrong


# one setting


def test_every_setting_has_a_case() -> None:
    assert {*CASES, *FILTERS} >= {*HONOURED}


@pytest.fixture(scope="module")
def alone(plain: Any) -> list[tuple[str, Settings, list[int], list[int]]]:
    """Each case behind several prompts: its name, settings, prompt and what ``generate`` writes."""
    rows, shown = [], set()
    for number, (name, (settings, prompts)) in enumerate(CASES.items()):
        for tokens in [*(prompt(number + i, 5 + i) for i in (0, 4, 9)), *prompts]:
            written = generated(plain, tokens, settings, BUDGET, ENDS)
            rows.append((name, settings, tokens, written))
            if name not in shown and written != generated(plain, tokens, {}, BUDGET, ENDS):
                shown.add(name)
    assert shown == {*CASES}, "a setting that shows nowhere is not tried"
    return rows


@pytest.mark.parametrize("lookahead", [False, True])
def test_rows_with_settings_of_their_own_in_one_batch(tiny: LoadedModel, alone: Any, lookahead: bool) -> None:
    """All cases at once, with many ends of sequence."""
    engine = engine_for(tiny, lookahead=lookahead, eos_ids=frozenset(ENDS), step_tokens=300)
    sequences = [
        engine.submit(f"{index}", list(tokens), BUDGET, SamplingParams.of(settings))
        for index, (_, settings, tokens, _) in enumerate(alone)
    ]
    while engine.has_work:
        engine.step()
    wrong = [
        name
        for (name, _, tokens, written), s in zip(alone, sequences, strict=True)
        if s.tokens[len(tokens) :] != written
    ]
    assert wrong == []


# in the life of a graph


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("lookahead", [False, True])
def test_forks_and_resumes(plain: Any, tiny: LoadedModel, lookahead: bool, stages: int) -> None:
    """What a fork takes over and what a node had written before a resume counts like a prompt."""
    for shift in (0, 9):
        engine = engine_for(tiny, lookahead=lookahead, stages=stages)
        settled = Settled(engine, MIXED[shift:] + MIXED[:shift])
        script = live_graph(engine)
        assert settled.unlike_generate(plain, script) == []
        assert settled.unlike_generate(plain, script, [{}]) != []


@pytest.mark.parametrize("policy", get_args(WaitPolicy))
def test_every_wait_policy(plain: Any, tiny: LoadedModel, policy: WaitPolicy) -> None:
    for blocks, lookahead in ((200, False), (30, True)):
        engine = policy_engine(tiny, policy, blocks, max_sequence_tokens=110, lookahead=lookahead)
        settled = Settled(engine, MIXED[1:])
        assert settled.unlike_generate(plain, waiting_graph(engine)) == []


@pytest.mark.parametrize(("lookahead", "stages"), [(True, 1), (False, 3), (True, 3)])
def test_preemption_and_cancellation(plain: Any, tiny: LoadedModel, lookahead: bool, stages: int) -> None:
    for shift in (0, 9):
        engine = engine_for(tiny, blocks=22, max_sequence_tokens=88, lookahead=lookahead, stages=stages)
        settled = Settled(engine, MIXED[shift:] + MIXED[:shift])
        assert settled.unlike_generate(plain, crowded(engine)) == []


def test_replicas(plain: Any, tiny: LoadedModel) -> None:
    engine: Any = Replicas([engine_for(tiny, lookahead=True) for _ in range(2)])
    settled = Settled(engine, MIXED[1:])
    assert settled.unlike_generate(plain, live_graph(engine)) == []
