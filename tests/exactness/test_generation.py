"""A checkpoint's generation settings: tokens are those of transformers' ``generate`` under the same ones."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import engine_for, plain_model, prepared, prompt
from settled import Settings, generated
from traced import save_model
from transformers import GenerationConfig

from rrm_engine.bench.cli import main as bench
from rrm_engine.engine.draw import draw
from rrm_engine.engine.processors import Processors
from rrm_engine.engine.rules import WARPERS
from rrm_engine.engine.sampler import SamplingParams, noise_key
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.table import BlockTable
from rrm_engine.loading.generation import HONOURED, WITHOUT_EFFECT, read_generation
from rrm_engine.loading.prepare import LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
ENDS = list(range(4, 500, 9))  # so many that a random model meets them
BUDGET = 16
WIDE = [[*range(2, 302, 2)], [*range(1, 301, 2)]]  # prompts with many tokens of the vocabulary
AFTER_SEVEN = [*(i for other in range(2, 182) for i in (7, other)), 7]
SHORT = {"no_repeat_ngram_size": 1, "suppress_tokens": [*range(0, 500, 3)]}
# By setting: values for which it makes a difference, and prompts to use where an ordinary one would show none.
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


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.set_num_threads(1)
    return plain_model("qwen3")


@pytest.fixture(scope="module")
def tiny(plain: Any) -> LoadedModel:
    return prepared(plain)


# one setting


def test_every_setting_has_a_case() -> None:
    assert {*CASES, *FILTERS} >= {*HONOURED}


@pytest.fixture(scope="module")
def alone(plain: Any) -> list[tuple[str, Settings, list[int], list[int]]]:
    """Each case after several prompts: its name, settings, prompt and what ``generate`` writes."""
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


def test_the_longest_sequence_ends_a_phase_as_a_budget_does(plain: Any, tiny: LoadedModel) -> None:
    """What is forced at the end comes where the sequence may not grow any more, with budget left."""
    engine = engine_for(tiny, max_sequence_tokens=40)
    settings = {"forced_eos_token_id": 4}
    sequence = engine.submit("root", prompt(1, 30), BUDGET, SamplingParams.of(settings))
    while engine.has_work:
        engine.step()
    assert sequence.tokens[30:] == generated(plain, prompt(1, 30), settings, 10, None)
    assert sequence.tokens[-1] == 4


def test_what_is_cut_off_is_not_read_any_more(tiny: LoadedModel) -> None:
    """A 9 follows every 5: also a 5 that stands where another token has been read before."""
    engine = engine_for(tiny)
    params = SamplingParams.of({"sequence_bias": [[[5, 9], 90.0]]})
    sequence = engine.submit("root", prompt(1, 20), 12, params)
    while engine.has_work:
        engine.step()
    assert 9 not in sequence.tokens[20:]
    engine.truncate(sequence, 27)
    engine.resume(sequence, [7, 5], 2)
    while engine.has_work:
        engine.step()
    assert sequence.tokens[29] == 9


# in the life of a graph


# sampling

ASKED: dict[str, Settings] = {
    "nothing but to sample": {},  # transformers has a top_k of its own
    "top_k off": {"top_k": 0},
    "top_h": {"top_h": 0.4, "top_k": 0},
    "typical_p": {"typical_p": 0.5, "temperature": 1.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.05, "top_p": 0.95},
    "as Qwen2.5 has it": {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "many": {"min_p": 0.02, "top_p": 0.9, "typical_p": 0.9, "suppress_tokens": [*range(0, 500, 3)], "top_k": 0},
}


def asked_of(plain: Any, settings: Settings) -> SamplingParams:
    """What a checkpoint asks for that samples with these settings."""
    model = SimpleNamespace(generation_config=GenerationConfig(do_sample=True, **settings))
    return SamplingParams.of(read_generation(model).sampling)


def drawn(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """The token of each row, sampled after all tokens of its sequence."""
    lengths = [len(s.tokens) for s in sequences]
    rows = [row for row, s in enumerate(sequences) if s.sampling.further]
    processed = Processors(frozenset(ENDS)).of(rows, sequences, lengths) if rows else None
    return draw(logits, sequences, lengths, processed).tolist()


def sequence(name: str, tokens: list[int], params: SamplingParams, matcher: Any = None) -> Sequence:
    table = BlockTable(BlockPool(1, 4))
    return Sequence(name, tokens, table, params, noise_key(0, name), BUDGET, matcher=matcher, first=len(tokens))


@pytest.mark.parametrize("settings", ASKED.values(), ids=ASKED)
def test_probabilities_are_those_of_generate(plain: Any, settings: Settings) -> None:
    """Over many draws exactly the tokens that ``generate`` may give come up, about as often as they should."""
    tokens, draws = prompt(5, 40), 1_500
    config = GenerationConfig(do_sample=True, **settings, eos_token_id=ENDS, pad_token_id=0, max_new_tokens=1)
    out = plain.generate(
        torch.tensor([tokens]), generation_config=config, output_scores=True, return_dict_in_generate=True
    )
    probs = out.scores[0].softmax(-1)[0]
    logits = plain(input_ids=torch.tensor([tokens])).logits[0, -1:]
    params = asked_of(plain, settings)
    rows = drawn(logits.repeat(draws, 1), [sequence(f"{i}", list(tokens), params) for i in range(draws)])
    counts = torch.bincount(torch.tensor(rows), minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    assert (counts / draws - probs).abs().max() < 0.045
    assert (probs > 0).sum() < 500 or settings == {"top_k": 0}


def test_a_draw_does_not_depend_on_its_neighbours(plain: Any) -> None:
    """Rows of many settings and lengths, alone, together, and in another order."""
    params = [SamplingParams(), SamplingParams(0.9), SamplingParams(0.9, top_k=7), SamplingParams(1.1, top_p=0.9)]
    params += [asked_of(plain, settings) for settings in ASKED.values()]
    params += [SamplingParams.of({"temperature": 0.9, **settings}) for settings, _ in CASES.values()]
    sequences = [sequence(f"{i}", prompt(i, 3 + 5 * i % 60), params[i % len(params)]) for i in range(3 * len(params))]
    logits = 4 * torch.randn(len(sequences), 500, generator=torch.Generator().manual_seed(3))
    together = drawn(logits.clone(), sequences)
    assert together == [drawn(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]
    assert together == drawn(logits.flip(0), sequences[::-1])[::-1]


class Only:
    """A grammar that allows a few tokens."""

    def __init__(self, *allowed: int) -> None:
        bits = np.zeros(512, dtype=np.uint8)
        bits[list(allowed)] = 1
        self.bits = np.packbits(bits, bitorder="little").view(np.int32)

    def mask(self) -> np.ndarray:
        return self.bits

    def accept(self, token: int) -> None: ...


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_left_the_grammar_goes_before_the_checkpoint(temperature: float) -> None:
    """Forbidden by the settings, one token or all that a grammar allows; in a row beside others."""
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    suppress = {"temperature": temperature, "suppress_tokens": [7, 8], "exponential_decay_length_penalty": [0, 2.0]}
    ban = {"temperature": temperature, "no_repeat_ngram_size": 1, "remove_invalid_values": True}
    rows = [
        sequence("one of two is left", [1, 2], SamplingParams.of(suppress), Only(7, 9)),
        sequence("none is left", [1, 2], SamplingParams.of(suppress), Only(7, 8)),
        sequence("none is left, as numbers", [7, 8, 2], SamplingParams.of(ban), Only(7, 8)),
        sequence("nothing to do with it", [1, 2], SamplingParams(temperature)),
    ]
    one, two, three, four = drawn(logits.clone(), rows)
    assert one == 9 and two in (7, 8) and three in (7, 8)
    assert four == drawn(logits[3:].clone(), rows[3:])[0]
    if temperature == 0:
        best = int(logits[1, 7] < logits[1, 8]), int(logits[2, 7] < logits[2, 8])
        assert (two, three) == (7 + best[0], 7 + best[1])


def test_where_nothing_is_left_without_a_grammar_the_settings_are_set_aside() -> None:
    logits = torch.randn(1, 500)
    one = sequence("all", [1, 2], SamplingParams.of({"suppress_tokens": [*range(500)]}))
    assert drawn(logits.clone(), [one]) == logits.argmax(-1).tolist()


# what a checkpoint says


def test_every_setting_of_transformers_is_known() -> None:
    """Of a new release's settings somebody has to say whether they are honoured; until then they are named."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    named = {"max_length", "max_new_tokens", "num_return_sequences", "num_beams", "num_beam_groups", "penalty_alpha"}
    named |= {"dola_layers", "constraints", "force_words_ids", "guidance_scale", "stop_strings", "max_time"}
    named |= {"token_healing", "cache_implementation"}
    assert names <= {*WARPERS, *HONOURED, *WITHOUT_EFFECT, *named}


