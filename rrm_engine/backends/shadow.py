"""How far what a node writes after attached KV is from what the same model would write after the text."""

from collections import deque
from dataclasses import dataclass, field

import torch

from rrm_engine.engine.engine import Sampled
from rrm_engine.engine.replicas import Driven
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.runs.events import SpliceReport

AFTER_ALL = 1 << 62  # as a root: every other one goes before


@dataclass(slots=True, eq=False)
class _Shadow:
    """``sequence`` has the tokens of ``joined``, all of them computed. Logits that are not compared yet lie in
    ``text`` and ``spliced``, differences that were in ``kl`` and ``same``, 0-dimensional and on the device.
    """

    node: str
    joined: Sequence
    sequence: Sequence
    wanted: int  # tokens to compare
    written: list[int] = field(default_factory=list)  # by ``joined`` since the resume
    spliced: deque[torch.Tensor] = field(default_factory=deque)
    text: deque[torch.Tensor] = field(default_factory=deque)
    kl: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Shadows:
    """The resumes of one job that are measured over ``tokens`` tokens each; none if that is 0.

    A shadow shares its node's exact blocks, full ones only, so that nothing is copied for it; the rest is computed from
    the tokens. Then it is led along what the node writes: it samples one token, which is replaced by the node's.
    It goes after all others, takes none of their blocks and uses no prefix cache; it ends when its node pauses.
    So it costs time, one row of the node's steps, and otherwise nothing but free blocks.
    """

    engine: Driven
    tokens: int
    reports: list[SpliceReport] = field(default_factory=list)
    _live: list[_Shadow] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)

    @property
    def blocks(self) -> int:
        """Blocks that only a shadow holds."""
        tables = (shadow.sequence.table for shadow in self._live)
        return sum(len(table.blocks) - table.first_own for table in tables)

    def follow(self, node: str, joined: Sequence) -> None:
        """``joined`` was resumed just now, and spans will be attached to it."""
        if not self.tokens:
            return
        table, size = joined.table, joined.table.pool.block_size
        exact = table.length if table.approximate_from is None else min(table.length, table.approximate_from)
        key = f"{joined.key}~{len(self._keys)}"
        fork = (joined, exact // size * size)
        sequence = self.engine.submit(key, list(joined.tokens), 1, SamplingParams(), root=AFTER_ALL, fork_of=fork)
        sequence.probe.best_effort = sequence.probe.keep_logits = joined.probe.keep_logits = True
        self._keys.add(key)
        self._live.append(_Shadow(node, joined, sequence, self.tokens))

    def on_token(self, sampled: Sampled) -> bool:
        """A sequence of the job has a token. True if it is a shadow's, with which the job has nothing to do."""
        sequence = sampled.sequence
        for shadow in [s for s in self._live if sequence in (s.joined, s.sequence)]:
            if sequence is shadow.joined:
                shadow.written.append(sampled.token)
                if sampled.stop is not None:
                    shadow.wanted = min(shadow.wanted, len(shadow.written))
            self._compare(shadow)
            self._lead(shadow)
        return sequence.key in self._keys

    def end(self, node: str) -> None:
        """``node`` pauses or is over: what was not measured by now is not measured."""
        for shadow in [s for s in self._live if s.node == node]:
            self._compare(shadow)
            self._finish(shadow)

    def _compare(self, shadow: _Shadow) -> None:
        """Take the logits that are there, and compare those that both have."""
        for sequence, found in ((shadow.joined, shadow.spliced), (shadow.sequence, shadow.text)):
            if sequence.probe.logits is not None:
                found.append(sequence.probe.logits.log_softmax(-1))
                sequence.probe.logits = None
        while shadow.text and shadow.spliced and len(shadow.kl) < shadow.wanted:
            text, spliced = shadow.text.popleft(), shadow.spliced.popleft()
            shadow.kl.append((text.exp() * (text - spliced)).sum().clamp_min(0.0))
            shadow.same.append(text.argmax() == spliced.argmax())

    def _lead(self, shadow: _Shadow) -> None:
        """Ask both for their next logits, the shadow once it is known what the node wrote there."""
        done, sequence = len(shadow.kl), shadow.sequence
        if done == shadow.wanted:
            self._finish(shadow)
            return
        shadow.joined.probe.keep_logits = done + len(shadow.spliced) < shadow.wanted
        ahead = done + len(shadow.text)
        if sequence.state is State.PAUSED and ahead <= len(shadow.written) and ahead < shadow.wanted:
            sequence.tokens[-1] = shadow.written[ahead - 1]  # not run yet, so nothing depends on it
            sequence.probe.keep_logits = True
            self.engine.of(sequence).resume(sequence, [], 1)

    def _finish(self, shadow: _Shadow) -> None:
        self.engine.of(shadow.sequence).finish(shadow.sequence)
        shadow.joined.probe.keep_logits = False
        self._live.remove(shadow)
        if shadow.kl:
            kl, same = torch.stack(shadow.kl), torch.stack(shadow.same).tolist()
            first = same.index(False) if False in same else None
            mean, most = float(kl.mean()), float(kl.max())
            self.reports.append(SpliceReport(shadow.node, len(same), mean, most, sum(same) / len(same), first))
