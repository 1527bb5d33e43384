"""What a verification shows: a table of the nodes, where they diverge, and a summary in plain words."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rrm_engine.legible import legible, legible_key, plural
from rrm_engine.verify.check import BROKEN, CLOSE, EXACT, NEAR, REPORTED, SPLICED, NodeCheck
from rrm_engine.verify.recording import Recording

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = 40  # rows of the table; the worst where there are more
DETAILS = 10  # divergences spelled out
WORST = (BROKEN, SPLICED, NEAR, CLOSE, REPORTED, EXACT)
COLOURS = {BROKEN: "bold red", SPLICED: "yellow", NEAR: "yellow", EXACT: "green", CLOSE: "green", REPORTED: "dim"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def print_report(console: "Console", recording: Recording, checks: Sequence[NodeCheck]) -> None:
    """The table, the first divergences, the summary."""
    worst = sorted(checks, key=lambda check: WORST.index(check.verdict))
    place = {record.key: number for number, record in enumerate(recording.nodes)}
    shown = sorted(worst[:SHOWN], key=lambda check: place[check.key])
    console.print(table(shown, wide=console.width >= 100))
    if len(checks) > len(shown):
        console.print(f"{len(checks) - len(shown):,} more are in --json.", highlight=False)
    for check in [check for check in worst if check.divergence or check.reasons][:DETAILS]:
        console.print(detail(check), style=COLOURS[check.verdict], markup=False, highlight=False)
    for line in summary(recording, checks):
        console.print(line, markup=False, highlight=False)


def table(checks: Sequence[NodeCheck], wide: bool) -> "Table":
    """A line per node and dtype, under its job's; the less important columns only where there is room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    found.add_column("node", overflow="fold")
    found.add_column("plain in", no_wrap=True)
    numbers = ["likeliest", "Δ logit", "of spread", "Δ log p"] if wide else ["Δ logit"]
    for name in ["tokens", "equal", *numbers, "KL"]:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("verdict", no_wrap=True)
    job = None
    for check in checks:
        if check.job != job:
            job = check.job
            found.add_row(Text(legible_key(job)), style="bold")
        found.add_row(*_cells(check, wide))
    found.caption = (
        f"tokens: written by the model; equal: drawn again from plain logits{'; likeliest: their argmax' * wide}\n"
        "Δ, KL: largest difference of the engine's paged path to plain transformers"
    )
    found.caption_justify = "left"
    return found


def _cells(check: NodeCheck, wide: bool) -> list[str]:
    from rich.markup import escape

    cells = [f"  {escape(legible(check.node))}", SHORT.get(check.reference, check.reference), f"{check.written:,}"]
    cells.append(_share(check.agree, check.written))
    if wide:
        cells.append(_share(check.greedy_agree, check.written))
    cells.append(_small(check.logit_difference))
    if wide:
        cells += [_small(check.logit_difference_share), _small(check.logprob_difference)]
    return [*cells, _small(check.kl), f"[{COLOURS[check.verdict]}]{check.verdict}[/]"]


def detail(check: NodeCheck) -> str:
    """Where a node diverges and by how much."""
    verdict = ", ".join([check.verdict, *check.reasons])
    line = f"{legible(check.key)} ({SHORT.get(check.reference, check.reference)}): {verdict}"
    if (at := check.divergence) is None:
        return f"{line}."
    near = f"near tie: up to {at.near:.2g}"
    how_far = f"{at.gap:.3g} logits lower ({near})" if math.isfinite(at.gap) else "ruled out by the grammar"
    return (
        f"{line}; position {at.position} ({at.phase}): recorded {at.token} {at.text!r}, plain transformers gives "
        f"{at.plain_token} {at.plain_text!r}, the recorded one is {how_far}."
    )


def summary(recording: Recording, checks: Sequence[NodeCheck]) -> list[str]:
    """What it comes down to."""
    promised = [check for check in checks if check.promised]
    lines = [_promise(recording, promised)] if promised else ["Nothing was promised of these dtypes, only reported."]
    others: dict[str, list[NodeCheck]] = {}
    for check in checks:
        if not check.promised:
            others.setdefault(check.reference, []).append(check)
    for reference, some in others.items():
        written = sum(check.written for check in some)
        lines.append(
            f"For comparison, plain transformers in {reference}: {_share(sum(c.agree for c in some), written)} of "
            f"{written:,} tokens equal, log-probabilities off by {_mean_logprob(some):.2g} on average."
        )
    if any(check.spliced for check in promised):
        lines.append(_after_splices(promised))
    if recording.unfinished:
        lines.append(f"Left out: {plural(recording.unfinished, 'job')} that did not finish.")
    return lines


def _promise(recording: Recording, checks: Sequence[NodeCheck]) -> str:
    """Whether the promise of the run's own dtype was kept."""
    verdicts = Counter(check.verdict for check in checks)
    written = sum(check.written - check.spliced for check in checks)
    agree = sum(check.agree - check.spliced_agree for check in checks)
    nodes = plural(len(checks), "node")
    if verdicts[BROKEN]:
        broken = next(check for check in checks if check.verdict == BROKEN)
        return (
            f"Broken: {verdicts[BROKEN]:,} of {nodes} recorded in {recording.dtype} are not what plain transformers "
            f"gives; the first is {legible(broken.key)}.{_hint(checks)}"
        )
    if recording.dtype not in ("float32", "float64"):
        return (
            f"Kept: all {nodes} recorded in {recording.dtype} are close to plain transformers: "
            f"{_share(agree, written)} of {written:,} tokens equal, log-probabilities off by "
            f"{_mean_logprob(checks):.2g} on average."
        )
    ties = sum(check.near_ties for check in checks)
    how = "is the one" if not ties else f"but {plural(ties, 'near tie')} is the one"
    drawn = sum(check.drawn for check in checks)
    noise = "" if not drawn else f", {drawn:,} of them sampled with the recorded noise"
    return f"Kept: every one of {written:,} tokens in {nodes} {how} that plain transformers gives{noise}."


def _after_splices(checks: Sequence[NodeCheck]) -> str:
    """What nothing was promised of."""
    some = [check for check in checks if check.spliced]
    written, agree = sum(check.spliced for check in some), sum(check.spliced_agree for check in some)
    measured = [kl for check in some for kl in check.splice_kl]
    kl = f"; mean KL divergence after a resume: {min(measured):.2g} to {max(measured):.2g} nats" if measured else ""
    return (
        f"Not promised: in {plural(len(some), 'node')} KV was attached instead of computed; {_share(agree, written)} "
        f"of the {written:,} tokens after it are those that plain transformers gives after the text{kl}."
    )


def _hint(checks: Sequence[NodeCheck]) -> str:
    """Where to look if engine and plain transformers agree with each other and both differ from the trace."""
    if any(len(check.reasons) > bool(check.beyond) for check in checks):
        return ""
    return (
        " The engine's logits now are those of plain transformers, so the model or the trace was changed, or the "
        "engine went wrong then."
    )


def _mean_logprob(checks: Sequence[NodeCheck]) -> float:
    return sum(c.logprob_difference_mean * c.written for c in checks) / sum(c.written for c in checks)


def _share(part: int, whole: int) -> str:
    """``100 %`` only if it is all."""
    return "100 %" if part == whole else f"{min(100 * part / whole, 99.9):.1f} %"


def _small(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "inf"
