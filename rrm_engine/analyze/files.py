"""The analysis as files: analysis.json with everything, and tables as CSV: rows, modes of arms, ratios."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rrm_engine.analyze.plot import plot
from rrm_engine.errors import RrmError
from rrm_engine.runs.directory import ESCAPED
from rrm_engine.trace.command import write_json

Figures = dict[str, Any]
PLOT = "analysis.png"


def write(document: Figures, folder: Path) -> list[str]:
    """Write all files, and the names of them. Raises RrmError if that cannot be done."""
    tables = {"rows.csv": document["rows"], "modes.csv": list(_modes(document)), "ratios.csv": list(_ratios(document))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            _write_csv(folder / name, rows)
    except OSError as error:
        raise RrmError(f"{folder} cannot be written: {error.strerror or error}") from None
    write_json(folder / "analysis.json", document, "--out")
    drawn = plot(document, folder / PLOT)
    return ["analysis.json", *tables, *([PLOT] if drawn else [])]


def _write_csv(path: Path, rows: Sequence[Figures]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", encoding="utf-8", errors=ESCAPED, newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return value


def _modes(document: Figures) -> Iterator[Figures]:
    for arm in document["arms"]:
        for mode, figures in arm["modes"].items():
            yield {"arm": arm["name"], "mode": mode, **_flat(figures)}


def _ratios(document: Figures) -> Iterator[Figures]:
    for arm in document["arms"]:
        for name, figures in arm["direct_and_recursive"].items():
            yield {
                "first": f"{arm['direct_of'] or arm['name']}: direct",
                "second": f"{arm['name']}: rrm",
                "pairs": name,
                **_flat(figures),
            }
    for found in document["comparisons"]:
        for mode, figures in found["modes"].items():
            yield {"first": found["first"], "second": found["second"], "pairs": mode, **_flat(figures)}


def _flat(figures: Mapping[str, Any], before: str = "") -> Figures:
    """Nested figures as columns, ``latency_s.median``; an interval as two, its ends."""
    found: Figures = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        elif name.endswith("_ci95"):
            found |= dict(zip((f"{before}{name}.low", f"{before}{name}.high"), value or (None, None), strict=True))
        else:
            found[before + name] = value
    return found
