"""The same graphs on our engine and on others, in one run: throughput, time to answer, resume latency.

    python benchmarks/peers.py --model DIR --vllm-python .vllm/bin/python --out OUT_DIR

Every peer has the same weights, type, threads, prompts (as token ids) and lengths, and all decode greedily. What they
replay: sequences side by side (--batch), graphs as recursive runs on AIME problems have (--graphs: a long prompt that
plans four children, some hundred tokens to decode), and graphs of a recorded bench run (--from). All take turns, every
round beginning with another one, so that a drift of the machine hits all.

    ours            this engine, in this process; a waiting parent keeps its KV; every token is forced
    vllm            vLLM's engine without a server; a parent goes on as a new request, its prefix cache on
    vllm-http       the same behind vLLM's server, asked as `--backend openai` of the bench asks: token ids, streams
    generate-batch  transformers' continuous batching: a parent goes on as a new request, pages of 256 tokens shared
    generate        transformers' static batch: side by side only, for nothing can start in mid-run

Resume latency is the time from the last token of the last child that a parent awaits to the parent's next token. What
is not installed is named and left out. OUT_DIR gets peers.json (every round), table.md and the logs of vLLM.
"""

import argparse
import math
import os
from pathlib import Path

from begin import ROOT, flags_first

from rrm_engine.command_line import Parser
from rrm_engine.replay.flags import ATTENTIONS, DTYPES
from rrm_engine.replay.generate import SHAPES
from rrm_engine.trace.command import add_jobs

PLAN = ROOT / "benchmarks" / "graphs" / "plan.jsonl"
PEERS = ("ours", "vllm", "vllm-http", "generate-batch", "generate")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="embedded, a directory or a hub id")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT_DIR", help="where the results go")
    parser.add_argument("--peers", default=",".join(PEERS), help="which; ours is always one")
    parser.add_argument("--batch", default="1,4,16", help="sequences side by side; empty: none of these")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each one's prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that each one decodes")
    parser.add_argument(
        "--graphs", default=str(PLAN), help=f"a graph file, or a shape: {', '.join(SHAPES)}; empty: none of these"
    )
    parser.add_argument(
        "--from", dest="run", type=Path, metavar="RUN_DIR", help="a bench run whose graphs of several nodes to replay"
    )
    add_jobs(parser)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="graphs of a shape, and the first of a run")
    parser.add_argument("--seed", type=int, default=0, help="of a shape's graphs")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; a replay of the smallest graph warms up")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no round that would end later"
    )
    parser.add_argument("--threads", type=int, default=1, help="of every engine")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 ...")
    parser.add_argument("--attention", default="auto", choices=ATTENTIONS, help="ours; as the bench's")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block of ours")
    parser.add_argument(
        "--step-tokens", type=int, default=512, help="token budget of a step, ours and generate-batch's"
    )
    parser.add_argument("--vllm-python", default="", metavar="PATH", help="the Python that has vLLM; default: this one")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile, which takes it minutes")
    parser.add_argument("--vllm-block-size", type=int, metavar="N", help="the grain of its prefix cache; 128 on CPU")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)
    os.environ["OMP_NUM_THREADS"] = str(build_parser().parse_args().threads)  # for threads that others start, too

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

from engines.field import Field
from engines.report import Measured, print_tables, write
from rich.console import Console

from rrm_engine.command import OK, guarded
from rrm_engine.errors import RrmError
from rrm_engine.replay.command import load, load_graphs, memory_for, progress
from rrm_engine.replay.graph import Decode, Graph, Node
from rrm_engine.replay.measure import measure
from rrm_engine.replay.variant import Variant


def side_by_side(count: int, prompt: int, tokens: int) -> Graph:
    """``count`` nodes that nothing joins."""
    node = Node(prompt, (Decode(tokens),))
    return Graph(f"{count} side by side", {f"s{i:02}": node for i in range(count)})


def workloads(args: argparse.Namespace) -> dict[str, list[Graph]]:
    """What is replayed, by kind, without its tokens drawn. Raises RrmError."""
    found: dict[str, list[Graph]] = {}
    if args.batch:
        counts = args.batch.split(",")
        if not all(count.isdecimal() and int(count) for count in counts):
            raise RrmError(f"--batch {args.batch}: it takes numbers of sequences, such as 1,4,16")
        found["side by side"] = [side_by_side(int(count), args.prompt, args.tokens) for count in counts]
    if args.graphs:
        found["shape"] = load_graphs(args.graphs, args)
    if args.run is not None:
        whole = argparse.Namespace(**{**vars(args), "count": None})
        several = [graph for graph in load_graphs(args.run, whole) if len(graph.nodes) > 1]
        if not several:
            raise RrmError(f"--from {args.run}: no graph of this run has several nodes")
        found["recorded"] = several[: None if args.jobs else args.count]
    if not found:
        raise RrmError("there is nothing to replay: give --batch, --graphs or --from")
    return found


def run(args: argparse.Namespace, console: Console) -> None:
    names = list(dict.fromkeys(["ours", *(name for name in args.peers.split(",") if name)]))
    if unknown := [name for name in names if name not in PEERS]:
        raise RrmError(f"--peers {unknown[0]}: it takes {', '.join(PEERS)}")
    if min(args.count, args.repeats, args.prompt, args.tokens, args.threads) < 1:
        raise RrmError("--count, --repeats, --prompt, --tokens and --threads take at least 1")
    kinds = workloads(args)
    model = load(args.model, args)
    vocabulary = model.model.config.get_text_config().vocab_size
    kinds = {kind: [graph.drawn(vocabulary) for graph in graphs] for kind, graphs in kinds.items()}
    graphs = [graph for kind in kinds.values() for graph in kind]
    args.max_concurrency = max(len(graph.nodes) for graph in graphs)
    memory = memory_for(model, graphs, [Variant("ours")], args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RrmError(f"--out {args.out}: {error.strerror}") from None
    with ExitStack() as open_ones:
        field = Field(memory, graphs, args, open_ones)
        for name in names:
            console.print(f"Starting {name} ...", highlight=False)
            field.enter(name)
        for name, why in field.left_out.items():
            console.print(f"{name} is left out: {why}", highlight=False, markup=False)
        measured = Measured(memory, field.allowed, field.left_out)
        for kind, each in kinds.items():
            contenders = field.able(each)
            with progress(console, kind, len(contenders) * (len(each) * args.repeats + 1)) as done:
                until = perf_counter() + 60 * args.minutes
                measured.add(kind, each, measure(contenders, each, args.repeats, done, until))
            write(measured, args)
    print_tables(console, measured)
    console.print(f"Written to {args.out}: peers.json, table.md", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def body() -> int:
        run(args, Console())
        return OK

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
