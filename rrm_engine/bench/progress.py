"""What a run shows while it runs: a live bar and the running graphs on a terminal, a line a row elsewhere, nothing
with --quiet.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from rrm_engine.bench.running import RunningRows
from rrm_engine.legible import legible, legible_key
from rrm_engine.runs.rows import Row, row_key

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_PER_SECOND = 4
WIDTH = 60  # of the live lines: a terminal that is made narrower would wrap longer ones, and they could not be erased
ERROR_LENGTH = 160
SPARE_LINES = 8  # of the terminal, for what is not a graph: a live view that fills it cannot be erased
Live = Callable[[], dict[str, Any]]


class Display(Protocol):
    """Told of every event, as it is written to the trace, and of every row; ``start`` and ``stop`` bracket them."""

    def start(self, total: int, rows: list[Row], live: Live) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...
    def row(self, row: Row) -> None: ...
    def stop(self) -> None: ...


def make_display(console: "Console", quiet: bool) -> Display:
    """The display that suits ``console``."""
    if quiet:
        return SilentDisplay()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class SilentDisplay:
    """Shows nothing."""

    def start(self, total: int, rows: list[Row], live: Live) -> None:
        """See Display."""

    def event(self, event: dict[str, Any]) -> None:
        """See Display."""

    def row(self, row: Row) -> None:
        """See Display."""

    def stop(self) -> None:
        """See Display."""


class PlainDisplay:
    """One line a row, for logs."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._total = self._done = 0

    def start(self, total: int, rows: list[Row], live: Live) -> None:
        """See Display."""
        self._total, self._done = total, len(rows)

    def event(self, event: dict[str, Any]) -> None:
        """See Display."""

    def row(self, row: Row) -> None:
        """See Display."""
        self._done += 1
        count = f"[{self._done:>{len(str(self._total))}}/{self._total}]"
        self._console.print(f"{count} {describe_row(row)}", markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """See Display."""


class LiveDisplay:
    """A bar with the time left, under it accuracies and the engine's present state, and the graphs that run."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._tally = Tally()
        self._running = RunningRows()
        self._live: Any = None

    def start(self, total: int, rows: list[Row], live: Live) -> None:
        """See Display."""
        from rich import progress
        from rich.live import Live as RichLive

        for row in rows:
            self._tally.add(row)
        self._bar = progress.Progress(
            *([progress.BarColumn(bar_width=20)] if self._console.width >= WIDTH else []),  # the times need the room
            progress.MofNCompleteColumn(),
            progress.TextColumn("rows"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[eta]}"),
            console=self._console,
        )
        self._eta = Eta(total - len(rows))
        self._bar_id = self._bar.add_task("", total=total, completed=len(rows), eta="")
        self._progress = live
        self._live = RichLive(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
        )
        self._live.start()

    def event(self, event: dict[str, Any]) -> None:
        """See Display."""
        self._running.tell(event)

    def row(self, row: Row) -> None:
        """See Display."""
        self._tally.add(row)
        self._eta.advance()
        self._bar.advance(self._bar_id)

    def stop(self) -> None:
        """See Display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.text import Text

        self._bar.update(self._bar_id, eta=self._eta.text())
        try:
            state = self._progress()
        except (RuntimeError, IndexError):  # the engine changed its books while the refresh thread looked
            state = {}
        lines = [self._tally.text(), live_line(state)]
        texts = (Text(line, overflow="ellipsis", no_wrap=True) for line in lines if line)
        room = max(0, self._console.height - SPARE_LINES)
        return Constrain(Group(self._bar, *texts, *self._running.render(room)), WIDTH)


class Tally:
    """Running accuracy of each mode."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._graded: Counter[str] = Counter()
        self._correct: Counter[str] = Counter()
        self._errors = 0

    def add(self, row: Row) -> None:
        """Count a row."""
        self._rows[row["mode"]] += 1
        self._errors += row["error"] is not None
        if row["correct"] is not None:
            self._graded[row["mode"]] += 1
            self._correct[row["mode"]] += row["correct"]

    def text(self) -> str:
        """``direct 5/6 correct   rrm 4/6 correct   1 error``."""
        parts = [
            f"{mode} {self._correct[mode]}/{self._graded[mode]} correct"
            if self._graded[mode]
            else f"{mode} {self._rows[mode]} done"
            for mode in sorted(self._rows)
        ]
        if self._errors:
            parts.append(f"{self._errors} {'error' if self._errors == 1 else 'errors'}")
        return "   ".join(parts)


class Eta:
    """Time left at the mean pace since the display began."""

    def __init__(self, missing: int) -> None:
        self._began = time.monotonic()
        self._missing = missing
        self._done = 0

    def advance(self) -> None:
        """A row is done."""
        self._done += 1

    def text(self) -> str:
        """``3:20 left``; nothing before the first row."""
        if not self._done:
            return ""
        pace = (time.monotonic() - self._began) / self._done
        seconds = max(0, round(pace * (self._missing - self._done)))
        hours, minutes = divmod(seconds // 60, 60)
        clock = f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        return f"about {clock} left"


def live_line(state: dict[str, Any]) -> str:
    """The engine's present state in one line, of whatever it tells."""
    parts = []
    if state.get("tokens_per_s") is not None:
        parts.append(f"{state['tokens_per_s']:,.0f} tok/s")
    if "running" in state:
        counts = [f"{state['running']} running", f"{state.get('waiting', 0)} waiting"]
        if state.get("queued"):
            counts.append(f"{state['queued']} queued")
        parts.append(", ".join(counts))
    if state.get("blocks_total"):
        parts.append(f"KV blocks {state.get('blocks_used', 0):,}/{state['blocks_total']:,}")
    return "   ".join(parts)


def describe_row(row: Row) -> str:
    """A finished row in one line."""
    verdict = {True: "correct", False: "wrong", None: "not graded"}[row["correct"]]
    verdict += f" ({row['grading_error']})" if row.get("grading_error") else ""
    text = (
        f"{legible_key(row_key(row))}: {row['status']}, {verdict}, {row['latency_s']:.2f} s, "
        f"{row['total_tokens']:,} tokens, critical path {row['critical_path_tokens']:,}"
    )
    return text if row["error"] is None else f"{legible_key(row_key(row))}: error: {first_line(row['error'])}"


def first_line(text: str) -> str:
    """The first line of an error, cut to a readable length; rows.jsonl has all of it."""
    return legible((text.splitlines() or [""])[0], ERROR_LENGTH)
