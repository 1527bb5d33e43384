"""Helpers of the exactness tests: tiny models of many families, and the check against plain transformers."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from rrm_kernels.batch import PagedAttention
from rrm_kernels.build import runnable_variants
from rrm_kernels.native import NativeUnavailable
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rrm_engine.engine.draw import draw
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.host import SwapCosts
from rrm_engine.loading.engines import build_engine
from rrm_engine.loading.prepare import LoadedModel, prepare_model

Loaded = TypeVar("Loaded")


class Attending(PagedAttention):
    """A function as an attention backend."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def __call__(self, *given: Any) -> torch.Tensor:
        return self.function(*given)


VOCABULARY = 500
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,  # so that greedy choices are far apart
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **MOE},
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 16},  # sliding window
    "gemma2": {"head_dim": 16, "sliding_window": 16},  # soft-cap and sliding window
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2},  # two rotations
    "gpt_oss": {"head_dim": 16, "sliding_window": 16, **MOE},  # sinks
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # learned positions
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "deepseek_v3": MLA,  # K and V of different width
    "cohere2": {"sliding_window": 16},
    "granite": {},
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def plain_model(family: str, **changes: Any) -> Any:
    """A tiny random model of ``family`` as transformers makes it, fp32, always the same weights."""
    return _random_model(family, 7, {**COMMON, **FAMILIES.get(family, {}), **changes})


def _random_model(family: str, seed: int, settings: Mapping[str, Any]) -> Any:
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def chat_tokenizer(writing: Sequence[str] = (), **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a ChatML template, its merges trained on ``writing``; without, bytes are tokens.

    ``options`` are those of the trainer. Merges may cross anything, so that events end in the middle of tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if writing:
        trainer = trainers.BpeTrainer(**{"special_tokens": SPECIAL, "show_progress": False, **options})
        core.train_from_iterator(writing, trainer)
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def chat_model(tokenizer: PreTrainedTokenizerFast, leanings: Mapping[str, float] | None = None, **changes: Any) -> Any:
    """A tiny random Qwen3 that ends with the tokenizer's end of sequence, fp32, always the same weights.

    ``leanings`` are added to the logits of tokens by what their text begins with; the hidden states share a constant
    direction that carries them. Without any a random model would hardly ever close a string.
    """
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    settings = {"vocab_size": len(tokenizer), "head_dim": 16, "max_position_embeddings": 2048, **ids, **changes}
    model = _random_model("qwen3", 3, {**COMMON, **settings})
    if leanings is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 3.0
            constant = float(model.model(input_ids=torch.arange(50)[None]).last_hidden_state[0, :, 0].mean())
            model.lm_head.weight[:, 0] = 0.0
            for token in range(len(tokenizer)):
                text = tokenizer.decode([token])
                leaning = next((v for k, v in leanings.items() if text.startswith(k)), 0.0)
                model.lm_head.weight[token, 0] = leaning / constant
    return model


def prepared(plain: Any, attention: str = "auto") -> LoadedModel:
    """A copy of ``plain`` made ready for the engine."""
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    return prepare_model(copy.deepcopy(plain), tokenizer, plain.config.model_type, attention=attention)


def engine_for(
    model: LoadedModel, blocks: int = 200, block_size: int = 4, costs: SwapCosts | None = None, **changes: Any
) -> Engine:
    settings: dict[str, Any] = {"step_tokens": 16, "max_sequence_tokens": min(blocks * block_size, 400), **changes}
    return build_engine(model, EngineSettings(blocks=blocks, block_size=block_size, **settings), costs=costs)


VARIANTS = [name for name in ("native", "avx2", "plain") if name in runnable_variants()]  # those that differ here


def compiled(load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` compiles; the test is skipped where that cannot be."""
    import pytest  # here, for the soak benchmark takes its model from this file and needs no pytest

    try:
        return load()
    except NativeUnavailable as error:
        pytest.skip(f"no compiled kernels here: {error}")


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


@torch.inference_mode()
def wrong_tokens(plain: Any, tokens: list[int], sampled: Iterable[tuple[int, int]]) -> list[int]:
    """Positions in the ``sampled`` ranges where plain transformers' greedy token on ``tokens`` is another one."""
    logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    best = logits.argmax(-1).tolist()
    return [i for start, stop in sampled for i in range(start, stop) if best[i - 1] != tokens[i]]


def sample(logits: torch.Tensor, sequences: Sequence[Any]) -> list[int]:
    """The token that each row of ``logits`` ``[rows, vocabulary]`` gives after the tokens of its sequence."""
    return draw(logits, sequences, [len(s.tokens) for s in sequences]).tolist()
