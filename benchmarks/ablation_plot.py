"""The ablation's figures as a plot: a row of three panels for each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from rrm_engine.replay.report import title

COLOURS = {"plenty": "#4c78a8", "tight": "#f58518"}
BAR = 0.38
ROOM = 1.14  # for the labels
PANELS = ("time to answer (s)", "resume latency (ms)", "peak KV blocks; hatched: in host memory")


def plot(results: Sequence[dict[str, Any]], tight: int, files: Sequence[Path]) -> None:
    """Draw ``results`` into ``files``, whose suffixes name the formats."""
    names = [title(entry) for entry in results[0]["memory"]["plenty"]["summary"]]
    height = 1.1 + len(results) * (1.0 + 0.36 * len(names))
    figure, rows = plt.subplots(len(results), len(PANELS), figsize=(12, height), squeeze=False, layout="constrained")
    for axes, result in zip(rows, results, strict=True):
        for axis in axes:
            _frame(axis, names, first=axis is axes[0])
        for panel, axis in zip(PANELS, axes, strict=True):
            axis.set_xlabel(panel)
        heading = f"{result['model']}, {result['dtype']} on {result['device']}, threads: {result['threads']}"
        axes[0].set_title(heading, loc="left", weight="bold")
        for offset, (setting, figures) in zip((-BAR / 2, BAR / 2), result["memory"].items(), strict=True):
            _bars(axes, figures["summary"], offset, COLOURS[setting])
    words = {"plenty": "room for everything", "tight": f"{tight} % of the blocks that pin takes"}
    handles = [Patch(color=COLOURS[setting], label=text) for setting, text in words.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)


def _frame(axis: Axes, names: Sequence[str], first: bool) -> None:
    axis.set_yticks(range(len(names)), names if first else [])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _bars(axes: Sequence[Axes], summary: Sequence[dict[str, Any]], offset: float, colour: str) -> None:
    places = [i + offset for i in range(len(summary))]
    device = [entry["peak_blocks"] for entry in summary]
    host = [entry["peak_host_blocks"] for entry in summary]
    seconds = [entry["answer_s"] for entry in summary]
    milliseconds = [1000 * (entry["resume_s"] or 0) for entry in summary]
    for axis, values in zip(axes, (seconds, milliseconds), strict=False):
        labels = [f"{value:#.3g}".rstrip(".") for value in values]
        axis.bar_label(axis.barh(places, values, BAR, color=colour), labels=labels, padding=2, fontsize=7)
    axes[-1].barh(places, device, BAR, color=colour)
    hatched = axes[-1].barh(places, host, BAR, left=device, color="white", edgecolor=colour, hatch="////")
    labels = [f"{d} + {h}" if h else f"{d}" for d, h in zip(device, host, strict=True)]
    axes[-1].bar_label(hatched, labels=labels, padding=2, fontsize=7)
    for axis in axes:
        bars = [bar for bar in axis.patches if isinstance(bar, Rectangle)]
        axis.set_xlim(right=ROOM * max(bar.get_x() + bar.get_width() for bar in bars))
