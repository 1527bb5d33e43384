"""One sequence of the batch: its tokens, its block table, and what ends it."""

import sys
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import torch

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.kv.span import Span
from rrm_engine.kv.table import BlockTable


class State(Enum):
    WAITING = "waiting"  # to be admitted to steps
    RUNNING = "running"  # takes part in steps
    PAUSED = "paused"  # keeps its KV unless memory runs out; resumes with more tokens, or is finished
    FINISHED = "finished"


class Stop(Enum):
    """Why a sequence paused by itself."""

    EOS = "eos"
    LENGTH = "length"  # the budget given at submit or resume is spent
    CONTEXT = "context"  # the sequence has reached the longest length allowed
    ERROR = "error"  # its grammar failed


class Matcher(Protocol):
    """A grammar's state for one sequence."""

    @property
    def cut(self) -> bool:
        """Whether it has ended the sequence's thinking before the model did."""

    def mask(self) -> np.ndarray:
        """int32 bitmask ``[ceil(vocabulary / 32)]`` of the tokens that may come next."""

    def accept(self, token: int) -> None:
        """Advance by a token. Raises ValueError, and does not advance, if it may not come next."""

    def forced(self) -> list[int]:
        """Tokens that spell the text that must come next, if there is only one; other tokens may spell it too."""

    def copy(self) -> "Matcher":
        """An independent matcher in the same state."""


@dataclass(slots=True)
class Counters:
    prefilled: int = 0  # tokens run through the model that were not sampled in the step before
    decoded: int = 0  # tokens sampled
    drafted: int = 0  # guessed tokens that were run
    accepted: int = 0  # of these, those that were then sampled
    reused: int = 0  # tokens whose KV was in the pool already: prefix cache or fork
    forked_blocks: int = 0
    copied_blocks: int = 0
    preemptions: int = 0
    dropped: int = 0  # times memory ran out and its KV was given up while it was paused
    offloaded_blocks: int = 0  # blocks moved to host memory
    restored_blocks: int = 0  # blocks brought back from there
    spliced: int = 0  # tokens whose KV was attached
    dropped_spans: int = 0  # kept spans given up because memory ran out


@dataclass(slots=True)
class Probe:
    """What measurements ask of a sequence, apart from what requests ask."""

    best_effort: bool = False  # reclaims blocks only if no sequence has higher priority; leaves the prefix cache alone
    forced: deque[int] = field(default_factory=deque)  # tokens to append in place of the next ones sampled
    keep_logits: bool = False  # put the next token's logits into ``logits``
    logits: torch.Tensor | None = None  # fp32 ``[vocabulary]``, before grammars and processors


@dataclass(slots=True, eq=False)
class Sequence:
    """``tokens[: table.length]`` have KV; the rest is to be run. ``key`` names it in traces and seeds its noise.

    Priority is (root, deeper first, arrival): older roots go before younger ones, and within one graph deeper nodes go
    first, because a finished child frees its parent.

    ``kept`` are spans of other sequences' KV that it holds. ``splices`` are (position in ``tokens``, span): a live span
    is attached there; the tokens of one that was given up are run like any others. ``spliced`` are the token ranges
    whose KV was attached.
    """

    key: str
    tokens: list[int]
    table: BlockTable
    sampling: SamplingParams
    noise_key: int
    budget: int
    longest: int = sys.maxsize  # most tokens it may have
    root: int = 0
    depth: int = 0
    arrival: int = 0
    matcher: Matcher | None = None
    first: int = 0  # index of the first token that it samples in its phase
    state: State = State.WAITING
    admitted: tuple[float, int] = (0.0, 0)  # the step that admitted it last: when that began, and its number
    flights: list[int] = field(default_factory=list)  # numbers of the steps in flight that sample tokens for it
    counters: Counters = field(default_factory=Counters)
    unrun_samples: int = 0  # 1 while the last sampled token has not been run yet
    kept: list[Span] = field(default_factory=list)
    splices: list[tuple[int, Span]] = field(default_factory=list)  # ascending, at least one token to run after each
    spliced: list[tuple[int, int]] = field(default_factory=list)
    probe: Probe = field(default_factory=Probe)

    @property
    def priority(self) -> tuple[int, int, int]:
        return (self.root, -self.depth, self.arrival)

    @property
    def length(self) -> int:
        """The number of its tokens, those in flight included."""
        return len(self.tokens) + len(self.flights)

    @property
    def launched(self) -> int:
        """The number of the last step in flight that samples for it, 0 if there is none."""
        return self.flights[-1] if self.flights else 0

    @property
    def pending(self) -> int:
        """How many tokens have to be run before the next one can be sampled; the last of them may be in flight."""
        return self.length - self.table.length

    @property
    def can_run_ahead(self) -> bool:
        """Whether budget and length allow one more token after those in flight."""
        return self.budget > len(self.flights) and self.length < self.longest

    @property
    def holds_blocks(self) -> bool:
        return bool(self.table.blocks) or any(span.live for span in self.kept)

    def next_splice(self) -> tuple[int, Span] | None:
        """The next splice that can be made. Those whose position has KV by now are dropped and their spans released."""
        while self.splices:
            position, span = self.splices[0]
            if span.live and position >= self.table.length:
                return position, span
            del self.splices[0]
            if span.live:
                self.let_go(span)
        return None

    def attached(self, span: Span, position: int) -> None:
        """A step has copied ``span`` to ``position``."""
        self.spliced.append((position, position + len(span)))
        self.counters.spliced += len(span)
        self.let_go(span)

    def drop_splices(self, length: int) -> None:
        """Give back spans that would cover the token ``length - 1`` or later ones: its logits must be computed."""
        while self.splices and self.splices[-1][0] + len(self.splices[-1][1]) >= length:
            self.let_go(self.splices.pop()[1])

    def let_go(self, span: Span) -> None:
        span.release()
        if span in self.kept:
            self.kept.remove(span)

    def give_up_spans(self) -> bool:
        """Give all kept spans back; False if there was none."""
        given_up = len(self.kept)
        for span in self.kept:
            span.release()
        self.kept.clear()
        self.counters.dropped_spans += given_up
        return given_up > 0
