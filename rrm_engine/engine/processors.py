"""Logits processors on the rows of a step. The tokens that they read are kept on the device."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch

from rrm_engine.device.transfer import integers, to_device
from rrm_engine.engine.packing import Drawn
from rrm_engine.engine.rules import Rules, make_rules, process
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence

Scores = torch.Tensor  # fp32 [rows, vocabulary]


@dataclass(slots=True)
class Transcripts:
    """Sequences' tokens on one device, int64 ``[rows, capacity]``, one row per sequence. What a step adds to all of
    them is uploaded in one transfer. What a row holds after its sequence's tokens is undefined.
    """

    _tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    _rows: dict[Sequence, int] = field(default_factory=dict)
    _known: dict[Sequence, int] = field(default_factory=dict)  # how many tokens are in its row

    def extend(
        self,
        sequences: Seq[Sequence],
        lengths: Seq[int],
        unread: Drawn | None,
        drafted: Seq[int | None],
        device: torch.device,
    ) -> None:
        """Make rows hold the first ``lengths[i]`` tokens of ``sequences[i]``. The last of them may be ``unread`` by the
        host, or the guess ``drafted[i]``, which does not count as a known token of the sequence.
        """
        self._make_room(sequences, max(lengths), device)
        rows: list[int] = []
        columns: list[int] = []
        values: list[int] = []
        drawn: list[int] = []
        for sequence, length, guess in zip(sequences, lengths, drafted, strict=True):
            if guess is not None:
                rows, columns = [*rows, self._rows[sequence]], [*columns, length - 1]
                values, drawn = [*values, guess], [*drawn, -1]
                continue
            new = sequence.tokens[self._known[sequence] : length]
            sampled = -1
            if len(sequence.tokens) < length and self._known[sequence] < length:
                assert unread is not None
                new.append(sequence.probe.forced[0] if sequence.probe.forced else 0)
                sampled = -1 if sequence.probe.forced else unread.rows[sequence]
            rows += [self._rows[sequence]] * len(new)
            columns += range(self._known[sequence], length)
            values += new
            drawn += [-1] * (len(new) - 1) + [sampled] if new else []
            self._known[sequence] = length
        where = to_device(torch.tensor([rows, columns, values, drawn], dtype=torch.int64), device)
        tokens = where[2]
        if unread is not None:
            unread.fill(tokens, where[3])
        self._tokens.index_put_((where[0], where[1]), tokens)

    def of(self, sequence: Sequence, length: int) -> torch.Tensor:
        """The first ``length`` tokens of a sequence, ``[1, length]``."""
        row = self._rows[sequence]
        return self._tokens[row : row + 1, :length]

    def of_all(self, sequences: Seq[Sequence], lengths: Seq[int]) -> torch.Tensor:
        """The first ``lengths[i]`` tokens of each, ``[rows, longest]``, shorter rows padded with their first token."""
        rows = integers([self._rows[sequence] for sequence in sequences], self._tokens.device)
        tokens = self._tokens[:, : max(lengths)].index_select(0, rows)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(columns < integers(lengths, tokens.device)[:, None], tokens, tokens[:, :1])

    def forget(self, sequence: Sequence) -> None:
        self._rows.pop(sequence, None)
        self._known.pop(sequence, None)

    def _make_room(self, sequences: Seq[Sequence], longest: int, device: torch.device) -> None:
        """See that each sequence has a row, and that rows hold ``longest`` tokens."""
        fresh = [sequence for sequence in dict.fromkeys(sequences) if sequence not in self._rows]
        height, width = self._tokens.shape
        needed = len(self._rows) + len(fresh)
        if needed > height or longest > width:
            higher, wider = max(height, _power_of_two(needed, 8)), max(width, _power_of_two(longest, 256))
            grown = torch.zeros(higher, wider, dtype=torch.int64, device=device)
            grown[:height, :width] = self._tokens
            self._tokens = grown
        if fresh:
            free = sorted(set(range(len(self._tokens))) - set(self._rows.values()))[: len(fresh)]
            self._rows |= dict(zip(fresh, free, strict=True))
            self._known |= dict.fromkeys(fresh, 0)


@dataclass(slots=True)
class Processors:
    """The logits processors of an engine's sequences."""

    eos_ids: frozenset[int]
    transcripts: Transcripts = field(default_factory=Transcripts)
    _shared: dict[SamplingParams, Rules | None] = field(default_factory=dict)  # None: every phase needs its own
    _own: dict[Sequence, Rules] = field(default_factory=dict)  # those of its present phase

    def of(
        self,
        rows: Seq[int],
        sequences: Seq[Sequence],
        positions: Seq[int],
        unread: Drawn | None = None,
        drafted: Seq[int | None] | None = None,
    ) -> "Processed":
        """The processing of ``rows`` of a step; a row gives the token at ``positions[row]`` of ``sequences[row]``.

        The token right before that may be in flight, then it is in ``unread``, or be the guess ``drafted[row]``.
        """
        return Processed(self, list(rows), sequences, positions, unread, drafted or [None] * len(sequences))

    def forget(self, sequence: Sequence) -> None:
        """A sequence has paused or ended, and with that its phase."""
        self.transcripts.forget(sequence)
        self._own.pop(sequence, None)

    def rules(self, sequence: Sequence, scores: Scores) -> Rules:
        """The processors of a sequence's phase, for scores of this shape and device."""
        params, device, vocabulary = sequence.sampling, scores.device, scores.shape[-1]
        if params not in self._shared:
            rules = make_rules(
                params.settings(),
                eos_ids=self.eos_ids,
                prompt=torch.zeros(1, 1, dtype=torch.int64, device=device),
                longest=2,
                vocabulary=vocabulary,
            )
            self._shared[params] = rules if rules.together else None
        if (shared := self._shared[params]) is not None:
            return shared
        if sequence not in self._own:
            self._own[sequence] = make_rules(
                params.settings(),
                eos_ids=self.eos_ids,
                prompt=self.transcripts.of(sequence, sequence.first).clone(),
                longest=min(sequence.first + sequence.budget, sequence.longest),
                vocabulary=vocabulary,
            )
        return self._own[sequence]


