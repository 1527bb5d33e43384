"""Drafts: guesses at the next tokens of a sequence, run in one step after its last token, every row checked.

What a sequence writes is a function of its context alone, noise included. So a guess is right or wrong, at any
temperature: each row of a step samples the token after it, and as long as that is the one that was guessed, the row
after it has run on the right tokens. The rows after a wrong guess are thrown away. Tokens are those without drafts.

Guesses come from what a grammar forces and from the sequence's own context (prompt look-up, Saxena 2023): where its
last tokens stood before, it is likely to go on as it did there. How many are run follows from how often they came true
and from what rows cost.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from rrm_engine.engine.sequence import Matcher, Sequence

MOST = 16  # tokens of one draft, where no number is given
SIZES = (3, 2)  # of the n-grams that are looked up, the longest first
FORCED = 0  # the source of what a grammar forces; the source of what is looked up is its n-gram's size
EXPECTED = {FORCED: 0.95, 3: 0.7, 2: 0.5}  # how many guesses of a source come true, before anything is known
WEIGHT = 4.0  # of what is expected, in checks
MEMORY = 0.9  # how much of what is known is left after one more check
STATEFUL = ("watermarking_config",)  # settings of logits processors that have to see each token exactly once
Guess = tuple[int, int]  # a token and its source


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What steps cost on this machine, in seconds: ``seconds[i]`` one of ``rows[i]`` rows over short contexts, and
    ``key`` each row for each token that it attends to.
    """

    rows: tuple[int, ...]  # ascending, at least two
    seconds: tuple[float, ...]  # never descending
    key: float

    def step(self, rows: int) -> float:
        """A step of that many rows: interpolated between measured sizes, in proportion above the largest."""
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        i = max(bisect_right(self.rows, rows), 1)
        (x0, x1), (y0, y1) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def row(self, rows: int, context: int) -> float:
        """One row more than ``rows``, over a context of so many tokens."""
        return self.step(rows + 1) - self.step(rows) + self.key * context


