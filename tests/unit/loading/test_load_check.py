"""The check at load in low precision: rounding is never refused, and small faults of every kind are, layer by layer."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracle import COMMON, Attending, engine_for, plain_model, prepared, prompt
from rrm_kernels.batch import PagedAttention, Scores
from rrm_kernels.reference import paged_attention
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.loading import check
from rrm_engine.loading.check import ALLOWED, Check, plain_runs
from rrm_engine.loading.places import PLAIN_ATTENTION, register_plain_attention
from rrm_engine.loading.plain import Plain
from rrm_engine.loading.prepare import LoadedModel, UnsupportedModel
from rrm_engine.models.attention import ATTENTION_NAME, choose_attention, register_attention, transformers_forward
from rrm_engine.models.fuse import fuse
from rrm_engine.models.lean import LeanForward, lean_forward
from rrm_engine.models.spread import decoder_layers

CPU = torch.device("cpu")
BLOCK = 16
Change = Callable[["Case", pytest.MonkeyPatch], PagedAttention | None]


@dataclass
class Case:
    """A model ready to be checked, and what its plain runs had; ``biases`` are the last layer's of q, k and v."""

    model: Any
    plain: list[Plain]
    attend: PagedAttention
    biases: list[torch.Tensor]

    @property
    def layers(self) -> Any:
        return decoder_layers(self.model)[1]

    @torch.inference_mode()
    def deviations(self, attend: PagedAttention | None = None) -> list[float]:
        """How far off each way to run it is: the lean one, if there is one, and transformers' own modules."""
        lean = lean_forward(self.model, [CPU] * len(self.layers), self.attend)
        found = []
        for forward in (lean, transformers_forward(self.model)):
            if forward is not None:
                result = Check(forward, self.plain, self.layers, CPU, attend or self.attend).result(len(self.layers))
                assert "fails" not in (result.reason or "")
                assert (result.deviation > ALLOWED[self.model.dtype]) == ("in the" in (result.reason or ""))
                found.append(result.deviation)
        return found


def make_case(model: Any, tokenizer: Any = None) -> Case:
    register_attention()
    register_plain_attention()
    model.set_attn_implementation(PLAIN_ATTENTION)
    layers = decoder_layers(model)[1]
    with torch.inference_mode():
        plain = plain_runs(model, layers, [CPU] * len(layers), tokenizer)
        model.set_attn_implementation(ATTENTION_NAME)
        biases = _padded_biases(layers[-1].self_attn)
        fuse(model)
    return Case(model, plain, choose_attention("auto", CPU, model.dtype)[1], biases)


def _padded_biases(attention: Any) -> list[torch.Tensor]:
    """Each one alone, with zeros for the others."""
    biases = [getattr(attention, name).bias for name in ("q_proj", "k_proj", "v_proj") if hasattr(attention, name)]
    if any(bias is None for bias in biases):
        return []
    zeros = [torch.zeros_like(bias) for bias in biases]
    return [torch.cat([*zeros[:i], bias, *zeros[i + 1 :]]) for i, bias in enumerate(biases)]


def changed_scores(change: Callable[[Scores], Scores]) -> Change:
    def attend_otherwise(case: Case, monkeypatch: pytest.MonkeyPatch) -> PagedAttention:
        return Attending(
            lambda query, keys, values, batch, scores: case.attend(query, keys, values, batch, change(scores))
        )

    return attend_otherwise


def scale(factor: float) -> Change:
    return changed_scores(lambda scores: replace(scores, scale=factor * scores.scale))


def window(more: int) -> Change:
    return changed_scores(lambda scores: replace(scores, window=scores.window and scores.window + more))


def no_softcap() -> Change:
    return changed_scores(lambda scores: replace(scores, softcap=None))


def swapped(case: Case, monkeypatch: pytest.MonkeyPatch) -> PagedAttention:
    return Attending(lambda query, keys, values, batch, scores: case.attend(query, values, keys, batch, scores))


