"""Every kernel against its torch reference, on random inputs and odd shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rrm_kernels.batch import PagedBatch, Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.flash import FlashUnavailable, load_flash
from rrm_kernels.reference import paged_attention
from rrm_kernels.reference_layer import ReferenceLayer
from rrm_kernels.sharing import SharingCost, find_shared_runs
from rrm_kernels.triton_attention import TritonUnavailable, load_triton
from rrm_kernels.varlen import load_varlen

from gpu.lab import Lab, Row, Skip

Options = tuple[int | None, float | None, bool]  # window, soft-cap, sinks
PLAIN: Options = (None, None, False)
ALWAYS = SharingCost(member=0, crossover=0)
# Relative to the largest value: rounding of the result, and of sums done in another order.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """Sequences of (query tokens, context) over scattered blocks of random pools; ``shared``: (row, from, blocks)."""

    lab: Lab
    dtype: torch.dtype
    seqs: list[tuple[int, int]]
    heads: int
    kv_heads: int
    widths: tuple[int, int]
    block_size: int
    shared: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.heads + len(self.seqs))
        sizes = [-(-context // self.block_size) for _, context in self.seqs]
        order = (torch.randperm(sum(sizes), generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(size)] for size in sizes]
        for row, source, count in self.shared:
            self.tables[row][:count] = self.tables[source][:count]
        pool = (sum(sizes) + 1, self.block_size, self.kv_heads)
        shapes = ((*pool, self.widths[0]), (*pool, self.widths[1]))
        self.key, self.value = (self.random(generator, *shape) for shape in shapes)
        self.query = self.random(generator, sum(q for q, _ in self.seqs), self.heads, self.widths[0])
        self.sinks = self.random(generator, self.heads)

    def random(self, generator: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(self.lab.device, self.dtype)

    def batch(self, plan: bool = False) -> PagedBatch:
        queries, contexts = [q for q, _ in self.seqs], [c for _, c in self.seqs]
        seen = [c - q for q, c in self.seqs]
        runs = find_shared_runs(self.tables, seen, self.block_size, ALWAYS) if plan else None
        return batch_of(queries, contexts, self.tables, self.block_size, self.lab.device, runs)

    def call(self, attend: Any, options: Options, plan: bool = False) -> torch.Tensor:
        out: torch.Tensor = attend(self.query, self.key, self.value, self.batch(plan), self.scores(options))
        return out

    def scores(self, options: Options) -> Scores:
        window, softcap, sinks = options
        return Scores(self.widths[0] ** -0.5, window, softcap, self.sinks if sinks else None)

    def expected(self, options: Options) -> torch.Tensor:
        """In fp32, on the same rounded inputs."""
        query, key, value = (t.float() for t in (self.query, self.key, self.value))
        return paged_attention(query, key, value, self.batch(), self.scores(options))


def run(lab: Lab, rows: list[Row]) -> None:
    try:
        attend = load_triton(lab.device)
    except TritonUnavailable as error:
        raise Skip(f"Triton's kernels cannot run: {error}") from error
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape, difference in (*_attention(lab, dtype, attend), *_layer(lab, dtype)):
            bound = BOUNDS[dtype]
            label = str(dtype).removeprefix("torch.")
            rows.append(
                {"kernel": name, "dtype": label, "shape": shape, "error": difference, "bound": bound}
                | {"ok": difference <= bound}
            )
    if wrong := [f"{row['kernel']} {row['dtype']} {row['shape']}" for row in rows if not row["ok"]]:
        raise AssertionError(f"{len(wrong)} of {len(rows)} comparisons are off: {'; '.join(wrong[:5])}")


def _attention(lab: Lab, dtype: torch.dtype, attend: Any) -> Iterator[tuple[str, str, float]]:
    mixed = [(1, 37), (1, 1), (5, 23), (1, 16), (7, 7)]
    long = [(1, 1000), (1, 4097), (300, 777), (1, 16), (64, 64)]
    cases = [Case(lab, dtype, mixed, 4, 2, (16, 16), 4), Case(lab, dtype, mixed[:3], 6, 3, (20, 12), 5)]
    if dtype == torch.float32 and not lab.tiny:  # large fp32 tiles take long to compile
        cases.append(Case(lab, dtype, [(1, 1000), (1, 4097), (1, 16)], 40, 8, (128, 128), 16))
    elif not lab.tiny:
        cases += [
            Case(lab, dtype, long, 40, 8, (128, 128), 16),
            Case(lab, dtype, long, 9, 3, (64, 64), 16),
            Case(lab, dtype, long[:2], 71, 1, (64, 64), 16),
            Case(lab, dtype, long, 16, 16, (192, 128), 16),
            Case(lab, dtype, [(1, 8192)] * 3, 8, 4, (256, 256), 32),
        ]
    options: list[Options] = [PLAIN, (7, None, True), (None, 2.0, True)]
    for case in cases:
        for choice in options if case.heads in (4, 40) and not lab.tiny else options[:1]:
            shape = f"{len(case.seqs)} sequences, {case.heads}/{case.kv_heads} heads of {case.widths}, {choice}"
            yield "ragged attention", shape, _difference(case.call(attend, choice), case.expected(choice))
    family = [(1, 41), (1, 33), (1, 29), (1, 22), (2, 30)] if lab.tiny else [(1, 3000 + 40 * i) for i in range(24)]
    blocks = 3 if lab.tiny else 150
    shared = tuple((i, 0, blocks) for i in range(1, len(family)))
    sizes = (4, 2, (16, 16), 8) if lab.tiny else (40, 8, (128, 128), 16)
    case = Case(lab, dtype, family, *sizes, shared)
    yield "shared prefix", f"{len(family)} sequences", _difference(case.call(attend, PLAIN, True), case.expected(PLAIN))
    if dtype == torch.bfloat16:
        case = Case(lab, dtype, long, 40, 8, (128, 128), 256)
        for name, load in (("varlen", load_varlen), ("flash", load_flash)):
            try:
                other: Callable[..., torch.Tensor] = load(lab.device)
                yield name, "5 sequences", _difference(case.call(other, PLAIN), case.expected(PLAIN))
            except (FlashUnavailable, RuntimeError) as error:
                print(f"  {name} is left out: {str(error).splitlines()[0]}")


def _layer(lab: Lab, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    from rrm_kernels.triton_layer import TritonLayer

    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(lab.device, dtype)

    rows, width, heads, kv_heads, head = (3, 40, 6, 2, 16) if lab.tiny else (37, 5120, 40, 8, 128)
    x, residual, weight, both = random(rows, width), random(rows, width), random(width), random(rows, 2 * width)
    qkv, norms = random(rows, (heads + 2 * kv_heads) * head), (random(head), random(head))
    angle = torch.arange(64)[:, None] * 1e4 ** -(torch.arange(head // 2) / (head // 2))
    tables = tuple(t.to(lab.device, dtype).float().contiguous() for t in (angle.cos(), angle.sin()))
    positions = torch.arange(rows, device=lab.device) % 64
    slots = torch.arange(rows, device=lab.device) + 5
    slots[1] = -1
    results: list[list[torch.Tensor]] = []
    for layer in (TritonLayer(), ReferenceLayer()):
        total, outs = residual.clone(), [torch.empty_like(x) for _ in range(3)]
        layer.norm(x, weight, 1e-6, outs[0])
        layer.add_norm(x, total, weight, 1e-6, outs[1])
        layer.silu_mul(both, outs[2])
        query = torch.empty(rows, heads, head, dtype=dtype, device=lab.device)
        pools = [torch.zeros(rows, 4, kv_heads, head, dtype=dtype, device=lab.device) for _ in range(2)]
        layer.rope_store(qkv, norms, 1e-6, tables, positions, slots, query, *pools)  # type: ignore[arg-type]
        results.append([*outs, total, query, *pools])
    names = ("norm", "add norm", "silu mul", "residual", "rope: queries", "rope: keys", "rope: values")
    for name, found, expected in zip(names, *results, strict=True):
        yield name, f"{rows} x {width}", _difference(found, expected.float())


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    gap = (found.to(expected.dtype) - expected).abs().nan_to_num(float("inf")).max()
    return float(gap / expected.abs().max().clamp(min=1e-6))
