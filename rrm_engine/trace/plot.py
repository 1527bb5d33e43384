"""A run as a picture: each recursive row's nodes over time, one below the other, and above them the direct solve."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrm_engine.legible import legible_key
from rrm_engine.runs.rows import job_key
from rrm_engine.runs.timeline import NAMES, ROOT, JobTrace, Stretch
from rrm_engine.trace.attribution import attribute, is_attributed
from rrm_engine.trace.command import TraceError

DIRECT = "direct"  # the mode
MOST_ROWS = 6  # of a run in one picture
COLOURS = {"plan": "#4477aa", "solve": "#228833", "continue": "#ccbb44"}  # bright scheme, Paul Tol: told apart by all
QUEUED, WAITING, LINES = "#ee6677", "#dddddd", "#777777"
BAR, INCHES, PREFILL = 0.7, 0.24, 0.45  # height of a bar in its line, height of a line, opacity


def plot(jobs: Sequence[JobTrace], path: Path) -> int:
    """Draw the first recursive rows among ``jobs`` into a PNG, SVG or PDF file; returns how many.

    Raises TraceError without matplotlib, where there is no such row, and if the file cannot be written.
    """
    figure = draw(jobs)
    try:
        with warnings.catch_warnings(action="ignore"):  # of letters that its font lacks
            figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise TraceError(f"--plot {path}: {getattr(error, 'strerror', None) or error}") from None
    return len(figure.axes)


def draw(jobs: Sequence[JobTrace]) -> Any:
    """The matplotlib figure, with axes for each row. Raises TraceError as ``plot`` does."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TraceError("--plot needs one more package: pip install 'rrm-engine[plot]'") from None
    shown = [trace for trace in jobs if is_attributed(trace)][:MOST_ROWS]
    if not shown:
        raise TraceError("--plot draws recursive rows, and there is none with a complete trace")
    by_key = {trace.key: trace for trace in jobs if ROOT in trace.nodes}
    direct = [by_key.get(job_key(trace.row["id"], DIRECT, trace.row["sample"])) for trace in shown]
    lines = [len(trace.nodes) + (other is not None) for trace, other in zip(shown, direct, strict=True)]
    figure = Figure(figsize=(9, sum(lines) * INCHES + 0.7 * len(shown) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), height_ratios=lines, squeeze=False)[:, 0]
    for one, trace, other in zip(axes, shown, direct, strict=True):
        _Row(one, trace, other).draw()
    axes[-1].set_xlabel("seconds", fontsize=8)
    _legend(figure)
    return figure


class _Row:
    """One row of a run on axes of its own."""

    def __init__(self, axes: Any, trace: JobTrace, direct: JobTrace | None) -> None:
        self.axes = axes
        self.trace = trace
        self.direct = direct
        self.began = trace.events[0].t
        self.lines = {path: line for line, path in enumerate(_in_order(trace), start=1 if direct else 0)}

    def draw(self) -> None:
        names = list(self.lines)
        for path, line in self.lines.items():
            self._node(self.trace, path, line, self.began)
            for begin, end in self.trace.waits(path):
                start, stop = (self.trace.events[i].t - self.began for i in (begin, end))
                self._bar(line, start, stop, WAITING, height=0.25)
        self._arrows()
        for hop in attribute(self.trace).hops:
            below = self.lines[hop.node] + BAR / 2 + 0.06
            self.axes.plot([hop.ready_s, hop.until_s], [below, below], color="black", linewidth=1.5)
        title = f"{legible_key(self.trace.key)}: {self.trace.row['latency_s']:.2f} s"
        if self.direct is not None:
            names.insert(0, DIRECT)
            self._node(self.direct, ROOT, 0, self.direct.events[0].t)
            title += f", directly {self.direct.row['latency_s']:.2f} s"
        self.axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        names = list(map(legible_key, names))
        self.axes.set_yticks(range(len(names)), names, fontsize=7, family="monospace", parse_math=False)
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.set_xlim(left=0)
        self.axes.tick_params(labelsize=7, length=2)
        self.axes.spines[["top", "right"]].set_visible(False)

    def _node(self, trace: JobTrace, path: str, line: int, began: float) -> None:
        splits = any(other.startswith(f"{path}.") for other in trace.nodes)
        for stretch in trace.real(path):
            name = NAMES[stretch.phase]
            colour = COLOURS["solve" if name == "plan" and not splits else name]  # it answered where it might split
            self._bar(line, stretch.admitted_t - began, stretch.first_t - began, colour, alpha=PREFILL)
            self._bar(line, stretch.first_t - began, stretch.end_t - began, colour)
            for start, stop in stretch.queued:
                self._bar(line, start - began, stop - began, QUEUED)

    def _bar(self, line: int, start: float, stop: float, colour: str, height: float = BAR, **style: Any) -> None:
        self.axes.barh(line, stop - start, height, start, color=colour, linewidth=0, **style)

    def _arrows(self) -> None:
        """From the event that made a stretch ready: what declared the child, or the last conclusion it waited for."""
        for path, line in self.lines.items():
            for stretch in self.trace.real(path):
                source = self._giver(stretch)
                if source is not None:
                    at = stretch.ready_t - self.began
                    self.axes.annotate(
                        "", (at, line), (at, source), arrowprops={"arrowstyle": "->", "color": LINES, "linewidth": 0.7}
                    )

    def _giver(self, stretch: Stretch) -> int | None:
        """The line of the node whose event or conclusion made a stretch ready."""
        event = self.trace.events[self.trace.cause(stretch.begin)]
        line = self.lines.get(event.node)
        return None if line == self.lines[stretch.node] else line


def _in_order(trace: JobTrace) -> list[str]:
    """Its nodes, each above what it started, siblings as they began."""
    begins = {path: stretches[0].ready_t for path, stretches in trace.nodes.items()}

    def place(path: str) -> list[float]:
        parts = path.split(".")
        return [begins.get(".".join(parts[: i + 1]), 0.0) for i in range(len(parts))]

    return sorted(trace.nodes, key=place)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown: list[Any] = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    shown += [
        Patch(color=COLOURS["solve"], alpha=PREFILL, linewidth=0, label="prefill"),
        Patch(color=QUEUED, label="queued"),
        Patch(color=WAITING, label="paused"),
        Line2D([], [], color="black", linewidth=1.5, label="critical path"),
    ]
    figure.legend(handles=shown, loc="outside upper left", ncols=len(shown), fontsize=7, frameon=False)