@dataclass(slots=True)
class Processed:
    """The rows of one step that have processors."""

    processors: Processors
    rows: list[int]
    sequences: Seq[Sequence]
    positions: Seq[int]
    unread: Drawn | None
    drafted: Seq[int | None]
    _rules: dict[int, Rules] = field(default_factory=dict)  # by row

    def before_grammars(self, logits: torch.Tensor) -> Scores:
        """The scores of ``rows`` after the processors that come before a grammar; ``logits`` are those of all rows."""
        sequences, lengths = [self.sequences[row] for row in self.rows], [self.positions[row] for row in self.rows]
        drafted = [self.drafted[row] for row in self.rows]
        self.processors.transcripts.extend(sequences, lengths, self.unread, drafted, logits.device)
        scores = logits.index_select(0, integers(self.rows, logits.device)).float()
        self._rules = {
            row: self.processors.rules(sequence, scores) for row, sequence in zip(self.rows, sequences, strict=True)
        }
        return self._through({row: self._rules[row].before for row in self.rows}, scores)

    def warped(self, scores: torch.Tensor, rows: Seq[int]) -> Scores | None:
        """The scores of ``rows``, all of the same settings, after the processors that come after a grammar. None if
        these are only what the sampler does itself.
        """
        if not any(row in self._rules and not self._rules[row].only_filters for row in rows):
            return None
        return self._through(
            {row: self._rules[row].after if row in self._rules else () for row in rows}, scores.float()
        )

    def uncertain(self) -> list[int]:
        """Indices in ``rows`` of those that may be left without any token, or have a grammar."""
        return [i for i, row in enumerate(self.rows) if self._rules[row].forbids or self.sequences[row].matcher]

    def _through(self, processors: dict[int, Seq[Any]], scores: Scores) -> Scores:
        """Apply each row's processors, to several rows at once where possible. Writes into ``scores``."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(processors):
            if processors[row]:
                alone = 0 if self._rules[row].together else index + 1
                groups.setdefault((id(processors[row]), alone), []).append(index)
        rows = list(processors)
        for indices in groups.values():
            some = [rows[index] for index in indices]
            chain, tokens = processors[some[0]], self._tokens(some)
            if len(indices) == len(rows):
                return process(chain, tokens, scores)
            where = integers(indices, scores.device)
            scores.index_copy_(0, where, process(chain, tokens, scores.index_select(0, where)))
        return scores

    def _tokens(self, rows: Seq[int]) -> torch.Tensor:
        """The tokens that the processors of ``rows`` are called with."""
        transcripts = self.processors.transcripts
        if len(rows) == 1:
            return transcripts.of(self.sequences[rows[0]], self.positions[rows[0]])
        return transcripts.of_all([self.sequences[row] for row in rows], [self.positions[row] for row in rows])


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())
