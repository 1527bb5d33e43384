"""Random graphs on the engine, without end: nothing wedges, nothing leaks, and every token is plain transformers'.

A *life* is one engine, or several replicas, with settings drawn from its seed: pools from the smallest that holds one
longest sequence, all wait policies, with and without the prefix cache, one step in flight, the stages of a pipeline, or
one step launched ahead. In it random graphs start, fork in the middle of blocks, pause, wait,
resume, forget and are cancelled in every state. All references are recounted after every step, and at a life's end
every greedy token of every sequence is compared with plain transformers on that sequence's own tokens, in fp32.

Life n of a soak has the seed S + n: a failure names the seed that brings it back as the first life of a new soak.
"""

import argparse
import copy
import itertools
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from begin import flags_first

from rrm_engine.command_line import Parser
from rrm_engine.legible import plural


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="how long; 0: one life")
    parser.add_argument("--model", default="tiny", help="tiny (random), embedded, a directory, GGUF file or hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the first life; the next ones have the next seeds")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import Driven, Replicas
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.host import SwapCosts
from rrm_engine.loading.engines import build_engine
from rrm_engine.loading.load import load_pretrained, resolve_device
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.runs.environment import environment

GREEDY = SamplingParams()
MAX_DEPTH = 3
TIE = 1e-3  # of a row's standard deviation: logits closer than this may come out in another order
SURVIVED = ("preemptions", "dropped", "offloaded_blocks", "restored_blocks", "forked_blocks", "copied_blocks", "reused")


class Wrong(AssertionError):
    """The engine did what it must not do."""


