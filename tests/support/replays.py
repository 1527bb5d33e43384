"""Graphs to replay, and how the tests replay them."""

from typing import Any

from oracle import VOCABULARY

from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.replay.contender import Replayed
from rrm_engine.replay.driver import Memory, Ours, blocks_needed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.reader import parse_graph
from rrm_engine.replay.variant import parse_variant

BLOCK = 4
PREFIX, PROMPT, PLAN, CONCLUSIONS, CONTINUATION = 9, 6, 7, 5, 4  # 9 tokens: two full blocks are shared
FLAT: dict[str, Any] = {
    "id": "flat",
    "shared_prefix": PREFIX,
    "nodes": {
        "root": {
            "prompt": PROMPT,
            "steps": [
                {"decode": PLAN},
                {"child": "a"},
                {"decode": 1},
                {"child": "b"},
                {"await": ["a", "b"]},
                {"append": CONCLUSIONS},
                {"decode": CONTINUATION},
            ],
        },
        "a": {"prompt": PROMPT, "steps": [{"decode": 11}]},
        "b": {"prompt": PROMPT, "steps": [{"decode": 8}]},
    },
}
DEEP = {  # two levels, a fork of a node that goes on, dependencies, two awaits, a turn that awaits no child
    "id": "deep",
    "seed": 3,
    "shared_prefix": 10,
    "nodes": {
        "root": {
            "prompt": 5,
            "steps": [
                {"decode": 6},
                {"child": "root.a"},
                {"decode": 3},
                {"child": "root.b"},
                {"decode": 2},
                {"await": ["root.a"]},
                {"append": 6},
                {"decode": 5},
                {"child": "root.c"},
                {"await": ["root.b", "root.c"]},
                {"append": 7},
                {"decode": 6},
                {"append": 2},
                {"decode": 3},
            ],
        },
        "root.a": {
            "prompt": 4,
            "steps": [
                {"decode": 5},
                {"child": "root.a.x"},
                {"child": "root.a.y"},
                {"decode": 4},
                {"await": ["root.a.x", "root.a.y"]},
                {"append": 3},
                {"decode": 4},
            ],
        },
        "root.a.x": {"prompt": 3, "steps": [{"decode": 12}], "fork": True},
        "root.a.y": {"prompt": 6, "steps": [{"decode": 5}], "after": ["root.a.x"]},
        "root.b": {"prompt": 3, "steps": [{"decode": 9}], "fork": True, "after": ["root.a"]},
        "root.c": {"prompt": 5, "steps": [{"decode": 4}]},
        "other": {"prompt": 7, "steps": [{"decode": 8}], "after": ["root.c"]},
    },
}
CARRIED = (
    FLAT
    | {  # the conclusions are the children's own tokens
        "id": "carried",
        "nodes": FLAT["nodes"]
        | {
            "root": {
                "prompt": PROMPT,
                "steps": [
                    *FLAT["nodes"]["root"]["steps"][:5],
                    {"append": 5, "of": "a"},
                    {"append": 4, "of": "b"},
                    {"append": 2},
                    {"decode": CONTINUATION},
                ],
            }
        },
    }
)
NAMES = [
    *("pin", "offload", "drop", "lru", "auto", "pin+nocache", "offload+nocache", "drop+nocache"),
    *("auto+serial", "serial", "no-reuse", "serial+no-reuse"),
    *("pin+fork", "offload+fork", "drop+fork", "lru+fork+nocache"),
]


def drawn(value: dict[str, Any]) -> Graph:
    return parse_graph(value).drawn(VOCABULARY)


def memory_for(model: LoadedModel, graph: Graph, **settings: Any) -> Memory:
    blocks = max(blocks_needed(graph, BLOCK), blocks_needed(graph.forked(), BLOCK))
    return Memory(model, blocks, block_size=BLOCK, **{"step_tokens": 32, "splices": True, **settings})


def run(name: str, memory: Memory, graph: Graph) -> Replayed:
    return Ours(parse_variant(name), memory).replay(graph, lambda engine: engine.check())
