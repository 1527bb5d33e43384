"""Decode attention on CPU: the compiled kernel's time beside torch's, and how fast it reads the KV cache.

    python benchmarks/attention.py --shapes 14,2,64 --sequences 16x2048,1x16384 --variants native,avx2 --json OUT

A shape is query heads, KV heads and the width of a head; ``16x2048`` are sixteen sequences of 2,048 tokens, one new
token each. All contenders take turns; each one's time is the median over the rounds. ``sdpa`` is torch's attention on
keys and values without a block table. There are as many layers as exceed every cache, used in turn.
"""

from functools import partial
from typing import Any

from begin import flags_first, kernel_flags

from rrm_engine.command_line import Parser

SHAPES = "14,2,64;9,3,64;12,2,128;40,8,128;32,32,128"  # the last: as many KV heads as query heads


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="query heads,KV heads,width; several with ; between")
    parser.add_argument("--sequences", default="1x512,16x512,16x2048,1x16384", help="sequences x tokens")
    kernel_flags(parser)
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch
import torch.nn.functional as F
from products import CACHES, DTYPES, Product, measure, take_threads, write
from rrm_kernels.batch import Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.native import load_native

BLOCK = 16  # tokens
Layer = tuple[torch.Tensor, torch.Tensor]  # keys and values, [blocks, BLOCK, kv_heads, width]


def layers_of(blocks: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Layer]:
    size = 2 * blocks * BLOCK * kv_heads * width * dtype.itemsize
    shape = blocks, BLOCK, kv_heads, width
    return [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(-(-CACHES // size))]


def contenders(sequences: int, tokens: int, layers: list[Layer], variants: list[str]) -> dict[str, list[Product]]:
    """Every way to attend, for each layer: functions of queries ``[sequences, heads, width]``."""
    _, _, kv_heads, width = layers[0][0].shape
    blocks = -(-tokens // BLOCK)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(sequences)]
    batch = batch_of([1] * sequences, [tokens] * sequences, tables, BLOCK, torch.device("cpu"))
    scores = Scores(width**-0.5)

    def paged(variant: str, layer: Layer) -> Product:
        attend = load_native(variant)
        return lambda query: attend(query, *layer, batch, scores)

    def sdpa(layer: Layer, query: torch.Tensor) -> torch.Tensor:
        keys, values = (x.view(sequences, -1, kv_heads, width)[:, :tokens].transpose(1, 2) for x in layer)
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=query.shape[1] != kv_heads)

    ways = {name: [paged(name, layer) for layer in layers] for name in variants}
    return ways | {"sdpa": [partial(sdpa, layer) for layer in layers]}


def main() -> None:
    args = build_parser().parse_args()
    memory = take_threads(args)
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(";"):
            heads, kv_heads, width = map(int, shape.split(","))
            for case in args.sequences.split(","):
                sequences, tokens = map(int, case.split("x"))
                layers = layers_of(sequences * -(-tokens // BLOCK), kv_heads, width, DTYPES[dtype])
                query = torch.randn(sequences, heads, width).to(DTYPES[dtype])
                with torch.inference_mode():
                    seconds = measure(
                        contenders(sequences, tokens, layers, args.variants.split(",")), query, args.rounds
                    )
                size = 2 * sequences * tokens * kv_heads * width * DTYPES[dtype].itemsize
                named = {"heads": heads, "kv_heads": kv_heads, "width": width}
                results.append({"dtype": dtype, **named, "sequences": sequences, "tokens": tokens, **seconds})
                times = (f"{name} {t * 1e3:.3f} ms {size / t / 1e9:.1f} GB/s" for name, t in seconds.items())
                print(f"{dtype} {shape:>9} {case:>8}: ", "  ".join(times), flush=True)
    write(args, memory, results)


if __name__ == "__main__":
    main()
