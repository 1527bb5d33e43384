"""The forward without modules and its kernels: the same numbers as transformers' own, or not used at all."""

from typing import Any

import pytest
import torch
from oracle import FAMILIES, VARIANTS, compiled, engine_for, plain_model, prepared, prompt, wrong_tokens
from rrm_kernels.native import NativeLayer, load_native_layer
from rrm_kernels.native_decoder import NativeDecoder
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.models.lean import LeanForward, Stage

LEAN = {"llama", "mistral", "qwen2", "qwen3"}
DTYPES = [torch.float32, torch.bfloat16]
ROWS, WIDTH = 5, 96


@pytest.fixture(scope="module", params=VARIANTS)
def layer(request: pytest.FixtureRequest) -> NativeLayer:
    return compiled(lambda: load_native_layer(request.param))


@pytest.fixture(scope="module")
def native() -> NativeLayer:
    return compiled(load_native_layer)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """bf16 to the last bit but for a few roundings of a value in between; fp32 to a few units in the last place."""
    if result.dtype == torch.bfloat16:
        assert (result != expected).float().mean() < 0.01
    torch.testing.assert_close(result, expected, rtol=4 * torch.finfo(result.dtype).eps, atol=1e-6)


def differs(result: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        assert_same(result, expected)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(layer: NativeLayer, dtype: torch.dtype) -> None:
    x, residual = random(ROWS, WIDTH, dtype=dtype), random(ROWS, WIDTH, dtype=dtype, seed=1) * 3
    module = qwen3.Qwen3RMSNorm(WIDTH, eps=1e-5).to(dtype)
    module.weight.data = random(WIDTH, dtype=dtype)
    out = torch.empty_like(x)
    layer.norm(x, module.weight, 1e-5, out)
    assert_same(out, module(x))
    total = residual + x
    layer.add_norm(x, residual, module.weight, 1e-5, out)
    assert torch.equal(residual, total)
    assert_same(out, module(total))
    assert differs(out, module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu(layer: NativeLayer, dtype: torch.dtype) -> None:
    both = random(ROWS, 2 * WIDTH, dtype=dtype) * 8
    both[0, :4] = torch.tensor([0.0, -200.0, 200.0, -0.0])
    gate, up = both.split(WIDTH, dim=-1)
    out = torch.empty(ROWS, WIDTH, dtype=dtype)
    layer.silu_mul(both, out)
    assert_same(out, torch.nn.functional.silu(gate) * up)
    assert differs(out, gate * up)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotary", [32, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_store(layer: NativeLayer, dtype: torch.dtype, rotary: int, normed: bool) -> None:
    heads, kv_heads, width = 6, 2, 32
    qkv = random(ROWS, (heads + 2 * kv_heads) * width, dtype=dtype)
    norms = (random(width, dtype=dtype), random(width, dtype=dtype, seed=1)) if normed else None
    angle = torch.arange(50)[:, None] * 0.9 ** torch.arange(rotary // 2)
    tables = (angle.cos().to(dtype).float(), angle.sin().to(dtype).float())
    positions, slots = torch.tensor([7, 0, 49, 8, 30]), torch.tensor([9, 4, 15, 5, 11])
    query = torch.empty(ROWS, heads, width, dtype=dtype)
    caches = [torch.zeros(4, 4, kv_heads, width, dtype=dtype) for _ in range(2)]
    layer.rope_store(qkv, norms, 1e-6, tables, positions, slots, query, *caches)

    parts = qkv.view(ROWS, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    q, k = (_normed(part, norms and norms[i]) for i, part in enumerate(parts[:2]))
    cos, sin = (torch.cat([t[positions], t[positions]], -1).to(dtype)[None] for t in tables)
    rotated = qwen3.apply_rotary_pos_emb(q[None, ..., :rotary], k[None, ..., :rotary], cos, sin, unsqueeze_dim=2)
    expected = [torch.cat([r[0], x[..., rotary:]], -1) for r, x in zip(rotated, (q, k), strict=True)]
    assert_same(query, expected[0])
    assert_same(caches[0].flatten(0, 1)[slots], expected[1])
    assert torch.equal(caches[1].flatten(0, 1)[slots], parts[2])
    assert differs(query, q)
    others = [i for i in range(16) if i not in slots.tolist()]
    assert all(not cache.flatten(0, 1)[others].any() for cache in caches)


def _normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return x
    module = qwen3.Qwen3RMSNorm(x.shape[-1], eps=1e-6).to(x.dtype)
    module.weight.data = weight
    return module(x)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_models_run_lean(native: NativeLayer, family: str) -> None:
    plain = plain_model(family)
    assert isinstance(prepared(plain).forward, LeanForward) == (family in LEAN)
    assert not isinstance(prepared(plain, "sdpa").forward, LeanForward)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"rms_norm_eps": 0.5}, {"attention_bias": True}], ids=str)
def test_variants_of_a_known_class_are_run_exactly(native: NativeLayer, changes: dict[str, Any]) -> None:
    plain = plain_model("llama", **changes)
    model = prepared(plain)
    assert isinstance(model.forward, LeanForward) == ("hidden_act" not in changes)
    engine = engine_for(model)
    sequence = engine.submit("root", prompt(1, 30), 20, SamplingParams())
    while engine.has_work:
        engine.step()
    assert wrong_tokens(plain, sequence.tokens, [(30, 50)]) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in sorted(LEAN)), ("llama", {"attention_bias": True, "rms_norm_eps": 0.5})],
    ids=str,
)
def test_layers_in_one_call_write_the_bits_of_layers_one_by_one(
    family: str, changes: dict[str, Any], dtype: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of one to six decodes, over contexts beyond a window of 16; a rotation by other angles shows in them.

    Every norm has weights of its own, so that none can stand for another.
    """
    plain = plain_model(family, **changes).to(dtype)
    for seed, (name, weight) in enumerate(plain.named_parameters()):
        if "norm" in name:
            weight.data = 1 + 0.3 * random(*weight.shape, dtype=dtype, seed=seed)
    model = prepared(plain)
    in_one_call = logits_of_decodes(model)
    assert {1, 5} <= set(calls)
    calls.clear()
    monkeypatch.setattr(Stage, "in_one_call", False)
    one_by_one = logits_of_decodes(model)
    assert not calls and len(in_one_call) == len(one_by_one)
    assert all(map(torch.equal, in_one_call, one_by_one))
    monkeypatch.setattr(Stage, "in_one_call", True)
    assert isinstance(model.forward, LeanForward)
    stage = model.forward.stages[0]
    stage.tables = stage.tables[0], -stage.tables[1]
    assert not all(map(torch.equal, in_one_call, logits_of_decodes(model)))


def test_threads_change_no_bit(native: NativeLayer) -> None:
    """Nor do more threads than processors, of which some come late to everything."""
    model = prepared(plain_model("qwen3", intermediate_size=2048))  # one row is worth several threads
    before, logits = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            logits[threads] = logits_of_decodes(model)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, logits[2], logits[1])) and all(map(torch.equal, logits[5], logits[1]))


@pytest.fixture
def calls(native: NativeLayer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call that runs all layers."""
    rows: list[int] = []
    run = NativeDecoder.__call__

    def noted(self: NativeDecoder, residual: torch.Tensor, *others: Any) -> None:
        rows.append(len(residual))
        run(self, residual, *others)

    monkeypatch.setattr(NativeDecoder, "__call__", noted)
    return rows


def logits_of_decodes(model: LoadedModel) -> list[torch.Tensor]:
    """Those of every step of six sequences that begin one after the other."""
    logits: list[torch.Tensor] = []
    engine = engine_for(model)
    engine.runner.observe = lambda found, _: logits.append(found.clone())
    for i in range(6):
        engine.submit(f"s{i}", prompt(i, 15 + i), 12, SamplingParams())
        for _ in range(2):
            engine.step()
    while engine.has_work:
        engine.step()
    return logits


def test_every_engine_of_a_model_has_its_own_pools(calls: list[int]) -> None:
    """Two that run in turns write what each writes alone."""
    model = prepared(plain_model("qwen3"))

    def begun(seed: int) -> tuple[Engine, Sequence]:
        engine = engine_for(model)
        return engine, engine.submit("root", prompt(seed, 20), 20, SamplingParams())

    alone = []
    for seed in (1, 2):
        engine, sequence = begun(seed)
        while engine.has_work:
            engine.step()
        alone.append(sequence.tokens)
    calls.clear()
    both = [begun(1), begun(2)]
    while any(engine.has_work for engine, _ in both):
        for engine, _ in both:
            engine.step()
    assert [sequence.tokens for _, sequence in both] == alone and len(calls) == 2 * 19


def test_only_steps_of_decodes_run_in_one_call(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts do not, nor does a model with a product that is not compiled."""

    def write(model: LoadedModel) -> list[int]:
        engine = engine_for(model)
        sequence = engine.submit("root", prompt(1, 40), 3, SamplingParams())
        while engine.has_work:
            engine.step()
        return sequence.tokens

    model = prepared(plain_model("qwen3"))
    calls.clear()  # those of the check at load
    tokens = write(model)
    assert calls == [1, 1]
    assert isinstance(model.forward, LeanForward)
    output = model.forward.stages[0].layers[-1].output
    monkeypatch.setattr(output, "product", lambda x, compiled=output.product: compiled(x))
    assert write(model) == tokens and calls == [1, 1]


def test_positions_past_the_first_table(native: NativeLayer) -> None:
    """cos and sin are computed as far as they are needed."""
    plain = plain_model("qwen3")
    engine = engine_for(prepared(plain), blocks=120)
    sequence = engine.submit("root", prompt(1, 250), 40, SamplingParams())
    while engine.has_work:
        engine.step()
    assert wrong_tokens(plain, sequence.tokens, [(250, 290)]) == []


def test_a_lean_forward_that_is_wrong_is_not_used(native: NativeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at load: a rotation by the wrong angles, and the model runs without it."""
    right = NativeLayer.rope_store

    def wrong(self: NativeLayer, qkv: Any, norms: Any, eps: float, tables: Any, *rest: Any) -> None:
        right(self, qkv, norms, eps, tables[::-1], *rest)

    monkeypatch.setattr(NativeLayer, "rope_store", wrong)
    plain = plain_model("qwen3")
    model = prepared(plain)
    assert not isinstance(model.forward, LeanForward)
    assert model.load_check_error < 1e-3


def test_bf16_logits_agree_with_transformers_forward(native: NativeLayer) -> None:
    """Same roundings in the same places: what is left is the order of sums in products and attention."""
    tokenizer: Any = type("Tokenizer", (), {"eos_token_id": 1})()
    errors = {}
    for attention in ("auto", "sdpa"):
        model = prepare_model(plain_model("qwen3").to(torch.bfloat16), tokenizer, "qwen3", attention=attention)
        errors[type(model.forward).__name__] = model.load_check_error
    assert errors.keys() == {"LeanForward", "function"}
    assert max(errors.values()) < 0.1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decodes_that_cross_spans_of_attention(variant: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernel takes 960 tokens at a time: one sequence begins its second span, one its third."""
    monkeypatch.setenv("RRM_CPU_KERNELS", variant)
    plain = plain_model("qwen3", head_dim=64, max_position_embeddings=2048)
    engine = engine_for(prepared(plain), 200, 16, step_tokens=512, max_sequence_tokens=2048)
    lengths, before = (950, 1910), torch.get_num_threads()
    sequences = [engine.submit(f"{n}", prompt(n, n), 20, SamplingParams()) for n in lengths]
    torch.set_num_threads(threads)
    while engine.has_work:
        engine.step()
    torch.set_num_threads(before)
    for sequence, length in zip(sequences, lengths, strict=True):
        assert wrong_tokens(plain, sequence.tokens, [(length, length + 20)]) == []
        # Control: without the first span they would be others.
        assert wrong_tokens(plain, sequence.tokens[900:], [(length - 900, length - 880)])