@pytest.mark.parametrize(
    ("settings", "sampling", "ignored"),
    [
        ({}, {"temperature": 0.0, "top_k": 50, "top_p": 1.0}, []),
        ({"do_sample": False, "temperature": 0.6, "top_k": 9}, {"temperature": 0.0, "top_k": 9, "top_p": 1.0}, []),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}, []),
        (
            {"do_sample": True, "temperature": 0.6, "min_p": 0.1, "repetition_penalty": 1.0, "typical_p": 1.0},
            {"temperature": 0.6, "top_k": 50, "top_p": 1.0, "min_p": 0.1},
            [],
        ),
        (
            {"sequence_bias": {(3, 4): 1.5}, "suppress_tokens": None, "no_repeat_ngram_size": 0},
            {"temperature": 0.0, "top_k": 50, "top_p": 1.0, "sequence_bias": [[[3, 4], 1.5]]},
            [],
        ),
        (
            {"num_beams": 4, "guidance_scale": 1.0, "stop_strings": ["###"], "use_cache": False, "pad_token_id": 3},
            {"temperature": 0.0, "top_k": 50, "top_p": 1.0},
            ['stop_strings ["###"]', "num_beams 4"],
        ),
        (
            {"max_new_tokens": 300, "penalty_alpha": 0.6, "presence_penalty": 1.5, "token_healing": False},
            {"temperature": 0.0, "top_k": 50, "top_p": 1.0},
            ["max_new_tokens 300 (each phase has its own budget)", "penalty_alpha 0.6", "presence_penalty 1.5"],
        ),
    ],
)
def test_what_is_read(settings: Settings, sampling: Settings, ignored: list[str]) -> None:
    found = read_generation(SimpleNamespace(generation_config=GenerationConfig(**settings)))
    assert found.sampling == sampling and sorted(found.ignored) == sorted(ignored)


