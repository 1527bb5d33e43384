"""The flags of the replay command."""

import argparse
import math
from pathlib import Path

from rrm_engine.command_line import Parser
from rrm_engine.loading.geometry import GEOMETRIES, PREFIX
from rrm_engine.replay.generate import SHAPES
from rrm_engine.replay.variant import HELP
from rrm_engine.trace.command import add_jobs

PROGRAM = "python -m rrm_engine.replay"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "native", "triton", "varlen", "flash", "sdpa")
PEERS = ("vllm", "vllm+fork")
DESCRIPTION = """\
Replay the same recursive graphs under different KV policies, every node's
tokens forced.

Forwards are real; what the model samples is replaced by the graph's tokens
before it is run, so that variants differ in time and memory only. All take turns
in every round, each round beginning with the next one, so that a drift of the
machine hits all. vLLM cannot be forced: its nodes have as many tokens, but its
own. The graph file's format stands in rrm_engine/replay/__init__.py."""
EPILOG = f"""\
examples:
  {PROGRAM} --graphs small --policies pin,drop,no-reuse --json out.json
  {PROGRAM} --model DIR --from runs/aime --kv-blocks 60% --check --dtype float32
  {PROGRAM} --model DIR --graphs small --compare vllm
  {PROGRAM} --model DIR --from runs/aime --split

exit code: 0 done, 1 --check found other logits, 2 refused"""


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    add_replay_settings(parser)
    parser.add_argument(
        "--model", default="embedded", help=f"as the bench's, or {PREFIX}GEOMETRY of {', '.join(GEOMETRIES)}"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--graphs", default="small", help=f"a graph file, or a shape: {', '.join(SHAPES)}")
    source.add_argument("--from", dest="run", type=Path, metavar="RUN_DIR", help="the graphs of a recorded bench run")
    add_jobs(parser)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the graphs to a graph file too")
    parser.add_argument("--policies", default="pin,offload,drop,lru,auto", help=HELP.replace("%", "%%"))
    parser.add_argument("--compare", default="", help=f"other engines on the same graphs: {', '.join(PEERS)}")
    parser.add_argument("--vllm-block-size", type=int, metavar="N", help="of its KV blocks; a multiple of 32 on CPU")
    parser.add_argument("--kv-blocks", default="", metavar="N|P%", help="the pool, or a share of what pin takes")
    parser.add_argument("--check", action="store_true", help="compare every decode step's logits with pin's (float32)")
    parser.add_argument("--split", action="store_true", help="what made a recorded run faster: parallelism, KV reuse")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


def add_replay_settings(parser: argparse.ArgumentParser) -> None:
    """Those that benchmarks/kv_ablation.py has too."""
    parser.add_argument("--count", type=int, default=3, metavar="N", help="graphs of a shape, or the first N of a file")
    parser.add_argument("--seed", type=int, default=0, help="of a shape's graphs")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="rounds; every contender replays the smallest graph before them",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no further round that would not end by then"
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 ...")
    parser.add_argument("--attention", default="auto", choices=ATTENTIONS, help="as the bench's")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block")
    parser.add_argument(
        "--step-tokens", type=int, default=None, help="token budget of a step (default: 512, on CUDA 4096)"
    )
    parser.add_argument("--max-concurrency", type=int, default=64, help="sequences decoding at once")
