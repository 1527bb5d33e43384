"""Decode attention on CPU: the compiled kernel's time beside torch's, and how fast it reads the KV cache.

    python benchmarks/attention.py --shapes 14,2,64 --sequences 16x2048,1x16384 --variants native,avx2 --json OUT

A shape is query heads, KV heads and the width of a head; ``16x2048`` are sixteen sequences of 2,048 tokens, one new
token each. All contenders take turns; each one's time is the median over the rounds. ``sdpa`` is torch's attention on
keys and values without a block table. There are as many layers as exceed every cache, used in turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser

SHAPES = "14,2,64;9,3,64;12,2,128;40,8,128;32,32,128"  # the last: as many KV heads as query heads


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="query heads,KV heads,width; several with ; between")
    parser.add_argument("--sequences", default="1x512,16x512,16x2048,1x16384", help="sequences x tokens")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--variants", default="native", help="of the compiled kernels: see rrm_kernels/build.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch
import torch.nn.functional as F
from products import CACHES, DTYPES, memory_speed
from rrm_kernels.batch import Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.native import load_native

from rrm_engine.runs.environment import environment

BLOCK = 16  # tokens
Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values, [blocks, BLOCK, kv_heads, width]
Attend = Callable[[torch.Tensor, Layer], Any]  # of queries [sequences, heads, width] to a layer


def layers_of(blocks: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Layer]:
    size = 2 * blocks * BLOCK * kv_heads * width * dtype.itemsize
    shape = blocks, BLOCK, kv_heads, width
    return [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(-(-CACHES // size))]


def contenders(sequences: int, tokens: int, kv_heads: int, width: int, variants: list[str]) -> dict[str, Attend]:
    """Every way to attend. Each sequence's blocks lie in order."""
    blocks = -(-tokens // BLOCK)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(sequences)]
    batch = batch_of([1] * sequences, [tokens] * sequences, tables, BLOCK, torch.device("cpu"))
    scores = Scores(width**-0.5)

    def sdpa(query: torch.Tensor, layer: Layer) -> Any:
        keys, values = (x.view(sequences, -1, kv_heads, width)[:, :tokens].transpose(1, 2) for x in layer)
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=query.shape[1] != kv_heads)

    def paged(variant: str) -> Attend:
        attend = load_native(variant)
        return lambda query, layer: attend(query, *layer, batch, scores)

    return {name: paged(name) for name in variants} | {"sdpa": sdpa}


def measure(ways: dict[str, Attend], query: torch.Tensor, layers: list[Layer], rounds: int) -> dict[str, float]:
    """Median seconds of one layer; a turn goes once over all layers, or over as many as take half a second."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, attend in ways.items():
            start, done = time.perf_counter(), 0
            for layer in layers:
                attend(query, layer)
                done += 1
                if time.perf_counter() - start > 0.5:
                    break
            if turn:
                seconds[name].append((time.perf_counter() - start) / done)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    args = build_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    memory = memory_speed()
    print(f"memory: copy {memory['copy'] / 1e9:.1f} GB/s, read {memory['read'] / 1e9:.1f} GB/s")
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(";"):
            heads, kv_heads, width = map(int, shape.split(","))
            for case in args.sequences.split(","):
                sequences, tokens = map(int, case.split("x"))
                layers = layers_of(sequences * -(-tokens // BLOCK), kv_heads, width, DTYPES[dtype])
                query = torch.randn(sequences, heads, width).to(DTYPES[dtype])
                with torch.inference_mode():
                    ways = contenders(sequences, tokens, kv_heads, width, args.variants.split(","))
                    seconds = measure(ways, query, layers, args.rounds)
                size = 2 * sequences * tokens * kv_heads * width * DTYPES[dtype].itemsize
                named = {"heads": heads, "kv_heads": kv_heads, "width": width}
                results.append({"dtype": dtype, **named, "sequences": sequences, "tokens": tokens, **seconds})
                times = (f"{name} {t * 1e3:.3f} ms {size / t / 1e9:.1f} GB/s" for name, t in seconds.items())
                print(f"{dtype} {shape:>9} {case:>8}: ", "  ".join(times), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads(), **environment()}
        result |= {"memory_bytes_per_s": memory, "rounds": args.rounds, "rows": results}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
