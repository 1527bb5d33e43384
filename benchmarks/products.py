"""Matrix products on CPU: the compiled kernels' time beside torch's, at few and at many rows, and memory's speed.

    python benchmarks/products.py --shapes 17920x1536,896x4864 --rows 1,4,16,64,512 --variants native,avx2 --json OUT

All contenders take turns; each one's time is the median over the rounds. ``linear`` is ``F.linear``, ``onednn`` the
product with a weight that oneDNN has packed. The weights of a shape are as many copies as exceed every cache, used in
turn, as a model's layers are.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from begin import flags_first, kernel_flags

from rrm_engine.command_line import Parser


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", default="17920x1536,1152x896,9728x896,896x4864", help="columns x depth")
    parser.add_argument("--rows", default="1,4,16,32,64,512,2048")
    kernel_flags(parser)
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch
import torch.nn.functional as F
from rrm_kernels.products import NativeLinear

from rrm_engine.models.fuse import onednn_product
from rrm_engine.runs.environment import environment

CACHES = 96 << 20  # bytes; more than any cache here holds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Product = Callable[[torch.Tensor], torch.Tensor]


def contenders(columns: int, depth: int, dtype: torch.dtype, variants: list[str]) -> dict[str, list[Product]]:
    """Every way to multiply, each with as many random weights as are used in turn."""
    copies = -(-CACHES // (columns * depth * dtype.itemsize))
    weights = [torch.randn(columns, depth).to(dtype) for _ in range(copies)]
    if dtype == torch.float32:
        weights = [weight + 1e-6 for weight in weights]  # not ones that bf16 holds
    ways: dict[str, list[Product]] = {name: [NativeLinear(w, None, variant=name) for w in weights] for name in variants}
    ways["linear"] = [lambda x, w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]
    packed = [onednn_product(w, None) for w in weights]
    if all(packed):
        ways["onednn"] = [product for product in packed if product]
    return ways


def measure(ways: dict[str, list[Product]], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of one call; a turn goes once over all of a contender, or over as many as take half a second."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, products in ways.items():
            start, done = time.perf_counter(), 0
            for product in products:
                product(x)
                done += 1
                if time.perf_counter() - start > 0.5:
                    break
            if turn:
                seconds[name].append((time.perf_counter() - start) / done)
    return {name: statistics.median(times) for name, times in seconds.items()}


def memory_speed(rounds: int = 7) -> dict[str, float]:
    """Bytes a second: ``copy`` of a large tensor (read and written ones both count), ``read`` by a sum."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    size = source.numel() * source.itemsize
    best = {"copy": 0.0, "read": 0.0}
    for _ in range(rounds):
        for name, work, moved in (("copy", lambda: target.copy_(source), 2 * size), ("read", source.sum, size)):
            start = time.perf_counter()
            work()
            best[name] = max(best[name], moved / (time.perf_counter() - start))
    return best


def take_threads(args: argparse.Namespace) -> dict[str, float]:
    """Take the threads asked for; memory's speed with them."""
    if args.threads:
        torch.set_num_threads(args.threads)
    memory = memory_speed()
    print(f"memory: copy {memory['copy'] / 1e9:.1f} GB/s, read {memory['read'] / 1e9:.1f} GB/s")
    return memory


def write(args: argparse.Namespace, memory: dict[str, float], rows: list[dict[str, Any]]) -> None:
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads(), **environment()}
        result |= {"memory_bytes_per_s": memory, "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    args = build_parser().parse_args()
    memory = take_threads(args)
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            columns, depth = map(int, shape.split("x"))
            with torch.inference_mode():
                ways = contenders(columns, depth, DTYPES[dtype], args.variants.split(","))
                for rows in map(int, args.rows.split(",")):
                    seconds = measure(ways, torch.randn(rows, depth).to(DTYPES[dtype]), args.rounds)
                    results.append({"dtype": dtype, "columns": columns, "depth": depth, "rows": rows, **seconds})
                    flops, size = 2 * rows * columns * depth, columns * depth * DTYPES[dtype].itemsize
                    print(f"{dtype} {shape:>12} {rows:5} rows:", end="")
                    for name, t in seconds.items():
                        print(f"  {name} {t * 1e3:.3f} ms {flops / t / 1e9:.0f} GF/s {size / t / 1e9:.1f} GB/s", end="")
                        print(f" ({size / t / memory['copy']:.0%} of copy)" if rows == 1 else "", end="")
                    print(flush=True)
    write(args, memory, results)


if __name__ == "__main__":
    main()
