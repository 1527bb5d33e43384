"""The analysis as a picture: what each pair took, what each arm was worth, and the batch over time."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.runs.trust import DIRECT, RECURSIVE, Label

Figures = dict[str, Any]
# Bright scheme, Paul Tol: told apart by all.
HEADLINE, WRONG, OTHER = "#228833", "#ee6677", "#ccbb44"
COLOURS = {DIRECT: "#aa3377", RECURSIVE: "#4477aa"}
NAMES = {DIRECT: "direct", RECURSIVE: "recursive"}
MOST_PROCESSES = 4  # whose batch is drawn
BAD = (Label.WRONG, Label.FAILED, Label.INVALID)


def plot(document: Figures, path: Path) -> bool:
    """Draw into a PNG, SVG or PDF file; False without matplotlib. Raises RrmError if the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    times = [found for arm in document["arms"] for found in arm["batch"].get("over_time", ())][:MOST_PROCESSES]
    figure = Figure(figsize=(9, 4.2 + 1.1 * len(times)), layout="constrained")
    grid = figure.add_gridspec(1 + len(times), 2, height_ratios=[4, *([1.1] * len(times))])
    left, right = (figure.add_subplot(grid[0, i]) for i in (0, 1))
    _pairs(left, document["rows"])
    _arms(right, document["arms"])
    if times:
        _batch([figure.add_subplot(grid[1 + i, :]) for i in range(len(times))], times)
    try:
        with warnings.catch_warnings(action="ignore"):  # of letters that its font lacks
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise RrmError(f"{path} cannot be written: {error.strerror or error}") from None
    return True


def _pairs(axes: Any, rows: Sequence[Figures]) -> None:
    """Time directly against time recursively, a dot a pair."""
    direct = {_draw(row): row for row in rows if row["mode"] == DIRECT}
    for name, colour, chosen in (
        ("headline", HEADLINE, True),
        ("wrong or failed", WRONG, False),
        ("any other", OTHER, None),
    ):
        pairs = [
            (direct[_draw(row)]["latency_s"], row["latency_s"])
            for row in rows
            if row["mode"] == RECURSIVE and _draw(row) in direct and _is(row["label"]) is chosen
        ]
        pairs = [pair for pair in pairs if all(seconds and seconds > 0 for seconds in pair)]
        if pairs:
            axes.scatter(*zip(*pairs, strict=True), s=14, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    low, high = min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())
    axes.plot([low, high], [low, high], color="#777777", linewidth=0.8, linestyle=":")
    axes.set_xlabel("time to answer directly, s", fontsize=8)
    axes.set_ylabel("recursively, s", fontsize=8)
    if axes.collections:
        axes.legend(fontsize=7, frameon=False)
    _quiet(axes)


def _draw(row: Figures) -> tuple[Any, ...]:
    return row["arm"], row["id"], row["seed"], row["sample"]


def _is(label: str) -> bool | None:
    """True: headline, False: wrong or failed, None: any other."""
    return True if label == Label.HEADLINE else False if label in BAD else None


def _arms(axes: Any, arms: Sequence[Figures]) -> None:
    """Accuracy with its interval over the median time to answer, a point an arm's mode."""
    several = len(arms) > 1
    for arm in arms:
        for mode, figures in arm["modes"].items():
            if figures["accuracy"] is None or figures["latency_s_median"] is None:
                continue
            low, high = figures["accuracy_ci95"]
            x, y = figures["latency_s_median"], figures["accuracy"]
            axes.errorbar(
                x, y, [[max(0, y - low)], [max(0, high - y)]], fmt="o", color=COLOURS[mode], markersize=5, capsize=3
            )
            name = f"{arm['name']}, {NAMES[mode]}" if several else NAMES[mode]
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7, parse_math=False)
    axes.set_ylim(-0.02, 1.05)
    axes.margins(x=0.3)
    axes.set_xlabel("median time to answer, s", fontsize=8)
    axes.set_ylabel("share right, Wilson interval", fontsize=8)
    _quiet(axes)


def _batch(places: Sequence[Any], times: Sequence[Figures]) -> None:
    """Nodes in the batch over time, axes for each process."""
    for axes, found in zip(places, times, strict=True):
        length = len(next(iter(found["nodes"].values())))
        at = [found["span_s"] * i / length for i in range(length)]
        modes = list(found["nodes"])
        axes.stackplot(
            at,
            *found["nodes"].values(),
            colors=[COLOURS[m] for m in modes],
            labels=[NAMES[m] for m in modes],
            step="post",
        )
        axes.set_xlim(0, found["span_s"])
        axes.set_ylabel("nodes\nat work", fontsize=7)
        _quiet(axes)
    axes.set_xlabel("seconds of the run", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper right")


def _quiet(axes: Any) -> None:
    axes.tick_params(labelsize=7, length=2, which="both")
    axes.spines[["top", "right"]].set_visible(False)
