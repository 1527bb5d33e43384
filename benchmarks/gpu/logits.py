"""The engine's tokens and logits against plain transformers, on small random models of several families."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu.lab import BLOCK_SIZE, Lab, Row, random_tokens
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.loading.engines import build_engine
from rrm_engine.loading.prepare import LoadedModel, prepare_model

COMMON: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,  # so that greedy choices are far apart
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "gemma2": {"head_dim": 16, "sliding_window": 64},
    "gpt_oss": {"head_dim": 16, "sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = (40, 7, 90, 33)  # of the prompts; the third one is prefilled in chunks


def run(lab: Lab, rows: list[Row]) -> None:
    families = ["qwen3"] if lab.tiny else list(FAMILIES)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for family in families:
            try:
                rows += _family(lab, family, dtype)
            except Exception as error:  # one family's: the others are still compared
                rows.append({"family": family, "dtype": str(dtype), "error": f"{type(error).__name__}: {error}"})
                wrong.append(family)
    wrong += [r["family"] for r in rows if r["dtype"] == "float32" and r["agreement"] < 1]
    if wrong:
        raise AssertionError(f"not like plain transformers: {', '.join(wrong)}")


def _family(lab: Lab, family: str, dtype: torch.dtype) -> list[Row]:
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    torch.manual_seed(7)
    with lab.device:
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    no_tokenizer: Any = SimpleNamespace(eos_token_id=1)
    model = prepare_model(copy.deepcopy(plain), no_tokenizer, family, lab.device, lab.attention)
    return [_compare(lab, plain, model, family, eager) for eager in (False, True)]


def _compare(lab: Lab, plain: Any, model: LoadedModel, family: str, eager: bool) -> Row:
    tokens = 8 if lab.tiny else 48
    settings = EngineSettings(
        blocks=200, block_size=BLOCK_SIZE, max_sequence_tokens=600, max_sequences=8, step_tokens=64, eager=eager
    )
    engine = build_engine(model, settings)
    sequences = [
        engine.submit(f"s{i}", random_tokens(length, 500, i), tokens, SamplingParams(), root=i)
        for i, length in enumerate(LENGTHS)
    ]
    while engine.has_work:
        engine.step()
    same = 0
    for sequence, length in zip(sequences, LENGTHS, strict=True):
        ids = torch.tensor([sequence.tokens], device=lab.device)
        best = plain(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        same += sum(best[i - 1] == sequence.tokens[i] for i in range(length, length + tokens))
    return {
        "family": family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "forward": type(model.forward).__name__,
        "attention": model.attention,
        "eager": eager,
        "load_check_error": model.load_check_error,
        "agreement": same / (tokens * len(LENGTHS)),
        "graphs": sum(len(share.graphs) for share in engine.runner.static.shares),
    }
