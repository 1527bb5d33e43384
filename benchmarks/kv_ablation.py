"""What each kind of KV reuse is worth: the same graphs under every policy, with plenty of memory and with too little.

    scripts/kv_ablation OUT_DIR --model embedded --model DIR

Writes table.md, plot.png, plot.svg and result.json. The measurement is that of `rrm replay`: rounds in which every
policy replays every graph, for each model half of the time with room for everything and half with too little memory.
Rounds are begun as long as they will end within --minutes, at least one and at most --repeats of them.

By default a model of fewer than 20 million parameters replays three graphs of the shape "small": all five rounds take
it a minute. A larger one replays three of the shape "short", which has as long prompts and a sixth of the steps: a
round of SmolLM2-135M in bf16 takes about 80 seconds of a CPU thread, so that ten minutes hold three rounds with either
memory. On "small" its rounds would take eight minutes each, and the whole matrix an hour and a half.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.legible import plural
from rrm_engine.replay.flags import add_replay_settings
from rrm_engine.replay.generate import SHAPES

POLICIES = "pin,offload,drop,lru,auto,pin+nocache,no-reuse,pin+fork,drop+fork,serial,serial+no-reuse,splice,transcript"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="where the four files go")
    parser.add_argument("--model", action="append", help="as replay's; several are measured one after another")
    parser.add_argument(
        "--graphs", help=f"a graph file, or a shape: {', '.join(SHAPES)} (default: by the model's size)"
    )
    parser.add_argument("--policies", default=POLICIES, help="as replay's")
    parser.add_argument("--tight", type=int, default=60, metavar="P", help="percent of pin's blocks when tight")
    add_replay_settings(parser)
    parser.set_defaults(minutes=10.0, count=None)
    return parser


if __name__ == "__main__":
    flags_first(build_parser, "matplotlib")

from ablation_plot import plot
from rich.console import Console
from torch import float32

from rrm_engine.replay.command import about, compared_steps, load, load_graphs, memory_for, progress, write_result
from rrm_engine.replay.driver import Ours
from rrm_engine.replay.measure import as_json, describe, limit_pools, measure, summarise
from rrm_engine.replay.report import CAPTION, markdown_table, rich_table
from rrm_engine.replay.variant import parse_variant

SMALL = 20_000_000  # parameters
PLENTY, TIGHT = "plenty", "tight"
Result = dict[str, Any]


def ablate(name: str, args: argparse.Namespace, console: Console) -> Result:
    """One model's figures under both memory settings."""
    variants = [parse_variant(policy) for policy in args.policies.split(",")]
    began = perf_counter()
    model = load(name, args)
    is_small = model.parameters < SMALL
    args = argparse.Namespace(**vars(args))
    args.graphs, args.count = args.graphs or ("small" if is_small else "short"), args.count or 3
    graphs = [graph.drawn(model.vocabulary) for graph in load_graphs(args.graphs, args)]
    memory = memory_for(model, graphs, variants, args)
    result: Result = {
        **about(memory),
        "shape": args.graphs,
        "graphs": [describe(graph) for graph in graphs],
        "memory": {},
    }
    for setting in (PLENTY, TIGHT):
        if setting == TIGHT:
            limit_pools(memory, graphs, args.tight / 100)
        compared = compared_steps(console, memory, variants, graphs) if model.dtype is float32 else None
        contenders = [Ours(variant, memory) for variant in variants]
        until = began + 60 * args.minutes / (2 if setting == PLENTY else 1)
        with progress(console, f"{name}, {setting}", len(contenders) * (len(graphs) * args.repeats + 1)) as done:
            rows = measure(contenders, graphs, args.repeats, done, until)
        summary = summarise(rows)
        console.print(rich_table(summary, heading(name, setting, args), wide=console.width >= 100))
        rounds = len(rows[0].answer_s)
        result["memory"][setting] = {
            "compared_steps": compared,
            "rounds": rounds,
            "rows": as_json(rows),
            "summary": summary,
        }
    return result


def heading(model: str, setting: str, args: argparse.Namespace) -> str:
    room = "room for everything" if setting == PLENTY else f"{args.tight} % of the blocks that pin takes"
    return f"{model}: {room}"


def markdown(results: Sequence[Result], args: argparse.Namespace) -> str:
    """All tables, and what was measured."""
    parts = ["# KV policies on replayed graphs\n"]
    for result in results:
        nodes = sum(graph["nodes"] for graph in result["graphs"])
        parts.append(
            f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']} on {result['device']}, "
            f"{plural(result['threads'], 'thread')}, blocks of {result['block_size']} tokens; "
            f"{plural(len(result['graphs']), 'graph')} ({result['shape']}), {plural(nodes, 'node')}.\n"
        )
        for setting, figures in result["memory"].items():
            title = f"## {heading(result['model'], setting, args)}, {plural(figures['rounds'], 'round')}"
            parts.append(f"{title}\n\n{markdown_table(figures['summary'])}")
            if figures["compared_steps"]:
                steps = f"The logits of {figures['compared_steps']:,} decode steps"
                parts.append(f"{steps}, those after attached KV left out, are those of pin.\n")
    return "\n".join([*parts, CAPTION[0].upper() + CAPTION[1:] + ".\n"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    console = Console()
    try:
        results = [ablate(name, args, console) for name in args.model or ["embedded"]]
    except RrmError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(args.out / "result.json", args, results=results)
    (args.out / "table.md").write_text(markdown(results, args))
    plot(results, args.tight, [args.out / "plot.png", args.out / "plot.svg"])
    console.print(f"Written to {args.out}: table.md, plot.png, plot.svg, result.json", highlight=False)


if __name__ == "__main__":
    main()
