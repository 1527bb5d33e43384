"""Recorded runs as pandas data frames, and as a table of their figures in a notebook."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, plural
from rrm_engine.runs.arms import Arm, Run, Sample, arms, runs_in
from rrm_engine.runs.events import RECORDED, Concluded
from rrm_engine.runs.nodes import Node, nodes_of
from rrm_engine.runs.reader import RecordedJob, read_jobs
from rrm_engine.runs.rows import Fields, row_key
from rrm_engine.runs.trust import DIRECT, Trust, has_time
from rrm_engine.runs.typed import types_of

if TYPE_CHECKING:
    from pandas import DataFrame

Types = Mapping[str, frozenset[type]]  # by column what its values are, beside None

STR, INT, FLOAT, LIST = (
    frozenset[type]({str}),
    frozenset[type]({int}),
    frozenset[type]({float}),
    frozenset[type]({list}),
)
KEYS: Types = {"run": STR, "job": STR}  # together they name a row; all three frames have them
OF_ROWS: Types = {**KEYS, "arm": STR, "seed": INT, "label": STR, "marks": LIST, "reason": STR, **types_of(Fields)}
OF_NODES: Types = {
    **KEYS,
    "node": STR,
    "parent": STR,
    "depth": INT,
    "task": STR,
    "depends_on": LIST,
    "phases": LIST,
    "tokens": INT,
    "started_s": FLOAT,
    "ended_s": FLOAT,
    "waited_s": FLOAT,
    "end": STR,
    "answer": STR,
}
DTYPES: dict[frozenset[type], str] = {
    INT: "Int64",
    frozenset({bool}): "boolean",
    FLOAT: "float64",
    frozenset({int, float}): "float64",
}


SHOWN: dict[str, Any] = {"float_format": "{:.3g}".format, "na_rep": "-"}  # how a run shows itself


class Frames:
    """What ``load`` gives. Nodes and events are read when they are first asked for.

    ``rows`` has a line for every row, with all its fields and its trust label; ``nodes`` one for every node of every
    job, its times in seconds since its job began; ``events`` one for every event, with the fields of all kinds of them.
    The columns ``run`` and ``job`` are in all three. ``summary`` has a line for every arm and mode. Whole numbers that
    may be missing are pandas' ``Int64``, verdicts its ``boolean``; lists and objects stay what they are.
    """

    def __init__(self, arms: Sequence[Arm], tokens: bool) -> None:
        self.arms = arms
        self._tokens = tokens

    @cached_property
    def rows(self) -> "DataFrame":
        return _frame((_of_row(arm, *judged) for arm in self.arms for judged in arm.trusted), OF_ROWS)

    @cached_property
    def nodes(self) -> "DataFrame":
        return _frame((found for run, job in self._jobs for found in _of_nodes(run, job, self._tokens)), OF_NODES)

    @cached_property
    def events(self) -> "DataFrame":
        return _frame((found for run, job in self._jobs for found in _of_events(run, job)), _event_columns())

    @cached_property
    def summary(self) -> "DataFrame":
        return _frame((_of_mode(arm, mode) for arm in self.arms for mode in arm.modes), {})

    @cached_property
    def _jobs(self) -> list[tuple[Run, RecordedJob]]:
        return [(run, job) for arm in self.arms for run in arm.runs for job in read_jobs(run.path, tokens=self._tokens)]

    def _about(self) -> str:
        runs = [run for arm in self.arms for run in arm.runs]
        names = ", ".join(legible(run.path) for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
        return f"{plural(len(runs), 'run')} ({names}), {plural(sum(len(run.rows) for run in runs), 'row')}"

    def __repr__(self) -> str:
        return f"{self._about()}\n{self.summary.to_string(index=False, **SHOWN)}"

    def _repr_html_(self) -> str:
        return (
            f"<p>{escape(self._about())}</p>{self.summary.to_html(index=False, escape=True, **SHOWN)}"
            "<p>ratio: median over pairs of the direct row's latency divided by the recursive one's</p>"
        )


def load(directories: Iterable[str | PathLike[str]], tokens: bool) -> Frames:
    """See `rrm_engine.runs.load`."""
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise RrmError("runs.load gives pandas data frames: pip install 'rrm-engine[pandas]'") from None
    paths = [Path(directory) for directory in directories]
    if not paths:
        raise RrmError("runs.load takes the directories of recorded runs, as in runs.load('runs/mine')")
    return Frames(arms(runs_in(paths)), tokens)


def _frame(records: Iterable[Mapping[str, Any]], types: Types) -> "DataFrame":
    """A frame with the columns of ``types`` first. Pandas would guess another type where other values are missing."""
    import pandas

    found = list(records)
    names = dict.fromkeys([*types, *(name for record in found for name in record)])
    columns = {name: [record.get(name) for record in found] for name in names}

    def column(name: str) -> Any:
        try:
            return pandas.Series(columns[name], dtype=_dtype(types, name))
        except OverflowError:  # a number that its type has no room for
            return pandas.Series(columns[name], dtype="object")

    return pandas.DataFrame({name: column(name) for name in names})


def _dtype(types: Types, column: str) -> str | None:
    """None: pandas guesses. Texts stay Python's, for half of a surrogate pair is in no other string type."""
    return DTYPES.get(types[column] - {NoneType}, "object") if column in types else None


