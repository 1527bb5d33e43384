"""A graph's life as a state machine without I/O: told that a node has a new token, it answers what happens next.

The same machine drives our engine and its peers, so that all run the same graph in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rrm_engine.replay.graph import Append, Attach, Await, Child, Decode, Graph, Node, Step, count, ids


@dataclass(frozen=True, slots=True)
class Start:
    """Start ``node`` from ``tokens`` and let it decode ``decode`` tokens.

    With ``fork_of`` = (parent, n) the first n of them are the parent's, and not in ``tokens``.
    """

    node: str
    tokens: list[int]
    decode: int
    fork_of: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """``node`` has stopped decoding and goes on later."""

    node: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Append ``tokens`` to a waiting ``node`` and let it decode ``decode`` more.

    ``attached``: which of them are children's, with KV that may be attached.
    """

    node: str
    tokens: list[int]
    decode: int
    attached: tuple[Attach, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """``node`` has decoded its last token."""

    node: str


Command = Start | Wait | Resume | End


@dataclass(slots=True)
class _Life:
    """Where a node is: the step it is in, how many of that step's tokens it has, and how many in all."""

    node: Node
    rank: tuple[int, int]  # (deeper first, order of the file)
    step: int = 0
    done: int = 0
    length: int = 0
    state: str = "unborn"  # unborn, born, running, waiting, ended


class Walk:
    """One replay of a drawn graph. With ``serial`` one node runs at a time, the deepest that can, depth first."""

    def __init__(self, graph: Graph, serial: bool = False) -> None:
        self.graph = graph
        self.serial = serial
        self._lives = {
            name: _Life(node, (-graph.depth(name), order), length=graph.context(name))
            for order, (name, node) in enumerate(graph.nodes.items())
        }
        for root in graph.roots:
            self._lives[root].state = "born"

    @property
    def answered(self) -> bool:
        """Whether every root has ended."""
        return all(self._lives[root].state == "ended" for root in self.graph.roots)

    @property
    def unfinished(self) -> list[str]:
        """Nodes that have not ended."""
        return [name for name, life in self._lives.items() if life.state != "ended"]

    def start(self) -> list[Command]:
        """What happens first."""
        return list(self._ready())

    def forced(self, name: str) -> list[int]:
        """The tokens that ``name``, just started or resumed, has to have where it decodes until it stops."""
        return [token for step in self._phase(self._lives[name]) for token in ids(step.tokens)]

    def token(self, name: str) -> list[Command]:
        """What happens now that ``name`` has one more token."""
        life = self._lives[name]
        step = life.node.steps[life.step]
        assert isinstance(step, Decode)
        life.done += 1
        life.length += 1
        if life.done < count(step.tokens):
            return []
        life.step, life.done = life.step + 1, 0
        return [*self._pass_on(name, life), *self._ready()]

    def _pass_on(self, name: str, life: _Life) -> Iterator[Command]:
        """Let a node that has come past a decode step start children, and stop if it does not decode on."""
        steps = life.node.steps
        while life.step < len(steps) and isinstance(step := steps[life.step], Child):
            self._lives[step.node].state = "born"
            life.step += 1
        if life.step == len(steps):
            life.state = "ended"
            yield End(name)
        elif not isinstance(steps[life.step], Decode):
            life.state = "waiting"
            yield Wait(name)

    def _ready(self) -> Iterator[Command]:
        """Start and resume what can go on."""
        for name, life in sorted(self._lives.items(), key=lambda item: item[1].rank):
            if self.serial and any(other.state == "running" for other in self._lives.values()):
                return
            if life.state == "born" and self._ended(life.node.after):
                life.state = "running"
                yield self._begin(name, life)
            elif life.state == "waiting" and (turn := self._conclusions(life)) is not None:
                life.state = "running"
                tokens = [token for step in turn if isinstance(step, Append) for token in ids(step.tokens)]
                life.length += len(tokens)
                yield Resume(name, tokens, self._decode(life), tuple(self.graph.attached(turn)))

    def _begin(self, name: str, life: _Life) -> Start:
        node, graph = life.node, self.graph
        if not node.fork:
            return Start(name, ids(graph.shared_prefix) + ids(node.prompt), self._decode(life))
        prompt = ids(node.prompt)
        return Start(name, prompt, self._decode(life), (graph.parents[name], life.length - len(prompt)))

    def _conclusions(self, life: _Life) -> tuple[Step, ...] | None:
        """The steps up to a waiting node's next decode, where it goes on to, if all that it awaits has ended."""
        steps, at = life.node.steps, life.step
        while not isinstance(step := steps[at], Decode):
            if isinstance(step, Await) and not self._ended(step.nodes):
                return None
            at += 1
        turn, life.step = steps[life.step : at], at
        return turn

    def _decode(self, life: _Life) -> int:
        """Tokens the node decodes before it stops the next time."""
        return sum(count(step.tokens) for step in self._phase(life))

    def _phase(self, life: _Life) -> Iterator[Decode]:
        for step in life.node.steps[life.step :]:
            if isinstance(step, Decode):
                yield step
            elif not isinstance(step, Child):
                return

    def _ended(self, names: tuple[str, ...]) -> bool:
        return all(self._lives[name].state == "ended" for name in names)