def test_settings_survive_json() -> None:
    for settings, _ in CASES.values():
        params = SamplingParams.of({"temperature": 0.5, **settings})
        again = SamplingParams.of(json.loads(json.dumps(params.settings())))
        assert again == params and hash(again) == hash(params)
        assert params.settings() == {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    assert params.without("suppress_tokens") == SamplingParams.of({"temperature": 0.5, "repetition_penalty": 1.7})


# the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a task."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "model")
    (folder / "tasks.jsonl").write_text('{"problem": "What is 1 + 1?"}\n')
    return folder


def run_with(saved: Path, out: Path, settings: Any, *flags: str) -> int:
    """The exit code of a short run of the model with this generation_config, or its text."""
    text = settings if isinstance(settings, str) else json.dumps({"eos_token_id": [1, None, -1], **settings})
    (saved / "model" / "generation_config.json").write_text(text)
    always = ["--constrain", "on", "--direct-max-tokens", "8", "--kv-blocks", "100", "--modes", "direct"]
    paths = ["--model", str(saved / "model"), "--out", str(out), "--prompt-style", "embedded"]
    return bench([str(saved / "tasks.jsonl"), *always, *paths, *flags])


def test_a_run_says_what_it_honours_and_what_it_does_not(saved: Path, tmp_path: Path, capsys: Any) -> None:
    settings = {"do_sample": True, "repetition_penalty": 1.2, "num_beams": 4, "top_k": -1}
    assert run_with(saved, tmp_path / "a", settings, "--samples", "2") == 0
    line = "generation_config: repetition_penalty 1.2 (rests where a grammar holds), not honoured: num_beams 4"
    assert line in " ".join(capsys.readouterr().err.split())
    about = json.loads((tmp_path / "a" / "run.json").read_text())["solver"]
    usual = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert about["sampling"]["direct"] == {**usual, "repetition_penalty": 1.2} and about["sampling"]["graph"] == usual
    assert about["generation_ignored"] == ["num_beams 4"] and 1 in about["eos_token_ids"]

    rows = tmp_path / "a" / "rows.jsonl"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    (saved / "model" / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    assert bench(["--resume", str(tmp_path / "a")]) == 2
    assert "the direct phase samples with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [
        (["--generation-config", "ignore"], {"temperature": 0.0, "top_k": 0}),
        (["--repetition-penalty", "1"], {"temperature": 0.7, "top_k": 50, "suppress_tokens": [3]}),
        (
            ["--repetition-penalty", "1.5", "--temperature", "0", "--top-k", "7"],
            {"temperature": 0.0, "top_k": 7, "suppress_tokens": [3], "repetition_penalty": 1.5},
        ),
    ],
)
def test_flags_go_before_the_checkpoint(saved: Path, tmp_path: Path, flags: list[str], sampling: Settings) -> None:
    settings = {"do_sample": True, "repetition_penalty": 1.2, "temperature": 0.7, "suppress_tokens": [3]}
    assert run_with(saved, tmp_path / "a", settings, "--quiet", *flags) == 0
    about = json.loads((tmp_path / "a" / "run.json").read_text())["solver"]
    assert about["sampling"]["direct"] == {"top_p": 1.0, "min_p": 0.0, **sampling}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repetition_penalty": -1.0}, "strictly positive float"),
        ({"repetition_penalty": "1.1"}, "strictly positive float"),
        ({"do_sample": True, "temperature": -0.5}, "temperature"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "typical_p": -0.5}, "typical_p"),
        ({"sequence_bias": [[[99999], 1.0]]}, "vocabulary size"),
        ({"bad_words_ids": [3]}, "list of lists"),
        ({"suppress_tokens": 5}, "not iterable"),
        ({"max_new_tokens": 0}, "greater than 0"),
        ("[]", "generation_config.json"),
        ('{"do_sample": tru', "generation_config.json"),
    ],
)
def test_what_transformers_does_not_take_is_refused(
    saved: Path, tmp_path: Path, settings: Any, said: str, capsys: Any
) -> None:
    assert run_with(saved, tmp_path / "a", settings) == 2
    told = capsys.readouterr().err
    assert said in told and "generation_config" in told and "Traceback" not in told and told.count("error:") == 1
    assert not (tmp_path / "a").exists()
