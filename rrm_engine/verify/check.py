"""One node checked: every token it wrote drawn again from plain logits, and both paths' logits compared.

What is promised depends on the run's dtype. In fp32 a token is the one that plain transformers gives, except at a
near tie: the order of summation alone moves a logit by up to 2.5e-5 of the logits' spread (their standard deviation
over the vocabulary; measured on models of 2 to 30 layers), so that with a factor of four for deeper models two
candidates within 2e-4 of the spread may change places. In bf16 and fp16 log-probabilities are close: measured in
bf16, single logits differ by up to 0.25 of the spread and log-probabilities of written tokens by 0.05 on average.
After KV that was attached instead of computed nothing is promised: those tokens are counted by themselves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import eq
from typing import Any

import torch

from rrm_engine.engine.sampler import noise_key
from rrm_engine.engine.sequence import Matcher
from rrm_engine.loading.check import LARGEST
from rrm_engine.verify.recording import NodeRecord, Segment
from rrm_engine.verify.redraw import Draw, Settings, apply_grammar, draw_all, reconciled

ROWS = 64  # compared at once: memory goes with it times the vocabulary
EXACT_ERROR = 1e-4  # of the spread, for a logit in fp32; twice that between two of them
MEAN_LOGPROB = {torch.bfloat16: 0.1, torch.float16: 0.025}  # nats, over the tokens that a node wrote
BROKEN, NEAR, EXACT, CLOSE, REPORTED = "broken", "near tie", "exact", "close", "reported"
SPLICED = "spliced"

MatcherOf = Callable[[Segment], Matcher | None]
SettingsOf = Callable[[NodeRecord, Segment], Settings]
Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A recorded token that plain transformers would not have given.

    ``gap`` is how far it lies below the one given, in logits (infinite if the grammar rules it out): of a sampled
    token, what two logits must differ for the same noise to give it. Up to ``near`` it is a near tie.
    """

    position: int
    phase: str
    token: int
    plain_token: int
    text: str
    plain_text: str
    gap: float
    near: float


@dataclass(slots=True)
class NodeCheck:
    """What came out for one node against plain transformers in ``reference``, the dtype.

    ``verdict``: exact, near tie or broken in fp32; close or broken in bf16 and fp16; spliced for a node that is none
    of these up to the KV attached to it, after which ``spliced`` of its tokens were written; reported where the
    reference is not in the run's own dtype, for which nothing is promised. ``splice_kl`` is what the run measured, in
    nats: for every resume the mean over the first tokens after it, from the text to what was attached. ``agree``
    counts the tokens that are drawn again equal, greedily or with the recorded noise, ``greedy_agree`` those that are
    plain transformers' likeliest. Differences are those of the engine's paged path to plain transformers on the
    positions written: the largest of a logit, absolute and as a share of the logits' spread, the largest KL divergence
    in nats, and the largest and mean difference of the written tokens' log-probabilities.
    """

    job: str
    node: str
    reference: str
    promised: bool
    tokens: int
    written: int
    drawn: int = 0  # of the tokens judged: those sampled at a temperature, not greedily
    agree: int = 0
    greedy_agree: int = 0
    near_ties: int = 0
    beyond: int = 0  # differ by more than a near tie
    spliced: int = 0  # of the tokens written: those after attached KV
    spliced_agree: int = 0  # of these, drawn again equal
    splice_kl: tuple[float, ...] = ()
    logit_difference: float = 0.0
    logit_difference_share: float = 0.0
    kl: float = 0.0
    logprob_difference: float = 0.0
    logprob_difference_mean: float = 0.0
    divergence: Divergence | None = None  # the first one beyond a near tie, or else the first
    reasons: list[str] = field(default_factory=list)  # why it is broken
    verdict: str = REPORTED

    @property
    def key(self) -> str:
        """The node's name in the run."""
        return f"{self.job}:{self.node}"

    @property
    def agreement(self) -> float:
        """Share of the written tokens that are drawn again equal."""
        return self.agree / self.written

    @property
    def greedy_agreement(self) -> float:
        """Share of the written tokens that are plain transformers' likeliest; says something of greedy runs only."""
        return self.greedy_agree / self.written


