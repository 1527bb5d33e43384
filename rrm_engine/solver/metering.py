"""Measures a job: time in which nodes decoded in parallel, the critical path, first tokens, resumes."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of dependent work: the ``tokens`` decoded one after the other, and the ``steps`` that gave them."""

    tokens: int = 0
    steps: int = 0

    @staticmethod
    def longest(chains: "Iterable[Chain]") -> "Chain":
        """The most tokens and the most steps, possibly of two different chains."""
        found = [Chain(), *chains]
        return Chain(max(c.tokens for c in found), max(c.steps for c in found))


@dataclass(slots=True)
class Clock:
    """The longest ``chain`` up to a node's last token, which ``step`` gave."""

    chain: Chain = Chain()
    step: int = -1
    decoding: bool = False
    resumed_at: float | None = None  # set from a resume to the token that follows it


@dataclass(slots=True)
class Meter:
    """Measures one job from its nodes' starts, tokens, pauses and resumes. Paths separate parent and child by dots."""

    started_at: float
    ttft_s: float | None = None
    time_to_first_child_s: float | None = None
    parallel_s: float = 0.0
    overlap_s: float = 0.0
    resume_latency_s: list[float] = field(default_factory=list)
    clocks: dict[str, Clock] = field(default_factory=dict)
    _since: float = 0.0
    _parallel: bool = False
    _overlap: bool = False

    def start(self, node: str, now: float, after: Iterable[Chain] = ()) -> None:
        """A node starts to decode, after the chains ``after``."""
        self.clocks[node] = Clock(Chain.longest(after))
        self._set_decoding(node, True, now)

    def wrote(self, node: str, now: float, tokens: int, step: int, is_child: bool) -> None:
        clock = self.clocks[node]
        clock.chain = Chain(clock.chain.tokens + tokens, clock.chain.steps + (step != clock.step))
        clock.step = step
        if self.ttft_s is None:
            self.ttft_s = now - self.started_at
        if is_child and self.time_to_first_child_s is None:
            self.time_to_first_child_s = now - self.started_at
        if clock.resumed_at is not None:
            self.resume_latency_s.append(now - clock.resumed_at)
            clock.resumed_at = None

    def pause(self, node: str, now: float) -> None:
        """The node has stopped decoding: it waits or is over."""
        self._set_decoding(node, False, now)

    def resume(self, node: str, now: float, after: Iterable[str]) -> None:
        """The node goes on, after its own last token and those of the nodes ``after`` that it waited for."""
        clock = self.clocks[node]
        clock.chain = Chain.longest([clock.chain, *(self.clocks[n].chain for n in after if n in self.clocks)])
        clock.resumed_at = now
        self._set_decoding(node, True, now)

    def _set_decoding(self, node: str, decoding: bool, now: float) -> None:
        if self._parallel:
            self.parallel_s += now - self._since
        if self._overlap:
            self.overlap_s += now - self._since
        self._since = now
        self.clocks[node].decoding = decoding
        active = [n for n, clock in self.clocks.items() if clock.decoding]
        self._parallel = len(active) > 1
        self._overlap = any(b.startswith(a + ".") for a in active for b in active)
