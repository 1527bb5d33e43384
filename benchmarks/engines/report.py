"""The figures of benchmarks/peers.py: every round as JSON, medians and spreads as tables."""

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rrm_engine.replay.command import about, write_result
from rrm_engine.replay.driver import Memory
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import Row, as_json, describe
from rrm_engine.replay.report import duration, number, ratio

BASE = "ours"
DECODING = ("sequences", "peer", "tokens/s", "slowest - fastest", "time / ours", "of minima")
JOINED = (
    *("graph", "peer", "answer", "fastest - slowest", "time / ours", "of minima"),
    *("resume", "fastest - slowest", "time / ours", "prefilled", "reused"),
)
ONLY_WIDE = ("slowest - fastest", "fastest - slowest", "of minima", "prefilled", "reused")
CAPTION = (
    "Medians of the rounds; time / ours: the median over the rounds of a peer's time over ours in that round, above "
    "1 where ours is faster; of minima: its least time over our least. resume: from the last token of the last awaited "
    "child to the parent's next token; prefilled, reused: tokens, - where the peer does not tell."
)


@dataclass(slots=True)
class Figures:
    """One peer on one graph, over the rounds."""

    kind: str
    graph: str
    peer: str
    answer_s: list[float]
    resume_s: list[float]  # of all rounds
    tokens_per_s: float
    ratio: float
    ratio_of_minima: float
    resume_ratio: float | None
    prefilled: int | None
    reused: int | None


@dataclass(slots=True)
class Measured:
    """All that has been measured so far. ``allowed`` is what every peer was given, ``left_out`` why others are not
    there.
    """

    memory: Memory
    allowed: dict[str, str]
    left_out: dict[str, str]
    graphs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    figures: list[Figures] = field(default_factory=list)
    load: list[tuple[float, float, float]] = field(default_factory=lambda: [os.getloadavg()])

    def add(self, kind: str, graphs: Sequence[Graph], rows: list[Row]) -> None:
        self.graphs[kind] = [describe(graph) for graph in graphs]
        self.rows[kind] = rows
        self.figures += figures(kind, graphs, rows)
        self.load.append(os.getloadavg())

    def losses(self) -> list[str]:
        """Where ours is slower, in words."""
        found = [f"{one.graph}: {one.peer} takes {one.ratio:.2f} of our time" for one in self.figures if one.ratio < 1]
        return found + [
            f"{one.graph}: {one.peer} resumes in {one.resume_ratio:.2f} of our time"
            for one in self.figures
            if one.resume_ratio is not None and one.resume_ratio < 1
        ]


def figures(kind: str, graphs: Sequence[Graph], rows: Sequence[Row]) -> list[Figures]:
    """One entry for each row, those of a graph together."""
    ours = {row.graph: row for row in rows if row.name == BASE}
    decoded = {graph.id: sum(node.decoded for node in graph.nodes.values()) for graph in graphs}
    found = []
    for graph in graphs:
        for row in (row for row in rows if row.graph == graph.id):
            base = ours[graph.id]
            resumes = [second for turn in row.resume_s for second in turn]
            found.append(
                Figures(
                    kind,
                    graph.id,
                    row.name,
                    row.answer_s,
                    resumes,
                    decoded[graph.id] / statistics.median(row.answer_s),
                    _ratio(row.answer_s, base.answer_s),
                    min(row.answer_s) / min(base.answer_s),
                    _ratio(list(map(statistics.median, row.resume_s)), list(map(statistics.median, base.resume_s)))
                    if resumes
                    else None,
                    row.counters["prefilled"],
                    row.counters["reused"],
                )
            )
    return found


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def decoding(measured: Measured) -> list[list[str]]:
    """The lines of what ran side by side."""
    lines = []
    for one in (one for one in measured.figures if one.kind == "side by side"):
        decoded = one.tokens_per_s * statistics.median(one.answer_s)
        slowest, fastest = decoded / max(one.answer_s), decoded / min(one.answer_s)
        speed = f"{one.tokens_per_s:.1f}", f"{slowest:.1f} - {fastest:.1f}"
        lines.append([one.graph.split()[0], one.peer, *speed, ratio(one.ratio), ratio(one.ratio_of_minima)])
    return lines


def joined(measured: Measured) -> list[list[str]]:
    """The lines of graphs in which parents wait."""
    lines = []
    for one in (one for one in measured.figures if one.kind != "side by side"):
        resume = duration(statistics.median(one.resume_s)) if one.resume_s else "-"
        lines.append(
            [
                *(one.graph, one.peer, duration(statistics.median(one.answer_s)), spread(one.answer_s)),
                *(ratio(one.ratio), ratio(one.ratio_of_minima)),
                *(resume, spread(one.resume_s) if one.resume_s else "-", ratio(one.resume_ratio)),
                *(number(one.prefilled), number(one.reused)),
            ]
        )
    return lines


def spread(seconds: Sequence[float]) -> str:
    return f"{duration(min(seconds))} - {duration(max(seconds))}"


def tables(measured: Measured) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    found: list[tuple[tuple[str, ...], list[list[str]]]] = [(DECODING, decoding(measured)), (JOINED, joined(measured))]
    return [(header, lines) for header, lines in found if lines]


def print_tables(console: Console, measured: Measured) -> None:
    """For the terminal; the less important columns only where there is room."""
    for header, lines in tables(measured):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
        shown = [i for i, name in enumerate(header) if console.width >= 130 or name not in ONLY_WIDE]
        for i in shown:
            table.add_column(header[i], justify="left" if i < 2 else "right", no_wrap=i > 0)
        for line in lines:
            table.add_row(*(line[i] for i in shown))
        console.print(table)
    console.print(CAPTION, highlight=False)
    console.print(verdict(measured), highlight=False, markup=False)


def verdict(measured: Measured) -> str:
    losses = measured.losses()
    return f"Ours is slower here: {'; '.join(losses)}." if losses else "Ours is the fastest in every line."


def markdown(measured: Measured) -> str:
    model = about(measured.memory)
    threads = "one thread" if model["threads"] == 1 else f"{model['threads']} threads"
    rounds = ", ".join(f"{kind} {len(rows[0].answer_s)}" for kind, rows in measured.rows.items())
    parts = [f"# {model['model']}, {model['dtype']} on {model['device']}, {threads} each, rounds in turns: {rounds}\n"]
    for header, lines in tables(measured):
        rows = [header, ["---", "---", *["---:"] * (len(header) - 2)], *lines]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    parts.append(f"{CAPTION}\n\n{verdict(measured)}\n")
    parts.append("What each was given:\n\n" + "".join(f"- {name}: {said}\n" for name, said in measured.allowed.items()))
    if measured.left_out:
        parts.append("Left out:\n\n" + "".join(f"- {name}: {why}\n" for name, why in measured.left_out.items()))
    loads = ", ".join(f"{one[0]:.1f}" for one in measured.load)
    parts.append(f"The machine's load before and after each part: {loads}, ours included.\n")
    return "\n".join(parts)


def write(measured: Measured, args: argparse.Namespace) -> None:
    """peers.json and table.md in ``args.out``."""
    write_result(
        args.out / "peers.json",
        args,
        **about(measured.memory),
        allowed=measured.allowed,
        left_out=measured.left_out,
        load=measured.load,
        graphs=measured.graphs,
        rows={kind: as_json(rows) for kind, rows in measured.rows.items()},
    )
    (args.out / "table.md").write_text(markdown(measured))
