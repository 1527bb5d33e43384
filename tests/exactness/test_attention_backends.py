"""Backends of others' kernels: called as their libraries want it, chosen by name, refused with the reason."""

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import plain_model, prepared
from rrm_kernels.batch import Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.flash import FlashAttention, FlashUnavailable, FlashUnsupported, load_flash
from rrm_kernels.reference import paged_attention
from rrm_kernels.varlen import NEEDED, VarlenAttention, load_varlen
from torch.nn.attention.varlen import varlen_attn

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.loading import prepare
from rrm_engine.models.attention import choose_attention

CPU = torch.device("cpu")
BLOCK = 256
SEQS = [(1, 300), (5, 40), (1, 1)]  # query tokens, context
TABLES = [[3, 1], [2], [4]]
QUERIES, CONTEXTS = zip(*SEQS, strict=True)


class Step:
    """Random pools and a packed step of ``SEQS`` over them."""

    def __init__(self, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.key, self.value = (torch.randn(5, BLOCK, 2, 64, generator=generator).to(device, dtype) for _ in range(2))
        self.query = torch.randn(sum(q for q, _ in SEQS), 4, 64, generator=generator).to(device, dtype)
        self.batch = batch_of(QUERIES, CONTEXTS, TABLES, BLOCK, device)

    def expected(self, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        query, key, value = (t.float().cpu() for t in (self.query, self.key, self.value))
        batch = batch_of(QUERIES, CONTEXTS, TABLES, BLOCK, CPU)
        return paged_attention(query, key, value, batch, Scores(0.125, window, softcap))


class Bound:
    """In a library's place: takes what its signature takes, and reads the step as its documentation says."""

    def __init__(self, signature: inspect.Signature, names: dict[str, str]) -> None:
        self.signature = signature
        self.names = names

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        given = self.signature.bind(*args, **options).arguments
        query, key, value = args
        starts, tables = given[self.names["starts"]].tolist(), given["block_table"]
        left = given["window_size"][0]
        lengths = given["seqused_k"] if "seqused_k" in given else given[self.names["keys"]].diff()
        assert len(starts) == len(lengths) + 1 == len(tables) + 1
        assert given[self.names["longest"]] >= max(q for q, _ in SEQS)
        queries = [stop - start for start, stop in pairwise(starts)]
        batch = batch_of(queries, lengths.tolist(), tables.tolist(), BLOCK, CPU)
        window, softcap = left + 1 if left >= 0 else None, given.get("softcap") or None
        scale = given[self.names["scale"]]
        return paged_attention(query.float(), key.float(), value.float(), batch, Scores(scale, window, softcap))


VARLEN = {"starts": "cu_seq_q", "keys": "cu_seq_k", "longest": "max_q", "scale": "scale"}
FLASH = {"starts": "cu_seqlens_q", "keys": "cu_seqlens_k", "longest": "max_seqlen_q", "scale": "softmax_scale"}


@pytest.mark.skipif(
    bool(NEEDED - inspect.signature(varlen_attn).parameters.keys()), reason="this torch's is refused at load"
)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("multiple", [BLOCK, 1])
def test_varlen_is_called_as_torch_wants_it(window: int | None, multiple: int) -> None:
    step = Step()
    attend = VarlenAttention(Bound(inspect.signature(varlen_attn), VARLEN), multiple)
    out = attend(step.query, step.key, step.value, step.batch, Scores(0.125, window))
    assert torch.allclose(out, step.expected(window), atol=1e-5)
    assert not torch.allclose(out, step.expected(3), atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0)])
