"""Named ways to run the same graph: what becomes of a waiting node's KV, what is reused, what runs side by side."""

from dataclasses import dataclass, replace
from typing import get_args

from rrm_engine.config import WaitPolicy
from rrm_engine.errors import RrmError
from rrm_engine.replay.graph import Append, Graph

POLICIES: tuple[WaitPolicy, ...] = get_args(WaitPolicy)
JOINS = ("splice", "transcript")
SWITCHES = ("nocache", "fork", "serial", "no-reuse", *JOINS)
HELP = (
    f"names of {', '.join(POLICIES)} and {', '.join(SWITCHES)}, joined by +: nocache: no prefix cache; fork: every "
    f"child starts from its parent's whole context; serial: one node at a time, depth first; no-reuse: drop+nocache; "
    f"splice: conclusions' KV is attached, an approximation; transcript: the same with children's whole answers in the "
    f"place of their conclusions"
)


@dataclass(frozen=True, slots=True)
class Variant:
    """``wait_policy`` is the engine's; ``attach``: KV of children is attached to their parents, so that what follows
    is approximate. ``fork`` and ``whole`` (children's whole answers are appended) change what the nodes read, so that
    they are compared with their like only.
    """

    name: str
    wait_policy: WaitPolicy = "pin"
    prefix_cache: bool = True
    fork: bool = False
    serial: bool = False
    attach: bool = False
    whole: bool = False

    def graph(self, graph: Graph) -> Graph:
        """The graph as this variant runs it. Raises RrmError where it should attach KV and knows of none."""
        appends = [step for node in graph.nodes.values() for step in node.steps if isinstance(step, Append)]
        if self.attach and appends and not any(step.of for step in appends):
            raise RrmError(
                f"--policies {self.name}: no append step of graph {graph.id} names the child whose conclusion it is "
                f"(its key is of); a recorded run has that if it was recorded with --join splice or transcript"
            )
        graph = graph.transcribed() if self.whole else graph
        return graph.forked() if self.fork else graph

    @property
    def reference(self) -> "Variant":
        """The variant whose logits this one has to have."""
        words = ["pin", *(["fork"] if self.fork else []), *(["whole answers"] if self.whole else [])]
        return Variant("+".join(words), fork=self.fork, whole=self.whole)


def parse_variant(name: str) -> Variant:
    """A variant by its name, as in ``drop+nocache``. Raises RrmError with one sentence."""
    words = name.split("+")
    variant = Variant(name)
    policies = [word for word in words if word in POLICIES]
    if unknown := [word for word in words if word not in POLICIES and word not in SWITCHES]:
        raise RrmError(f"--policies {name}: there is no {unknown[0]!r}; it takes {HELP}")
    exclusive = (POLICIES, JOINS, ("no-reuse", *POLICIES))
    if any(len([w for w in words if w in some]) > 1 for some in exclusive) or len(set(words)) < len(words):
        raise RrmError(f"--policies {name}: the words contradict or repeat each other; it takes {HELP}")
    if "no-reuse" in words:
        variant = replace(variant, wait_policy="drop", prefix_cache=False)
    if policies:
        variant = replace(variant, wait_policy=policies[0])
    if "nocache" in words:
        variant = replace(variant, prefix_cache=False)
    whole = "transcript" in words
    return replace(
        variant, fork="fork" in words, serial="serial" in words, attach=whole or "splice" in words, whole=whole
    )
