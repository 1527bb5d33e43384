"""The compiled linear layers against float64, whatever the shape; a row's result depends on that row alone."""

import ctypes
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from oracle import VARIANTS, compiled, engine_for, plain_model, prepared, prompt, wrong_tokens
from rrm_kernels import build, products
from rrm_kernels.build import load_library
from rrm_kernels.products import Kind, NativeLinear, NativeUnavailable

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.loading.prepare import UnsupportedModel
from rrm_engine.models import fuse
from rrm_engine.models.fuse import PackedLinear

KINDS = list(Kind)
PROCESSORS_OWN = (Kind.BF16_DOT, Kind.BF16_TILES)  # not every processor has them
DEEP = (40, 2100)  # at many rows the depth is done in several passes, at few in one
LESS_DEEP = (40, 1000)  # at many rows fewer of them are done at once
# (columns, depth)
SHAPES = [(1, 1), (5, 3), (16, 64), (32, 128), (33, 65), (100, 257), (395, 70), (458, 192), LESS_DEEP, DEEP]
ROWS = (1, 2, 3, 11, 12, 13, 25, 241)  # around the rows done at once, and more than a chunk of them


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    compiled(load_library)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def dtype_of(kind: Kind) -> torch.dtype:
    return torch.float32 if kind.name.startswith("FP32") else torch.bfloat16


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layer(
    kind: Kind, columns: int, depth: int, bias: bool = False, variant: str = "native"
) -> tuple[NativeLinear, torch.Tensor, torch.Tensor]:
    """A packed layer, its weight and its bias (zeros without one)."""
    weight = random(columns, depth, dtype=dtype_of(kind))
    if kind == Kind.FP32_BY_BF16:
        weight = weight.bfloat16().float()
    addend = random(columns, dtype=dtype_of(kind)) if bias else torch.zeros(columns, dtype=dtype_of(kind))
    try:
        asked = Kind.FP32 if kind == Kind.FP32_BY_BF16 else kind
        linear = NativeLinear(weight, addend if bias else None, asked, variant)
    except NativeUnavailable as reason:
        assert kind in PROCESSORS_OWN
        pytest.skip(str(reason))
    assert linear.kind == kind or (columns, depth) == (1, 1)
    return linear, weight, addend