def test_flash_attn_is_called_as_the_package_wants_it(window: int | None, softcap: float | None) -> None:
    flash = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    step = Step()
    attend = FlashAttention(Bound(inspect.signature(flash.flash_attn_varlen_func), FLASH))
    out = attend(step.query, step.key, step.value, step.batch, Scores(0.125, window, softcap))
    assert torch.allclose(out, step.expected(window, softcap), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels need a GPU")
@pytest.mark.parametrize("load", [load_varlen, load_flash])
@pytest.mark.parametrize("window", [None, 7])
def test_on_a_gpu_they_equal_the_reference(load: Any, window: int | None) -> None:
    device = torch.device("cuda")
    try:
        attend = load(device)
    except FlashUnavailable as error:
        pytest.skip(str(error))
    step = Step(device)
    out = attend(step.query, step.key, step.value, step.batch, Scores(0.125, window)).float().cpu()
    assert torch.allclose(out, step.expected(window), atol=0.02)


def test_what_they_cannot_compute_is_refused() -> None:
    step = Step()
    varlen = VarlenAttention(varlen_attn)
    given = (step.query, step.key, step.value, step.batch, Scores(0.125))
    with pytest.raises(FlashUnsupported, match="soft-cap"):
        varlen(*given[:4], Scores(0.125, softcap=2.0))
    with pytest.raises(FlashUnsupported, match="sinks"):
        varlen(*given[:4], Scores(0.125, sinks=torch.zeros(4)))
    with pytest.raises(FlashUnsupported, match="one width"):
        varlen(*given[:2], step.value[..., :32], *given[3:])
    with pytest.raises(FlashUnsupported, match="not in float32"):
        varlen(step.query.float(), *given[1:])
    with pytest.raises(FlashUnsupported, match="--block-size 256"):
        varlen(step.query, step.key[:, :16], step.value[:, :16], *given[3:])


def test_a_model_they_cannot_run_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "choose_attention", lambda *_: ("varlen", VarlenAttention(varlen_attn)))
    with pytest.raises(prepare.UnsupportedModel, match=r"in float16 and bfloat16, not in float32; --attention triton"):
        prepared(plain_model("qwen3"), "varlen")


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_where_they_cannot_run_the_reason_is_given(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--attention {name}: it runs on CUDA only, not on cpu; --attention sdpa"):
        choose_attention(name, CPU, torch.float32)


def test_without_flash_attn_the_hint_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    with pytest.raises(FlashUnavailable, match=r"pip install 'rrm-engine\[flash\]'"):
        load_flash(torch.device("cuda"))


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> None: ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    with pytest.raises(FlashUnavailable, match="does not take block_table, enable_gqa"):
        load_varlen(torch.device("cuda"))


def test_a_block_size_that_does_not_fit_is_refused() -> None:
    solver = Solver.load(RunConfig(limit=1, kv_blocks=400))
    solver.model.attend = VarlenAttention(varlen_attn)
    with pytest.raises(ValueError, match=r"--block-size 16: --attention auto takes multiples of 256"):
        Solver(solver.model, RunConfig(kv_blocks=400))


def test_the_torch_reference_says_why_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("sdpa", CPU, torch.float32)[0] == "torch reference"  # asked for
    reason = "the compiled kernel takes float32 and bfloat16, not float16"
    assert choose_attention("auto", CPU, torch.float16)[0] == f"torch reference ({reason})"
    with pytest.raises(RrmError, match=f"--attention native: {reason}; --attention sdpa works everywhere"):
        choose_attention("native", CPU, torch.float16)
    monkeypatch.setenv("CXX", "no-such-compiler")
    words, attend = choose_attention("auto", CPU, torch.float32)
    assert words.startswith("torch reference (no-such-compiler could not build it: ") and attend is paged_attention


def test_a_compiler_is_quoted_with_its_first_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    said = ["In file included from x.h:1,", "x.h:9: error: no omp.h", "x.h:10: error: and more"]
    compiler.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}' >&2" for line in said), "exit 1"]))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    words, _ = choose_attention("auto", CPU, torch.float32)
    assert words == f"torch reference ({compiler} could not build it: x.h:9: error: no omp.h)"


def test_kernels_of_another_processor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRM_CPU_KERNELS", "z80")
    with pytest.raises(RrmError, match=r"RRM_CPU_KERNELS=z80: this processor has no such kernels; .* native, .*plain"):
        choose_attention("auto", CPU, torch.float32)