@dataclass(frozen=True)
class Settings:
    """What one life runs under."""

    seed: int
    graphs: int
    longest: int  # tokens of a sequence
    block_size: int
    blocks: int
    max_sequences: int
    step_tokens: int
    prefix_cache: bool
    wait_policy: WaitPolicy
    host_blocks: int
    costs: SwapCosts
    stops: float  # share of the vocabulary that ends a sequence
    stages: int
    lookahead: bool
    replicas: int

    @classmethod
    def draw(cls, seed: int, longest: int) -> "Settings":
        """``longest`` is the model's limit."""
        draw = random.Random(f"settings {seed}")
        longest, size = draw.randint(16, min(longest, 240)), draw.choice([1, 2, 3, 4, 8, 16])
        blocks = -(-longest // size) + draw.choice([0, 0, 1, 2, 5, 20, 100])
        return cls(
            seed,
            draw.randint(3, 12),
            longest,
            size,
            blocks,
            draw.choice([1, 2, 4, 64]),
            draw.choice([1, 4, 16, 64, 512]),
            draw.random() < 0.6,
            draw.choice(get_args(WaitPolicy)),
            draw.choice([0, 3, blocks, 1000]),
            draw.choice([SwapCosts(0.5, 0.5), SwapCosts(1.0, 0.1), SwapCosts(0.1, 1.0)]),
            draw.choice([0.0, 0.05]),
            draw.choice([1, 1, 1, 2, 4]),
            draw.random() < 0.5,
            draw.choice([1, 1, 1, 2, 3]),
        )

    def engine(self, model: LoadedModel, eos_ids: frozenset[int]) -> Engine:
        """One of the replicas."""
        settings = EngineSettings(
            blocks=self.blocks,
            block_size=self.block_size,
            prefix_cache=self.prefix_cache,
            max_sequences=self.max_sequences,
            step_tokens=self.step_tokens,
            max_sequence_tokens=self.longest,
            eos_ids=eos_ids,
            wait_policy=self.wait_policy,
            host_blocks=self.host_blocks,
            stages=self.stages,
            lookahead=self.lookahead,
        )
        return build_engine(model, settings, costs=self.costs)


@dataclass(slots=True, eq=False)
class Node:
    """A sequence, its children, and which of its tokens the engine sampled, as ranges."""

    sequence: Sequence
    depth: int
    parent: "Node | None"
    children: "list[Node]" = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.sequence.state is not State.FINISHED

    @property
    def paused(self) -> bool:
        return self.sequence.state is State.PAUSED

    def begin(self) -> None:
        """What is sampled from here on is a range of its own."""
        length = len(self.sequence.tokens)
        self.sampled.append([length, length])

    def forget(self, length: int) -> None:
        self.sampled = [[start, min(stop, length)] for start, stop in self.sampled if start < length]

    def below(self) -> "Iterator[Node]":
        """Itself and its descendants, children first."""
        for child in self.children:
            yield from child.below()
        yield self


class Life:
    """Random graphs on an engine, or on its replicas, from its start to its end."""

    def __init__(self, model: LoadedModel, vocabulary: int, settings: Settings) -> None:
        self.settings = settings
        self.chance = random.Random(settings.seed)
        self.vocabulary = vocabulary
        stops = frozenset(range(2, 2 + int(settings.stops * vocabulary)))
        self.engines = [settings.engine(model, stops) for _ in range(settings.replicas)]
        self.engine: Driven = self.engines[0] if settings.replicas == 1 else Replicas(self.engines)
        self.system = self.tokens(1, max(2, settings.longest // 2))  # what fresh prompts share
        self.nodes: dict[str, Node] = {}
        self.graphs = 0

    def run(self) -> None:
        """Live. Raises Wrong, AssertionError of ``Engine.check`` or EngineStuck."""
        while self.graphs < self.settings.graphs:
            for _ in range(self.chance.choice([0, 0, 1, 2, 6])):
                self.act()
            self.step()
        self.end()

    def step(self) -> None:
        for one in self.engine.step():
            self.nodes[one.sequence.key].sampled[-1][1] = len(one.sequence.tokens)
        self.check()

    def check(self) -> None:
        for engine in self.engines:
            engine.check()

    def end(self) -> None:
        """What waits goes on with conclusions, a level at a time; then all is over."""
        for _ in range(MAX_DEPTH):
            self.drain()
            for node in [node for node in self.nodes.values() if node.alive]:
                self.resume(node)
        self.drain()
        for node in self.nodes.values():
            self.engine.of(node.sequence).finish(node.sequence)
        self.check()
        for engine in self.engines:
            used, host = engine.pool.num_used, engine.space.num_used
            if used or host or engine.scheduler.running or engine.scheduler.paused:
                raise Wrong(f"{used} blocks and {host} host blocks are left when all is over")

    def drain(self) -> None:
        """Run what is live to its end. While none joins, the first one gains a token every few steps: a bound."""
        in_flight = self.settings.stages + self.settings.lookahead
        left = in_flight * sum(len(s.tokens) + s.budget for e in self.engines for s in e.scheduler.live)
        while self.engine.has_work:
            if left < 0:
                raise Wrong("more steps than there were tokens to run")
            left -= 1
            self.step()

    # what may happen between two steps

    def act(self) -> None:
        """One random thing to one random node."""
        alive = [node for node in self.nodes.values() if node.alive]
        if not alive or (self.chance.random() < 0.1 and len(alive) < 60):
            self.start()
            return
        node = self.chance.choice(alive)
        actions: list[tuple[Callable[[Node], None], int]] = [
            (self.child, 4),
            (self.fork, 4),
            (self.pause, 1),
            (self.wait, 4),
            (self.truncate, 1),
            (self.finish, 1),
            (self.resume, 9),
        ]
        (action,) = self.chance.choices([a for a, _ in actions], [weight for _, weight in actions])
        action(node)

    def start(self) -> None:
        self.graphs += 1
        self.submit(None, f"g{self.graphs}", self.prompt())

    def child(self, node: Node) -> None:
        if node.depth < MAX_DEPTH:
            self.submit(node, self.name(node), self.prompt())

    def fork(self, node: Node) -> None:
        """A child that goes on from any place in what its parent has."""
        length = self.chance.randint(1, len(node.sequence.tokens))
        tokens = [*node.sequence.tokens[:length], *self.tokens(0, 6)]
        if node.depth < MAX_DEPTH and len(tokens) < self.settings.longest:
            self.submit(node, self.name(node), tokens, fork_of=(node.sequence, length))

    def pause(self, node: Node) -> None:
        if not node.paused:
            self.engine.of(node.sequence).pause(node.sequence)

    def wait(self, node: Node) -> None:
        self.pause(node)
        self.engine.of(node.sequence).wait(node.sequence)

    def resume(self, node: Node) -> None:
        """With conclusions: the last tokens of some children, which end then."""
        if not node.paused:
            return
        conclusions = self.tokens(0, 4)
        for child in [c for c in node.children if c.alive and c.paused][:2]:
            conclusions += child.sequence.tokens[-3:]
            self.finish(child)
        if len(node.sequence.tokens) + len(conclusions) >= self.settings.longest:
            self.finish(node)
            return
        self.engine.of(node.sequence).resume(node.sequence, conclusions, self.budget())
        node.begin()

    def truncate(self, node: Node) -> None:
        if node.paused:
            length = self.chance.randint(1, len(node.sequence.tokens))
            self.engine.of(node.sequence).truncate(node.sequence, length)
            node.forget(length)

    def finish(self, node: Node) -> None:
        """In whatever state it is, with all its descendants: what is held then is what others hold."""
        for one in node.below():
            self.engine.of(one.sequence).finish(one.sequence)
        self.check()

    # small things

    def submit(self, parent: Node | None, key: str, tokens: list[int], **options: Any) -> None:
        depth = parent.depth + 1 if parent else 0
        root = int(key.split(".")[0][1:])
        sequence = self.engine.submit(key, tokens, self.budget(), GREEDY, root=root, depth=depth, **options)
        self.nodes[key] = node = Node(sequence, depth, parent)
        node.begin()
        if parent:
            parent.children.append(node)

    def name(self, parent: Node) -> str:
        return f"{parent.sequence.key}.{len(parent.children)}"

    def prompt(self) -> list[int]:
        shared = self.system[: self.chance.choice([0, len(self.system), self.chance.randint(0, len(self.system))])]
        return [*shared, *self.tokens(1, max(1, self.settings.longest // 3))][: self.settings.longest - 1]

    def tokens(self, least: int, most: int) -> list[int]:
        return [self.chance.randrange(2, self.vocabulary) for _ in range(self.chance.randint(least, most))]

    def budget(self) -> int:
        return self.chance.choice([1, 3, 6, 12, 40])


class Soak:
    """Lives, one after another, and what they lived through."""

    def __init__(self, plain: Any, model: LoadedModel) -> None:
        self.plain = plain
        self.model = model
        self.totals: Counter[str] = Counter()
        config = plain.config.get_text_config()
        self._vocabulary, self._longest = config.vocab_size, model.max_position

    def live(self, seed: int) -> None:
        """One life and the comparison of its tokens. Raises what ``Life.run`` raises, with the settings as a note."""
        settings = Settings.draw(seed, self._longest)
        try:
            life = Life(self.model, self._vocabulary, settings)
            life.run()
            tokens = sum(self.compare(node) for node in life.nodes.values())
        except Exception as error:
            error.add_note(str(settings))
            raise
        counters = [node.sequence.counters for node in life.nodes.values()]
        self.totals.update({f"lives {settings.wait_policy}": 1, "lives": 1, "graphs": life.graphs})
        in_flight = {"lives ahead": settings.lookahead, "lives in a pipeline": settings.stages > 1}
        self.totals.update({**in_flight, "lives on replicas": settings.replicas > 1})
        self.totals.update({"sequences": len(life.nodes), "tokens": tokens, "steps": life.engine.steps})
        self.totals.update({name: sum(getattr(c, name) for c in counters) for name in SURVIVED})

    @torch.inference_mode()
    def compare(self, node: Node) -> int:
        """The sampled tokens of one sequence, every one of which plain transformers would have taken."""
        tokens, ranges = node.sequence.tokens, [(start, stop) for start, stop in node.sampled if start < stop]
        if not ranges:
            return 0
        ids = torch.tensor([tokens], device=self.plain.device)
        logits = self.plain(input_ids=ids, use_cache=False).logits[0]
        for start, stop in ranges:
            rows = logits[start - 1 : stop - 1]
            gap = rows.amax(-1) - rows.gather(-1, ids[0, start:stop, None])[:, 0]
            for i in (gap > TIE * rows.std(-1)).nonzero()[:1]:
                place = start + int(i)
                raise Wrong(f"{node.sequence.key}: token {place} is {tokens[place]}, not {int(rows[i].argmax())}")
        return sum(stop - start for start, stop in ranges)


def tiny() -> tuple[Any, Any]:
    """The tests' tiny random Qwen3, whose greedy choices are far apart; and no tokenizer."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from oracle import plain_model

    return plain_model("qwen3"), SimpleNamespace(eos_token_id=1)


def load(name: str, device: str) -> Soak:
    """The model in fp32, plain and prepared."""
    target = resolve_device(device)
    plain, tokenizer = tiny() if name == "tiny" else load_pretrained(name, "float32", target)
    plain.set_attn_implementation("eager")
    plain = plain.to(target).eval()
    return Soak(plain, prepare_model(copy.deepcopy(plain), tokenizer, name, target))


def report(totals: Counter[str], seconds: float) -> str:
    policies = ", ".join(f"{totals[f'lives {p}']} {p}" for p in get_args(WaitPolicy))
    flights = ", ".join(f"{totals[f'lives {how}']} {how}" for how in ("ahead", "in a pipeline", "on replicas"))
    return (
        f"{totals['lives']:,} lives ({policies}; {flights}) in {seconds:,.0f} s: {plural(totals['graphs'], 'graph')}, "
        f"{totals['sequences']:,} sequences, {totals['steps']:,} steps, {totals['tokens']:,} tokens equal to plain "
        f"transformers\nsurvived: {totals['preemptions']:,} preemptions, {totals['dropped']:,} drops, "
        f"{totals['offloaded_blocks']:,} blocks offloaded, {totals['restored_blocks']:,} restored, "
        f"{totals['forked_blocks']:,} forked, {totals['copied_blocks']:,} copied, {totals['reused']:,} tokens reused"
    )


def soak(name: str, device: str, seed: int, seconds: float) -> tuple[Counter[str], float, BaseException | None]:
    """Lives from ``seed`` on until ``seconds`` are over, at least one: totals, seconds, and what ended it early."""
    run = load(name, device)
    console = Console(stderr=True)
    columns = (BarColumn(None), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=seconds, now="")
        for life in itertools.count(seed):
            try:
                run.live(life)
            except KeyboardInterrupt as error:
                return run.totals, time.monotonic() - began, error
            except Exception as error:
                error.add_note(f"python benchmarks/soak.py --model {name} --device {device} --seed {life} --minutes 0")
                return run.totals, time.monotonic() - began, error
            elapsed = time.monotonic() - began
            now = f"{run.totals['lives']:,} lives, {run.totals['tokens']:,} tokens"
            progress.update(bar, completed=elapsed, now=now)
            if elapsed >= seconds:
                break
    return run.totals, elapsed, None


def main() -> int:
    args = build_parser().parse_args()
    totals, seconds, error = soak(args.model, args.device, args.seed, args.minutes * 60)
    failed = error is not None and not isinstance(error, KeyboardInterrupt)
    print(report(totals, seconds))
    if failed:
        traceback.print_exception(error)
        print(f"FAILED in the life with seed {args.seed + totals['lives']}; the last line above brings it back.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            **environment(),
            "seed": args.seed,
            "seconds": seconds,
            "failure": repr(error) if failed else None,
            **totals,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
