"""The suite's result as Markdown tables and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.lab import Row, Section


def markdown(about: dict[str, Any], sections: Sequence[Section]) -> str:
    """All sections, those that failed or were left out with the reason."""
    parts = ["# GPU suite", ""]
    parts += [f"- {name.replace('_', ' ')}: {value}" for name, value in about.items() if not isinstance(value, dict)]
    for section in sections:
        parts += ["", f"## {section.title}", "", f"{section.seconds:.1f} s."]
        if section.skipped:
            parts[-1] += f" Left out: {section.skipped}."
        if section.error:
            parts[-1] += f" **Error: {section.error}**"
        parts += ["", *tables(section.rows)]
    return "\n".join(parts).rstrip() + "\n"


def tables(rows: Sequence[Row]) -> list[str]:
    """Rows of the same keys in one table; a list or dict inside a row is written in brackets."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    lines: list[str] = []
    for names, group in groups.items():
        lines += ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in group]
        lines.append("")
    return lines


def cell(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def plots(folder: Path, sections: Sequence[Section]) -> list[str]:
    """PNG files, as far as there is something to draw; their names. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {section.name: section.rows for section in sections}
    written = []
    for name, draw in (("decode", _decode), ("sharing", _sharing)):
        found = [row for row in rows.get(name, []) if "ms_per_step" in row or "siblings" in row]
        if not found:
            continue
        figure, axes = plt.subplots(figsize=(7, 4))
        draw(axes, found)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        written.append(f"{name}.png")
    return written


def _decode(axes: Any, rows: list[Row]) -> None:
    for context in sorted({row["context"] for row in rows}):
        for host_work, style in (("lookahead", "-"), ("graphs", "--"), ("eager", ":")):
            line = [row for row in rows if row["context"] == context and row["host_work"] == host_work]
            label = f"{context} tokens, {host_work}"
            axes.plot([r["batch"] for r in line], [r["ms_per_step"] for r in line], style, marker="o", label=label)
    axes.set(xscale="log", xlabel="sequences", ylabel="ms per step", title="Decoding, random weights")


def _sharing(axes: Any, rows: list[Row]) -> None:
    for prefix in sorted({row["prefix"] for row in rows}):
        line = [row for row in rows if row["prefix"] == prefix]
        axes.plot([r["siblings"] for r in line], [r["speedup"] for r in line], marker="o", label=f"{prefix} tokens")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="siblings", ylabel="speed-up of attention", title="A prefix read once")