@torch.inference_mode()
def check_node(
    record: NodeRecord,
    plain: torch.Tensor,
    paged: torch.Tensor,
    *,
    seed: int,
    dtype: torch.dtype,
    reference: torch.dtype,
    matcher_of: MatcherOf,
    settings_of: SettingsOf,
    decode: Decode,
) -> NodeCheck:
    """Compare the logits of both paths, ``[positions, vocabulary]``, with each other and with the tokens recorded.

    ``dtype`` is that of the run and of ``paged``, ``reference`` that of ``plain``; ``matcher_of`` makes the grammar's
    state at the beginning of a segment and ``settings_of`` its logits processors, ``decode`` the text of a token.
    """
    name = str(reference).removeprefix("torch.")
    written = len(record.positions)
    check = NodeCheck(record.job, record.node, name, dtype == reference, len(record.tokens), written)
    exact = dtype in (torch.float32, torch.float64)
    check.splice_kl = record.splice_kl
    key, error, row = noise_key(seed, record.key), EXACT_ERROR if exact else LARGEST[dtype], 0
    for segment in record.segments:
        matcher, settings = matcher_of(segment), settings_of(record, segment)
        after_splice = record.approximate_from is not None and segment.start > record.approximate_from
        for start in range(segment.start, segment.stop, ROWS):
            part = range(start, min(start + ROWS, segment.stop))
            tokens = [record.tokens[i] for i in part]
            rows = slice(row, row + len(part))
            logits = plain[rows].float()
            _compare(check, logits, paged[rows].float(), tokens)
            errors = (error * settings.gain * logits.std(-1)).tolist()
            scores = settings.before_grammar(logits, part)
            if matcher is not None and not apply_grammar(logits, tokens, matcher):
                matcher = None
            scores = reconciled(scores, logits)
            draws = [Draw(*place, settings, key) for place in zip(scores, part, strict=True)]
            if after_splice:
                _count_spliced(check, draws, tokens)
            else:
                _draw_again(check, segment, draws, tokens, errors, decode)
            check.greedy_agree += sum(map(eq, tokens, logits.argmax(-1).tolist()))
            row += len(part)
    check.logprob_difference_mean /= written
    if check.promised:
        _judge(check, exact, LARGEST[dtype], MEAN_LOGPROB.get(dtype))
    return check


def _compare(check: NodeCheck, plain: torch.Tensor, paged: torch.Tensor, tokens: list[int]) -> None:
    """Add a block of positions to the differences between the two paths."""
    difference = (paged - plain).abs().amax(-1)
    check.logit_difference = _largest(check.logit_difference, difference)
    check.logit_difference_share = _largest(check.logit_difference_share, difference / plain.std(-1))
    log_plain, log_paged = plain.double().log_softmax(-1), paged.double().log_softmax(-1)
    check.kl = _largest(check.kl, (log_plain.exp() * (log_plain - log_paged)).sum(-1))
    own = torch.tensor(tokens, device=plain.device)[:, None]
    changed = (log_plain - log_paged).gather(-1, own).abs()
    check.logprob_difference = _largest(check.logprob_difference, changed)
    check.logprob_difference_mean += float(changed.sum())


def _largest(known: float, values: torch.Tensor) -> float:
    """NaN counts as infinite."""
    return max(known, float(values.nan_to_num(math.inf).max()))


def _draw_again(
    check: NodeCheck, segment: Segment, draws: list[Draw], tokens: list[int], errors: list[float], decode: Decode
) -> None:
    """Count the ``tokens`` recorded that come out of ``draws``; each logit of a draw may be off by its error."""
    check.drawn += len(draws) if segment.sampling.temperature > 0 else 0
    for draw, token, plain, error in zip(draws, tokens, draw_all(draws), errors, strict=True):
        if token == plain:
            check.agree += 1
            continue
        near = draw.explains(token, error)
        check.near_ties += near
        check.beyond += not near
        if check.divergence is None or (check.beyond == 1 and not near):
            place = (draw.position, segment.phase, token, plain, decode(token), decode(plain))
            check.divergence = Divergence(*place, draw.gap(token), 2 * error)


def _count_spliced(check: NodeCheck, draws: list[Draw], tokens: list[int]) -> None:
    """Count tokens that nothing is promised of."""
    equal = sum(map(eq, tokens, draw_all(draws)))
    check.agree += equal
    check.spliced += len(tokens)
    check.spliced_agree += equal


def _judge(check: NodeCheck, exact: bool, logit_bound: float, logprob_bound: float | None) -> None:
    """The verdict where something is promised."""
    if check.beyond:
        promised = check.written - check.spliced
        check.reasons.append(f"{check.beyond:,} of {promised:,} tokens are not those of plain transformers")
    if not check.logit_difference_share <= logit_bound:
        share = f"{check.logit_difference_share:.2g}"
        check.reasons.append(f"logits differ by {share} of their spread (allowed: {logit_bound:g})")
    if logprob_bound is not None and not check.logprob_difference_mean <= logprob_bound:
        mean = f"{check.logprob_difference_mean:.2g}"
        check.reasons.append(f"log-probabilities differ by {mean} on average (allowed: {logprob_bound:g})")
    if check.reasons:
        check.verdict = BROKEN
    elif check.spliced:
        check.verdict = SPLICED
    else:
        check.verdict = (NEAR if check.near_ties else EXACT) if exact else CLOSE


def as_json(check: NodeCheck) -> dict[str, Any]:
    """Every field, with the shares spelled out; what is infinite becomes null."""
    values = {name: getattr(check, name) for name in NodeCheck.__slots__}
    values["agreement"], values["greedy_agreement"] = check.agreement, check.greedy_agreement
    if check.divergence is not None:
        values["divergence"] = {name: _finite(getattr(check.divergence, name)) for name in Divergence.__slots__}
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