def _of_row(arm: Arm, sample: Sample, trust: Trust) -> dict[str, Any]:
    own = {"run": str(sample.run.path), "job": row_key(sample.row), "arm": arm.name, "seed": sample.run.seed}
    judged = {"label": str(trust.label), "marks": list(map(str, trust.marks)), "reason": trust.reason}
    return {**own, **judged, **sample.row}


def _of_nodes(run: Run, job: RecordedJob, tokens: bool) -> Iterator[dict[str, Any]]:
    began = job.events[0].t if job.events else 0.0
    for path, node in nodes_of(job.events).items():
        found = {"run": str(run.path), "job": job.key, "node": path, **_of_node(node, began)}
        transcript = node.end.transcript if node.end else None
        if tokens and transcript:
            found |= {"token_ids": transcript.token_ids, "sampled": list(transcript.sampled)}
        yield found


def _of_node(node: Node, began: float) -> dict[str, Any]:
    end = node.end
    return {
        "parent": node.path.parent,
        "depth": node.path.count("."),
        "task": node.task,
        "depends_on": list(node.depends_on),
        "phases": [str(phase.began.phase) for phase in node.phases],
        "tokens": node.tokens,
        "started_s": node.phases[0].began.t - began if node.phases else None,
        "ended_s": end.t - began if end else None,
        "waited_s": node.waited_s,
        "end": end.EVENT if end else None,
        "answer": end.answer if isinstance(end, Concluded) and end.ok else None,
    }


def _of_events(run: Run, job: RecordedJob) -> Iterator[dict[str, Any]]:
    for event in job.events:
        found = {"run": str(run.path), "session": job.session, **event.as_json()}
        found.pop("token_ids", None)  # the nodes have them
        yield found


def _event_columns() -> dict[str, frozenset[type]]:
    """What the classes of events say of their fields; a name that two of them have may be of two types."""
    found: dict[str, frozenset[type]] = {**KEYS, "session": INT, "event": STR, "kind": STR}
    for cls in RECORDED:
        for name, types in types_of(cls).items():
            found[name] = found.get(name, frozenset()) | types
    del found["transcript"]  # whose fields stand beside the others
    return found


def _of_mode(arm: Arm, mode: str) -> dict[str, Any]:
    """A line of the summary: what a reader wants to know first."""
    samples = arm.of_mode(mode)
    graded = [sample.row["correct"] for sample in samples if sample.row["correct"] is not None]
    labels = Counter(str(trust.label) for sample, trust in arm.trusted if sample.mode == mode)
    ratios = [
        direct.row["latency_s"] / recursive.row["latency_s"]
        for direct, recursive in arm.paired
        if has_time(direct.row) and has_time(recursive.row)
    ]
    timed = [sample.row["latency_s"] for sample in samples if has_time(sample.row)]
    return {
        "arm": arm.name,
        "mode": mode,
        "tasks": len({sample.problem for sample in samples}),
        "rows": len(samples),
        "accuracy": sum(graded) / len(graded) if graded else None,
        "latency_s": statistics.median(timed) if timed else None,
        "ratio": statistics.median(ratios) if ratios and mode != DIRECT else None,
        "trust": ", ".join(f"{label} {count}" for label, count in labels.most_common()),
    }
