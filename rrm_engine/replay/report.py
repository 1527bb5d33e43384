"""A result as a table: for the terminal with rich, for a README in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rrm_engine.legible import legible

if TYPE_CHECKING:
    from rich.table import Table

HEADER = (
    *("policy", "answer", "ratio", "resume", "resume x", "slowest", "prefilled", "reused", "attached"),
    *("copied", "swapped", "taken", "peak"),
)
ONLY_WIDE = ("resume x", "slowest", "attached", "copied", "taken")
CAPTION = (
    "answer: time to answer, mean over the graphs of the median over the rounds; ratio: to the first line's, geometric "
    "mean; resume: from the last conclusion to the next token, median, its ratio, and slowest of a graph; prefilled, "
    "reused, attached (~: an approximation): tokens; copied (on write), swapped (out + in), peak (device + host): "
    "blocks; taken: times memory ran out and a node's blocks or place were taken"
)


def cells(entry: dict[str, Any]) -> list[str]:
    """One line of the table from an entry of ``summarise``."""
    return [
        title(entry),
        duration(entry["answer_s"]),
        ratio(entry["ratio"]),
        duration(entry["resume_s"]),
        ratio(entry["resume_ratio"]),
        duration(entry["resume_worst_s"]),
        number(entry["prefilled"]),
        number(entry["reused"]),
        number(entry["attached"]),
        number(entry["copied_blocks"]),
        pair(entry["offloaded_blocks"], entry["restored_blocks"]),
        number(entry["preemptions"]),
        pair(entry["peak_blocks"], entry["peak_host_blocks"]),
    ]


def title(entry: dict[str, Any]) -> str:
    """Its name, an approximation marked."""
    return f"{entry['name']} ~" if entry["approximate"] else str(entry["name"])


def rich_table(summary: Sequence[dict[str, Any]], title: str, wide: bool) -> "Table":
    """The table for a terminal; the less important columns only where there is room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(legible(title)), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True
    )
    table.title_justify = table.caption_justify = "left"
    shown = [i for i, name in enumerate(HEADER) if wide or name not in ONLY_WIDE]
    for i in shown:
        table.add_column(HEADER[i], justify="right" if i else "left", no_wrap=True)
    for entry in summary:
        line = cells(entry)
        table.add_row(*(line[i] for i in shown))
    table.caption = CAPTION
    return table


def markdown_table(summary: Sequence[dict[str, Any]]) -> str:
    """The table for a README."""
    lines = [[*HEADER], ["---", *["---:"] * (len(HEADER) - 1)], *map(cells, summary)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def duration(seconds: float | None) -> str:
    """``4.3 ms``, ``870 ms``, ``12.3 s``."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.{1 if seconds < 0.1 else 0}f} ms"
    return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"


def ratio(value: float | None) -> str:
    """``1.08x``."""
    return "-" if value is None else f"{value:.2f}x"


def number(value: int | None) -> str:
    """``12,345``."""
    return "-" if value is None else f"{value:,}"


def pair(first: int | None, second: int | None) -> str:
    """``120 + 30``; ``120`` where the second is zero."""
    return number(first) if not second else f"{number(first)} + {number(second)}"
