"""One graph on our engine: the graph's tokens take the place of those that are sampled."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import torch

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.errors import RrmError
from rrm_engine.kv.host import SwapCosts
from rrm_engine.kv.pool import NULL_BLOCK
from rrm_engine.kv.span import Span
from rrm_engine.loading.engines import build_engine, build_runner
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.replay.check import Recorder
from rrm_engine.replay.contender import Clock, Replayed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.variant import Variant
from rrm_engine.replay.walk import Command, End, Resume, Start, Wait, Walk

GREEDY = SamplingParams()
RUBBISH = 3.0


class Ours:
    """A variant on one loaded model. The KV tensors are shared by all variants: one replay runs at a time."""

    def __init__(self, variant: Variant, memory: "Memory") -> None:
        self.name = variant.name
        self.variant = variant
        self.memory = memory

    def replay(self, graph: Graph, check: Callable[[Engine], None] | None = None) -> Replayed:
        """Run ``graph`` in an empty pool. ``check`` is called after every step.

        Raises RrmError, with the numbers, if the graph's longest node does not fit.
        """
        graph = self.variant.graph(graph)
        engine = self.memory.engine(self.variant, graph)
        play = _Play(engine, graph, Walk(graph, self.variant.serial), self.variant.attach)
        clock = Clock()
        play.carry_out(play.walk.start())
        while engine.has_work:
            sampled = engine.step()
            now = perf_counter()
            for one in sampled:
                name = one.sequence.key
                play.sampled[name].append(one.token)
                clock.token(name, now)
                commands = play.walk.token(name)
                play.carry_out(commands)
                clock.commands(commands, play.walk.answered, now)
            if check is not None:
                check(engine)
        return play.result(clock)


class _Play:
    """The sequences of one replay."""

    def __init__(self, engine: Engine, graph: Graph, walk: Walk, attach: bool = False) -> None:
        self.engine = engine
        self.graph = graph
        self.walk = walk
        self.wanted = {a.child: a for a in graph.all_attached()} if attach else {}
        self.spans: dict[str, Span] = {}  # by child
        self.sequences: dict[str, Sequence] = {}
        self.sampled: dict[str, list[int]] = {}

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Start():
                    self._start(command)
                case Wait(node=name):  # its budget was spent, so the engine has paused it
                    self.engine.wait(self.sequences[name])
                case Resume(node=name, tokens=tokens, decode=decode, attached=attached):
                    splices = [(a.at, self.spans.pop(a.child)) for a in attached if a.child in self.spans]
                    self.engine.resume(self.sequences[name], tokens, decode, splices=splices)
                    self.sequences[name].probe.forced.extend(self.walk.forced(name))
                case End(node=name):
                    self._keep(name)
                    self.engine.finish(self.sequences[name])

    def _start(self, start: Start) -> None:
        tokens, fork = start.tokens, None
        if start.fork_of is not None:
            parent, shared = start.fork_of
            fork = (self.sequences[parent], shared)
            tokens = self.sequences[parent].tokens[:shared] + tokens
        depth = self.graph.depth(start.node)
        sequence = self.engine.submit(start.node, tokens, start.decode, GREEDY, depth=depth, fork_of=fork)
        sequence.probe.forced.extend(self.walk.forced(start.node))
        self.sequences[start.node] = sequence
        self.sampled[start.node] = []

    def _keep(self, name: str) -> None:
        """Hold what the parent of a node that ends will need of its KV."""
        if (wanted := self.wanted.get(name)) is not None:
            parent, child = self.sequences[self.graph.parents[name]], self.sequences[name]
            self.spans[name] = self.engine.keep(parent, child, wanted.start, wanted.start + wanted.size)

    def result(self, clock: Clock) -> Replayed:
        if clock.answer_s is None or self.walk.unfinished:
            raise RuntimeError(f"the replay of {self.graph.id} ended before {', '.join(self.walk.unfinished)} did")
        counters = [sequence.counters for sequence in self.sequences.values()]
        engine = self.engine
        return Replayed(
            answer_s=clock.answer_s,
            resume_s=clock.resume_s,
            steps=engine.steps,
            prefilled=sum(c.prefilled for c in counters),
            reused=sum(c.reused for c in counters),
            attached=sum(c.spliced for c in counters),
            copied_blocks=sum(c.copied_blocks for c in counters),
            offloaded_blocks=sum(c.offloaded_blocks for c in counters),
            restored_blocks=sum(c.restored_blocks for c in counters),
            preemptions=sum(c.preemptions + c.dropped for c in counters),
            peak_blocks=engine.pool.peak_used,
            peak_host_blocks=engine.space.peak_used,
            tokens={name: list(sequence.tokens) for name, sequence in self.sequences.items()},
            sampled=self.sampled,
        )


class Memory:
    """The model, its KV tensors, and how much of them a replay may use."""

    def __init__(
        self,
        model: LoadedModel,
        blocks: int,
        *,
        block_size: int = 16,
        step_tokens: int = 512,
        max_sequences: int = 64,
        host_blocks: int | None = None,
        lookahead: bool | None = None,
        splices: bool = False,
    ) -> None:
        """``blocks`` is the size of the pool, ``host_blocks`` the room for what is offloaded (None: as many).

        ``lookahead`` is the engine's (None: on CUDA). ``splices``: some variants attach KV.
        """
        self.model = model
        self.block_size = block_size
        self.settings = EngineSettings(
            blocks=blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            max_sequence_tokens=blocks * block_size,
            host_blocks=blocks if host_blocks is None else host_blocks,
            lookahead=model.device.type == "cuda" if lookahead is None else lookahead,
            splices=splices,
        )
        self.recorder = Recorder()
        self.runner = build_runner(model, self.settings, self.recorder)
        self.limits: dict[str, int] = {}  # smaller pools, by graph id
        self._costs: SwapCosts | None = None

    @torch.inference_mode()
    def spoil(self) -> None:
        """Overwrite every block: what an earlier replay of the same graph left is right even where nothing was done."""
        cache = self.runner.cache
        for index, shape in cache.shapes.items():
            for pool in cache.pools(index, shape):
                pool[NULL_BLOCK + 1 :] = RUBBISH

    def pool_blocks(self, graph: Graph) -> int:
        """Blocks that a replay of ``graph`` may use. A limit never cuts off what the longest node takes."""
        blocks = self.settings.blocks
        return min(max(self.limits.get(graph.id, blocks), -(-_longest(graph) // self.block_size)), blocks)

    def engine(self, variant: Variant, graph: Graph) -> Engine:
        """An engine with an empty pool, for sequences as long as the graph's longest."""
        if variant.attach and not self.settings.splices:
            raise ValueError(f"{variant.name} attaches KV: make its Memory with splices")
        longest = _longest(graph)
        if longest > self.model.max_position:
            raise RrmError(
                f"graph {graph.id} has a node of {longest - 1} tokens and {self.model.name} knows "
                f"{self.model.max_position} positions: choose other --graphs or a --model with a longer context"
            )
        settings = replace(
            self.settings,
            blocks=self.pool_blocks(graph),
            prefix_cache=variant.prefix_cache,
            max_sequence_tokens=longest,
            wait_policy=variant.wait_policy,
            host_blocks=self.settings.host_blocks if variant.wait_policy in ("offload", "auto") else 0,
        )
        engine = build_engine(self.model, settings, self.runner, self._costs)
        self._costs = engine.scheduler.costs or self._costs
        return engine


def blocks_needed(graph: Graph, block_size: int) -> int:
    """Blocks that always suffice: every node at its full length, nothing shared, one copied block each."""
    return sum(-(-(graph.length(name) + 1) // block_size) + 1 for name in graph.nodes)


def _longest(graph: Graph) -> int:
    """Tokens of the longest node, and one more that the engine wants to have room for."""
    return max(map(graph.length, graph.nodes)) + 1
