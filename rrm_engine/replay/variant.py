"""Named ways to run the same graph: what becomes of a waiting node's KV, what is reused, what runs side by side."""

from dataclasses import dataclass, replace
from typing import get_args

from rrm_engine.engine.scheduler import WaitPolicy
from rrm_engine.replay.graph import Graph

POLICIES: tuple[WaitPolicy, ...] = get_args(WaitPolicy)
SWITCHES = ("nocache", "fork", "serial", "no-reuse")
HELP = (
    f"names of {', '.join(POLICIES)} and {', '.join(SWITCHES)}, joined by +: nocache: no prefix cache; fork: every "
    f"child starts from its parent's whole context; serial: one node at a time, depth first; no-reuse: drop+nocache"
)


@dataclass(frozen=True, slots=True)
class Variant:
    """``wait_policy`` is the engine's; ``fork`` changes what the nodes read, so it is compared with forks only."""

    name: str
    wait_policy: WaitPolicy = "pin"
    prefix_cache: bool = True
    fork: bool = False
    serial: bool = False

    def graph(self, graph: Graph) -> Graph:
        """The graph as this variant runs it."""
        return graph.forked() if self.fork else graph

    @property
    def reference(self) -> "Variant":
        """The variant whose logits this one has to have."""
        return Variant("pin+fork" if self.fork else "pin", fork=self.fork)


def parse_variant(name: str) -> Variant:
    """A variant by its name, as in ``drop+nocache``. Raises ValueError with one sentence."""
    words = name.split("+")
    variant = Variant(name)
    policies = [word for word in words if word in POLICIES]
    if unknown := [word for word in words if word not in POLICIES and word not in SWITCHES]:
        raise ValueError(f"--policies {name}: there is no {unknown[0]!r}; it takes {HELP}")
    if len(policies) > 1 or len(set(words)) < len(words) or (policies and "no-reuse" in words):
        raise ValueError(f"--policies {name}: the words contradict or repeat each other; it takes {HELP}")
    if "no-reuse" in words:
        variant = replace(variant, wait_policy="drop", prefix_cache=False)
    if policies:
        variant = replace(variant, wait_policy=policies[0])
    if "nocache" in words:
        variant = replace(variant, prefix_cache=False)
    return replace(variant, fork="fork" in words, serial="serial" in words)