def changed_step(change: Callable[[Any], None]) -> Change:
    def pack_otherwise(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        pack = check.pack

        def changed(*given: Any) -> Any:
            step = pack(*given)
            change(step)
            return step

        monkeypatch.setattr(check, "pack", changed)

    return pack_otherwise


def one_position(step: Any) -> None:
    if len(step.positions) > 10:
        step.positions[9] += 1


def decode_position(step: Any) -> None:
    if len(step.positions) <= 2:
        step.positions[0] += 1


def wrong_block(step: Any) -> None:
    batch = step.batch
    for chunk in range(batch.decodes, len(batch.query_lens)):
        if batch.context_lens[chunk] > 2 * batch.block_size:
            batch.block_table[chunk, 1] = batch.block_table[chunk, 0]


def no_norm_weight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = case.layers[len(case.layers) // 2].post_attention_layernorm
    monkeypatch.setattr(norm, "weight", torch.ones_like(norm.weight))


def other_theta(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = case.model.model.rotary_emb
    monkeypatch.setitem(rotary._buffers, "inv_freq", rotary.inv_freq**1.02)


def skipped_bias(index: int) -> Change:
    """Of queries, keys or values, in the last layer."""

    def skip(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        merged = case.layers[-1].self_attn.q_proj.merged
        product, bias = merged.product, case.biases[index]
        monkeypatch.setattr(merged, "product", lambda x: product(x) - bias)

    return skip


FAULTS: dict[str, Change] = {
    "scale 5 % up": scale(1.05),
    "scale 5 % down": scale(0.95),
    "keys and values swapped": swapped,
    "one position": changed_step(one_position),
    "a decode's position": changed_step(decode_position),
    "one block": changed_step(wrong_block),
    "a norm's weight": no_norm_weight,
    "theta": other_theta,
}


@pytest.fixture(scope="module")
def smollm2(published_smollm2: tuple[Any, Any]) -> Case:
    model, tokenizer = published_smollm2
    return make_case(copy.deepcopy(model).to(torch.bfloat16).eval(), tokenizer)


def test_a_real_checkpoint_is_not_refused_for_rounding(smollm2: Case) -> None:
    assert max(smollm2.deviations()) < ALLOWED[torch.bfloat16] / 2


@pytest.mark.parametrize("name", FAULTS)
def test_faults_on_a_real_checkpoint(smollm2: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = FAULTS[name](smollm2, monkeypatch)
    assert min(smollm2.deviations(attend)) > 1.5 * ALLOWED[torch.bfloat16]


@pytest.fixture(scope="module")
def qwen2() -> Case:
    """Random, with biases as large as the other part of what they are added to."""
    model = plain_model("qwen2")
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.normal_(generator=torch.Generator().manual_seed(len(name)))
    return make_case(model.to(torch.bfloat16))


@pytest.mark.parametrize("index", range(3), ids=["queries", "keys", "values"])
def test_a_skipped_bias(qwen2: Case, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(qwen2.deviations()) < ALLOWED[torch.bfloat16] / 2
    skipped_bias(index)(qwen2, monkeypatch)
    assert min(qwen2.deviations()) > 10 * ALLOWED[torch.bfloat16]


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "gpt_oss"])
def test_a_long_window(family: str) -> None:
    """Longer than the prompts: its edge lies in a drawn past."""
    case = make_case(plain_model(family, sliding_window=128).to(torch.bfloat16))
    assert case.plain[1].past_tokens > 128
    assert max(case.deviations()) < ALLOWED[torch.bfloat16] / 2
    for more in (BLOCK, -BLOCK):
        attend = window(more)(case, pytest.MonkeyPatch())
        assert min(case.deviations(attend)) > 1.5 * ALLOWED[torch.bfloat16], more


def test_a_soft_cap_left_out() -> None:
    case = make_case(plain_model("gemma2").to(torch.bfloat16))
    assert max(case.deviations()) < ALLOWED[torch.bfloat16] / 2
    assert min(case.deviations(no_softcap()(case, pytest.MonkeyPatch()))) > 1.2 * ALLOWED[torch.bfloat16]


def with_outliers(model: Any) -> Any:
    """Some channels of embeddings, norms and projections into the residual a hundred times as large."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = name.split(".")[-2]
            if "embed" in kind:
                weight[:, torch.randint(weight.shape[1], (3,), generator=generator)] *= 100
            elif "norm" in kind or kind in ("down_proj", "fc2"):
                weight[torch.randint(weight.shape[0], (2,), generator=generator)] *= 100
    return model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("opt", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
        ("llama", torch.float32),
    ],
)
def test_deep_stacks_with_outliers_are_not_refused(family: str, dtype: torch.dtype) -> None:
    model = with_outliers(plain_model(family, num_hidden_layers=40)).to(dtype)
    assert prepared(model).forward is not None


def test_an_overflow_in_float16_is_said() -> None:
    model = plain_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e4
        model.model.layers[0].mlp.down_proj.weight *= 1e4
    with pytest.raises(UnsupportedModel, match="overflows in float16, in plain transformers too; use --dtype bfloat16"):
        prepared(copy.deepcopy(model).to(torch.float16))
    assert prepared(model).forward is not None


def test_float16_on_cpu() -> None:
    case = make_case(plain_model("qwen2").to(torch.float16))
    assert max(case.deviations()) < ALLOWED[torch.float16] / 2
    assert min(case.deviations(scale(1.05)(case, pytest.MonkeyPatch()))) > 1.5 * ALLOWED[torch.float16]


def test_float16_holds_the_scores_though_not_what_they_are_scaled_from() -> None:
    """As in some published Qwen2.5: large biases, so that a query times a key is beyond 65,504 before it is scaled."""
    model = plain_model("qwen2", hidden_size=256, num_attention_heads=2)
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            with torch.no_grad():
                part.bias[:] = 30.0
    ids = torch.tensor([prompt(1, 20)])
    model = model.to(torch.float16)
    model.set_attn_implementation("eager")
    assert not model(ids).logits.isfinite().all()
    model.set_attn_implementation("sdpa")
    assert model(ids).logits.isfinite().all()
    assert prepared(model).forward is not None


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "layers [0, 1] never called the attention function"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "layers [0, 1] never called the attention function"),
        ("stablelm", {}, "does not hand our arguments to its attention"),
        ("bert", {"is_decoder": False}, "it differs from plain transformers in the attention"),
        ("openai-gpt", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "transformers' own run of it fails"),
    ],
)
def test_families_that_cannot_be_run_are_refused_with_the_reason(
    family: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        prepared(plain_model(family, **settings))
    assert reason in str(caught.value)
    assert str(caught.value).endswith("models like this are not supported")
    assert "\n" not in str(caught.value)


def test_why_a_slower_forward_is_taken_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LeanForward.__call__
    monkeypatch.setattr(LeanForward, "__call__", lambda self, ids, *rest: run(self, ids.flip(0), *rest))
    model = prepared(plain_model("llama"))
    assert model.slower is not None
    assert "differs from plain transformers" in model.slower
    assert not isinstance(model.forward, LeanForward)


def test_a_router_whose_weight_the_model_reads_itself_is_left_as_it_is() -> None:
    """It looks up the weight's type; what is packed has none to show."""
    plain = plain_model("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2, num_key_value_heads=4)
    model = prepared(plain)
    left = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    assert left == {f"model.layers.{i}.mlp.gate.wg" for i in range(2)}
    assert_equal_to_generate(plain, model)


def assert_equal_to_generate(plain: Any, model: LoadedModel) -> None:
    engine = engine_for(model)
    prompts = [prompt(1, 37), prompt(2, 5)]
    sequences = [engine.submit(str(i), list(tokens), 20, SamplingParams()) for i, tokens in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    for tokens, sequence in zip(prompts, sequences, strict=True):
        ids = torch.tensor([tokens])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, eos_token_id=[-1], do_sample=False
        )
        assert sequence.tokens == expected[0].tolist()


def test_a_text_model_beside_an_image_encoder_of_as_many_layers() -> None:
    text = {**COMMON, "head_dim": 16, "sliding_window": 16}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14})
    torch.manual_seed(7)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    assert decoder_layers(plain)[0] == "model.language_model.layers"
    assert_equal_to_generate(plain, prepared(plain))


def failing(*_: Any) -> torch.Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("fault", [failing, lambda *given: 2 * paged_attention(*given)], ids=["fails", "is wrong"])
def test_the_torch_reference_stands_in_for_an_attention_that(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrm_engine.loading.prepare.choose_attention", lambda *_: ("compiled", Attending(fault)))
    model = prepared(plain_model("llama"))
    assert model.attend is paged_attention and model.slower is None
    assert re.match(r"torch reference \(compiled: (it differs from plain|its forward pass fails)", model.attention)
    with pytest.raises(UnsupportedModel, match=r"--attention sdpa or another --dtype|fails with our attention"):
        prepared(plain_model("llama"), "native")