def error(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Largest difference from float64, in the last places of a sum of this many terms."""
    expected = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    scale = size * torch.finfo(torch.float32).eps + expected.abs() * torch.finfo(x.dtype).eps
    return float(((result.double() - expected).abs() / scale).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_float64(variant: str, kind: Kind, columns: int, depth: int, bias: bool) -> None:
    linear, weight, addend = layer(kind, columns, depth, bias, variant)
    for rows in ROWS:
        x = random(rows, depth, dtype=weight.dtype)
        result = linear(x)
        assert result.shape == (rows, columns) and result.dtype == x.dtype
        assert error(result, x, weight, addend) < 4
        if depth > 1:
            assert error(result, x.roll(1, 1), weight, addend) > 100  # the comparison notices another order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("columns", "depth"), [(458, 192), LESS_DEEP, DEEP])
def test_a_row_depends_on_itself_alone(columns: int, depth: int, variant: str, kind: Kind, two_threads: None) -> None:
    linear, weight, _ = layer(kind, columns, depth, variant=variant)
    x = random(ROWS[-1], depth, dtype=weight.dtype)
    whole = linear(x)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[-rows:]), whole[-rows:])
    x[3, 5] += 1
    assert (linear(x) != whole).any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_change_no_bit(variant: str, kind: Kind, two_threads: None) -> None:
    linear, weight, _ = layer(kind, 700, 300, variant=variant)
    x = random(50, 300, dtype=weight.dtype)
    threaded = linear(x)
    torch.set_num_threads(1)
    assert torch.equal(linear(x), threaded)


@pytest.fixture(scope="module")
def tiles_in_software(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The products as compiled for a processor with tiles, which are done in plain C++."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    library = tmp_path_factory.mktemp("tiles") / "kernels.so"
    software = Path(__file__).parents[2] / "support" / "tiles_in_software.h"
    names = [name for name in build.SOURCES if name == "products.cpp" or name.endswith(".h")]
    sources = {name: files("rrm_kernels").joinpath(name).read_text() for name in names}
    build._compile(compiler, (*build.COMPILE, "-include", str(software)), sources, library)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(("columns", "depth"), SHAPES)
def test_tiles(
    columns: int, depth: int, tiles_in_software: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(products, "load_library", lambda variant: tiles_in_software)
    assert tiles_in_software.rrm_linear_kind(True) == Kind.BF16_TILES
    linear, weight, addend = layer(Kind.BF16_TILES, columns, depth, bias=True)
    x = random(300, depth, dtype=torch.bfloat16)
    whole = linear(x)
    assert error(whole, x, weight, addend) < 4
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 64, 255, 257):
        assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[-rows:]), whole[-rows:])
    torch.set_num_threads(1)
    assert torch.equal(linear(x), whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PROCESSORS_OWN])
def test_the_width_of_vectors_changes_no_bit(kind: Kind) -> None:
    if "avx2" not in VARIANTS:
        pytest.skip("this processor multiplies and adds in one way only")
    x = random(30, 192, dtype=dtype_of(kind))
    native, narrow, unfused = (layer(kind, 458, 192, variant=name)[0](x) for name in VARIANTS)
    assert torch.equal(native, narrow)
    # There a product is rounded before it is added, and only that of two bf16 numbers is exact in fp32.
    assert torch.equal(native, unfused) == (dtype_of(kind) == torch.bfloat16)


def test_weights_that_bf16_holds_are_kept_in_half_the_memory_with_the_same_results() -> None:
    weight = random(100, 64, dtype=torch.bfloat16).float()
    narrow, x = NativeLinear(weight, None, Kind.FP32), random(7, 64, dtype=torch.float32)
    weight_and_more = torch.cat([weight, weight[:1] + 1e-5])
    wide = NativeLinear(weight_and_more, None, Kind.FP32)
    assert (narrow.kind, wide.kind) == (Kind.FP32_BY_BF16, Kind.FP32)
    assert torch.equal(narrow(x), wide(x)[:, :100])


def test_any_layout_of_the_input_and_no_rows() -> None:
    linear, weight, _ = layer(Kind.FP32, 33, 65)
    x = random(65, 8, dtype=torch.float32)
    assert torch.equal(linear(x.T), linear(x.T.contiguous()))
    assert torch.equal(linear(x.T.view(2, 4, 65)), linear(x.T).view(2, 4, 33))
    assert linear(x.T[:0]).shape == (0, 33)
    transposed = NativeLinear(weight.T.contiguous().T, None, Kind.FP32)
    assert torch.equal(transposed(x.T), linear(x.T))


@pytest.mark.parametrize("x", [torch.zeros(2, 64), torch.zeros(2, 65, dtype=torch.bfloat16)], ids=["width", "dtype"])
def test_an_input_that_does_not_fit_is_refused(x: torch.Tensor) -> None:
    linear, _, _ = layer(Kind.FP32, 33, 65)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 65\] torch\.float32"):
        linear(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_torch_multiplies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(variant: str | None) -> None:
        raise NativeUnavailable("no compiler")

    monkeypatch.setattr(products, "load_library", unavailable)
    weight, bias, x = (random(*shape, dtype=dtype) for shape in ((96, 64), (96,), (3, 64)))
    linear = PackedLinear(weight, bias)
    assert not isinstance(linear.product, NativeLinear)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight, bias))
    if dtype == torch.float32:
        assert tokens_differ() == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_on_the_kernels_is_exact(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRM_CPU_KERNELS", variant)
    product = PackedLinear(torch.randn(8, 8), None).product
    assert isinstance(product, NativeLinear)
    assert product.library is load_library(variant)
    assert tokens_differ() == []


def tokens_differ() -> list[int]:
    plain = plain_model("qwen2")  # with biases
    engine = engine_for(prepared(plain))
    sequence = engine.submit("root", prompt(1, 30), 20, SamplingParams())
    while engine.has_work:
        engine.step()
    return wrong_tokens(plain, sequence.tokens, [(30, 50)])


def test_a_wrong_layout_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at load: every weight lies one place too far."""

    class Shifted(NativeLinear):
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__(weight, bias)
            self._panels.copy_(self._panels.roll(1))

    monkeypatch.setattr(fuse, "NativeLinear", Shifted)
    with pytest.raises(UnsupportedModel, match="it differs from plain transformers in the logits"):
        prepared(plain_model("qwen2"))
