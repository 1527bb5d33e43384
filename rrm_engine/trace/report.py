"""The attribution of a run as a table."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rrm_engine.legible import legible
from rrm_engine.trace.attribution import PARTS, Attribution, medians

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_ROWS = 40
WIDE = 100
LEAST_NAME, MOST_NAME = 12, 44


def print_attribution(console: "Console", found: Sequence[Attribution]) -> None:
    """Rows, medians, and what the columns mean."""
    if not found:
        console.print("No recursive row has run to its end with a complete trace: nothing to attribute.")
        return
    console.print(attribution_table(found, console.width))
    for line in sentences(found):
        console.print(line, markup=False, highlight=False)


def attribution_table(found: Sequence[Attribution], width: int) -> "Table":
    """Seconds of every part, a line a row, then the medians of seconds and of shares.

    Of ``width`` columns the numbers take what they need, names of rows what is left.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = width >= WIDE
    header = ["latency", *PARTS, *(["path tokens", "longest"] if wide else [])]
    shown = found[:SHOWN_ROWS]
    rows = []
    for a in shown:
        tokens = [f"{a.path_tokens:,}", f"{a.critical_path_tokens:,}"] if wide else []
        rows.append([*_seconds([a.latency_s, *a.parts.values()]), *tokens])
    middle: dict[str, Any] = medians(found)
    shares = ["", *(f"{100 * share:.1f} %" for share in middle["shares"].values())]
    ends = {"median": _seconds([middle["latency_s"], *middle["parts"].values()]), "median share": shares}
    needed = [max(map(len, cells)) for cells in zip_longest(header, *rows, *ends.values(), fillvalue="")]
    left = max(LEAST_NAME, min(MOST_NAME, width - sum(needed) - 2 * len(needed) - 3))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_footer=False)
    table.add_column("row", overflow="ellipsis", no_wrap=True, max_width=left)
    for name, least in zip(header, needed, strict=True):
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    for a, cells in zip(shown, rows, strict=True):
        table.add_row(Text(legible(a.key.removesuffix("/rrm/0"), left)), *cells)
    if len(found) > len(shown):
        table.add_row(f"... and {len(found) - len(shown):,} more")
    table.add_section()
    for name, cells in ends.items():
        table.add_row(name, *cells)
    return table


def sentences(found: Sequence[Attribution]) -> list[str]:
    """What the columns mean, and what limits them."""
    lines = [
        "Seconds along the critical path: decoding in the root, in descendants, and in descendants waited for "
        "alone; prefill; ready but queued; gaps between."
    ]
    if preempted := sum(a.preemptions > 0 for a in found):
        lines.append(f"In {preempted:,} of {len(found):,} rows sequences lost their KV to others; see queued.")
    return lines


def _seconds(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" if value >= 0.995 else f"{value:.3f}" for value in values]