class Lookup:
    """Where the n-grams of a growing sequence stood last. Only what is new is looked at again.

    A sequence that lost tokens may have got others in their place, so what is found is compared with what stands there.
    """

    def __init__(self) -> None:
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in SIZES}  # where they end
        self._known = 0

    def after(self, tokens: list[int], guessed: list[int], most: int) -> tuple[list[int], int]:
        """``most`` tokens that followed where the last ones of ``tokens`` and ``guessed`` stood before, repeated where
        that is too short, and how many stood there; none if that was nowhere.
        """
        self._learn(tokens)
        for size, places in self._places.items():
            tail = tuple([*tokens[-size:], *guessed][-size:])
            at = places.get(tail, len(tokens))
            if at < len(tokens) and tuple(tokens[at - size : at]) == tail:
                found = tokens[at : at + most]
                if len(found) < most:
                    found += guessed
                return (found * -(-most // len(found)))[:most], size
        return [], 0

    def _learn(self, tokens: list[int]) -> None:
        known = min(self._known, len(tokens))
        for size, places in self._places.items():
            for at in range(max(known, size), len(tokens)):
                places[tuple(tokens[at - size : at])] = at
        self._known = len(tokens)


@dataclass(slots=True)
class Record:
    """How often guesses came true, by their source; recent ones count more."""

    tries: dict[int, float] = field(default_factory=lambda: dict.fromkeys(EXPECTED, WEIGHT))
    hits: dict[int, float] = field(default_factory=lambda: {source: WEIGHT * p for source, p in EXPECTED.items()})

    def rate(self, source: int) -> float:
        return self.hits[source] / self.tries[source]

    def note(self, source: int, hit: bool) -> None:
        self.hits[source] = MEMORY * self.hits[source] + hit
        self.tries[source] = MEMORY * self.tries[source] + 1

    def fade(self, source: int) -> None:
        """A guess of it was not run: forget a little, for what is never tried never comes true."""
        self.hits[source] = MEMORY * self.hits[source] + (1 - MEMORY) * EXPECTED[source] * WEIGHT
        self.tries[source] = MEMORY * self.tries[source] + (1 - MEMORY) * WEIGHT

    def heir(self) -> "Record":
        """The record that a new sequence begins with: the rates of this one, with the weight of an expectation."""
        return Record(dict.fromkeys(EXPECTED, WEIGHT), {source: WEIGHT * self.rate(source) for source in EXPECTED})


@dataclass(slots=True)
class Drafting:
    """Guesses for the sequences of one engine, at most ``most`` tokens a draft.

    With ``costs`` a guess is run where the tokens that it is expected to give are worth the time that its rows take;
    without them always.
    """

    most: int
    eos_ids: Collection[int]
    costs: RowCosts | None = None
    _lookups: dict[Sequence, Lookup] = field(default_factory=dict)
    _records: dict[Sequence, Record] = field(default_factory=dict)
    _sources: dict[Sequence, list[int]] = field(default_factory=dict)  # of the last draft's tokens
    _all: Record = field(default_factory=Record)

    def choose(self, sequences: SequenceOf[Sequence], rows: int, room: int) -> dict[Sequence, list[int]]:
        """Drafts of ``room`` tokens in all for ``sequences``, of which a step of ``rows`` rows decodes a token each.

        The likeliest tokens first, as long as they pay: no row may take more time than the step takes for a token.
        """
        tokens = float(len(sequences))
        if room <= 0 or not self._pays(1.0, tokens, rows, 0):
            return {}
        guesses = {sequence: self.guess(sequence) for sequence in sequences}
        offers = sorted(
            ((chance, sequence) for sequence, guess in guesses.items() for chance in self._chances(sequence, guess)),
            key=lambda offer: -offer[0],
        )
        counts = dict.fromkeys(sequences, 0)
        for chance, sequence in offers[:room]:
            if not self._pays(chance, tokens, rows, len(sequence.tokens)):
                break
            counts[sequence] += 1
            tokens, rows = tokens + chance, rows + 1
        for sequence, guess in guesses.items():
            self._sources[sequence] = [source for _, source in guess]
            if guess and not counts[sequence]:
                self._record(sequence).fade(guess[0][1])
        return {s: [token for token, _ in guesses[s][:count]] for s, count in counts.items() if count}

    def guess(self, sequence: Sequence) -> list[Guess]:
        """What may follow a sequence's tokens, as far as its limits and its grammar go."""
        most = self.room(sequence)
        if most < 1:
            return []
        matcher = sequence.matcher.copy() if sequence.matcher is not None else None
        lookup = self._lookups.setdefault(sequence, Lookup())
        guess: list[Guess] = []
        while len(guess) < most:
            left = most - len(guess)
            found, source = matcher.forced()[:left] if matcher is not None else [], FORCED
            if not found:
                found, source = lookup.after(sequence.tokens, [token for token, _ in guess], left)
            allowed = self._allowed(matcher, found)
            guess += [(token, source) for token in allowed]
            if not allowed or len(allowed) < len(found):
                break
        return guess

    def room(self, sequence: Sequence) -> int:
        """How many tokens its next draft may have.

        None where something is measured token by token, or a logits processor counts its calls.
        """
        probe, settings = sequence.probe, sequence.sampling.further
        if probe.best_effort or probe.forced or probe.keep_logits or any(name in STATEFUL for name, _ in settings):
            return 0
        return min(self.most, sequence.budget - 1, sequence.longest - len(sequence.tokens) - 1)

    def expects(self, sequence: Sequence) -> bool:
        """Whether waiting for the token in flight, to draft after it, is worth more than a step at once."""
        return len(self.guess(sequence)) > 1

    def checked(self, sequence: Sequence, drafted: int, hits: int) -> None:
        """Take note that ``drafted`` guesses were run, of which the first ``hits`` came true."""
        for i, source in enumerate(self._sources.pop(sequence, [])[: min(drafted, hits + 1)]):
            for record in (self._record(sequence), self._all):
                record.note(source, i < hits)

    def forget(self, sequence: Sequence) -> None:
        for memory in (self._lookups, self._records, self._sources):
            memory.pop(sequence, None)

    def _record(self, sequence: Sequence) -> Record:
        if sequence not in self._records:
            self._records[sequence] = self._all.heir()
        return self._records[sequence]

    def _chances(self, sequence: Sequence, guess: Iterable[Guess]) -> Iterator[float]:
        """How likely each token of a guess comes true, all before it included."""
        record = self._record(sequence)
        return accumulate((record.rate(source) for _, source in guess), mul)

    def _pays(self, chance: float, tokens: float, rows: int, context: int) -> bool:
        costs = self.costs
        return costs is None or chance * costs.step(rows) >= tokens * costs.row(rows, context)

    def _allowed(self, matcher: Matcher | None, tokens: list[int]) -> list[int]:
        """The first of ``tokens`` that may follow, up to an end of sequence; ``matcher`` is told of them."""
        for i, token in enumerate(tokens):
            if token in self.eos_ids or not _takes(matcher, token):
                return tokens[:i]
        return tokens


def _takes(matcher: Matcher | None, token: int) -> bool:
    try:
        if matcher is not None:
            matcher.accept(token)
    except ValueError:
        return False
    return True
