"""The same graphs on engines that take requests: a node is one, and to go on after an await is a new one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from rrm_engine.replay.contender import Clock, Replayed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.walk import Command, Resume, Start, Walk


@dataclass(frozen=True, slots=True)
class Got:
    """New tokens of a request. ``ended``: there come no more; ``cached`` of its prompt's tokens needed no prefill: told
    at most once, None until then.
    """

    request: str
    tokens: Sequence[int]
    ended: bool
    cached: int | None = None


class Requests(Protocol):
    """An engine that decodes requests greedily."""

    def begin(self) -> None:
        """Get ready for a replay, with an empty cache."""

    def submit(self, request: str, tokens: Sequence[int], decode: int) -> None:
        """Ask for exactly ``decode`` tokens after ``tokens``, handed out as they come."""

    def receive(self) -> Iterable[Got]:
        """What has come since the last time; waits where that is nothing."""

    def end(self) -> None:
        """The replay is over."""


class Peer:
    """Graphs on an engine that takes requests, with all of a node's tokens each time.

    Nothing can be forced there: a node goes on with the tokens that it sampled, and there are as many as in the graph.
    """

    def __init__(self, name: str, requests: Requests, fork: bool = False) -> None:
        self.name = name
        self.requests = requests
        self.fork = fork

    def replay(self, graph: Graph) -> Replayed:
        """Run ``graph`` with an empty cache."""
        graph = graph.forked() if self.fork else graph
        self.requests.begin()
        try:
            return _Play(self.name, self.requests, graph).run()
        finally:
            self.requests.end()


class _Play:
    def __init__(self, peer: str, requests: Requests, graph: Graph) -> None:
        self.peer = peer
        self.requests = requests
        self.walk = Walk(graph)
        self.graph = graph
        self.tokens: dict[str, list[int]] = {}
        self.node_of: dict[str, str] = {}  # of every request
        self.prompts: dict[str, int] = {}  # tokens of every request's prompt
        self.open: set[str] = set()  # requests that have not ended
        self.cached: dict[str, int] = {}

    def run(self) -> Replayed:
        clock = Clock()
        self._carry_out(self.walk.start())
        while self.open:
            for got in self.requests.receive():
                self._take(got, clock, perf_counter())
        lengths = {name: len(tokens) for name, tokens in self.tokens.items()}
        if clock.answer_s is None or lengths != {name: self.graph.length(name) for name in self.graph.nodes}:
            raise RuntimeError(f"{self.peer} did not end graph {self.graph.id} with the tokens that were asked for")
        told = self.cached.keys() == self.prompts.keys()
        reused = sum(self.cached.values())
        prefilled = sum(self.prompts.values()) - reused
        return Replayed(
            clock.answer_s,
            clock.resume_s,
            prefilled=prefilled if told else None,
            reused=reused if told else None,
            tokens=self.tokens,
        )

    def _take(self, got: Got, clock: Clock, now: float) -> None:
        if got.cached is not None:
            self.cached[got.request] = got.cached
        if got.ended:
            self.open.discard(got.request)
        name = self.node_of[got.request]
        for token in got.tokens:
            self.tokens[name].append(token)
            clock.token(name, now)
            commands = self.walk.token(name)
            self._carry_out(commands)
            clock.commands(commands, self.walk.answered, now)

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Start(node=name, tokens=tokens, fork_of=fork):
                    inherited = self.tokens[fork[0]][: fork[1]] if fork else []
                    self.tokens[name] = [*inherited, *tokens]
                    self._request(name, command.decode)
                case Resume(node=name, tokens=tokens):
                    self.tokens[name] += tokens
                    self._request(name, command.decode)

    def _request(self, name: str, decode: int) -> None:
        request = f"{name}#{len(self.node_of)}"
        self.node_of[request] = name
        self.prompts[request] = len(self.tokens[name])
        self.open.add(request)
        self.requests.submit(request, self.tokens[name], decode)
