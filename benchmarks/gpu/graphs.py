"""Recursive graphs with forced tokens under every wait policy, against the same tokens decoded one node at a time."""

from gpu.lab import BLOCK_SIZE, Lab, Row
from rrm_engine.replay.driver import Memory, Ours, blocks_needed
from rrm_engine.replay.generate import generate, scaled
from rrm_engine.replay.measure import describe, measure, summarise
from rrm_engine.replay.variant import parse_variant

POLICIES = ("pin", "offload", "drop", "lru", "auto", "no-reuse", "pin+serial")
SCALE = 24  # an AIME graph's tokens divided by this, so that all policies fit into the time


def run(lab: Lab, rows: list[Row]) -> None:
    model = lab.model()
    graphs = generate("short", 1) if lab.tiny else scaled("aime", SCALE, 1)
    graphs = [graph.drawn(model.model.config.vocab_size) for graph in graphs]
    blocks = max(blocks_needed(graph, BLOCK_SIZE) for graph in graphs)
    step_tokens = 4096 if lab.on_cuda else 512
    memory = Memory(model, blocks, block_size=BLOCK_SIZE, step_tokens=step_tokens)
    contenders = [Ours(parse_variant(name), memory) for name in (POLICIES[:3] if lab.tiny else POLICIES)]
    rows += [{"graph": describe(graph)} for graph in graphs]
    rows += summarise(measure(contenders, graphs, repeats=1))
