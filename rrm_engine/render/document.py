"""What the page is made of, as one plain document: the analysis, each problem with its two rows, their origin."""

import json
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rrm_engine
from rrm_engine.analyze.analysis import analyse
from rrm_engine.legible import plural
from rrm_engine.render.jobs import Decode, drawn
from rrm_engine.render.strings import Strings
from rrm_engine.runs.arms import Arm, Run, Sample, gpus_of
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import Paused
from rrm_engine.runs.rows import row_key
from rrm_engine.runs.timeline import JobTrace
from rrm_engine.runs.trust import DIRECT, RECURSIVE, has_time, trust

VERDICTS = "verify.json"  # in a run's directory: what `verify --json` wrote
Figures = dict[str, Any]


def document(arms: Sequence[Arm], longest: int, decode: bool = False) -> Figures:
    """Everything; texts longer than ``longest`` characters lose their middle. ``decode``: texts that a run did not
    record are made from the token ids of its trace, with its model's tokenizer. Raises RrmError where that is not to
    be had."""
    strings = Strings(longest)
    runs = [run for arm in arms for run in arm.runs]
    traces = {id(run): _Traces(run, decode) for run in runs}
    lent = {id(direct.row) for arm in arms if arm.lender for direct, _ in arm.paired}
    entries = [entry for number in range(len(arms)) for entry in _entries(number, arms, lent, strings, traces)]
    figures = analyse(arms)
    del figures["rows"]
    for arm in figures["arms"]:
        del arm["runs"]  # they are told of once, and without the paths of this machine
    return {
        "version": rrm_engine.__version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "arms": [arm.name for arm in arms],
        "runs": [_about(run, traces[id(run)]) for run in runs],
        "analysis": figures,
        "entries": entries,
        "strings": strings.texts,
    }


class _Traces:
    """The time lines of a run's jobs, and why it has none of others."""

    def __init__(self, run: Run, decode: bool) -> None:
        self.jobs: dict[tuple[str, int], JobTrace] = {}
        self.incomplete: dict[str, str] = {}
        self.problem: str | None = None
        self.decode: Decode | None = None
        try:
            self.jobs = {(trace.key, trace.session): trace for trace in run.trace.jobs}
            self.incomplete = run.trace.incomplete
        except RunError as error:
            self.problem = str(error)
        if decode and not any(isinstance(e, Paused) and e.text for t in self.jobs.values() for e in t.events):
            self.decode = _decoder(run)

    def why_not(self, key: str) -> str:
        return self.problem or self.incomplete.get(key, "its events are not there")


def _entries(
    number: int, arms: Sequence[Arm], lent: Collection[int], strings: Strings, traces: dict[int, _Traces]
) -> Iterator[Figures]:
    """A problem's direct and recursive row, in the order of the arm's rows. Direct rows that stand beside another arm's
    recursive ones (``lent``, by identity) are no entry of their own."""
    arm = arms[number]
    unlike = arm.unlike
    partners = {id(one.row): other for pair in arm.paired for one, other in (pair, pair[::-1])}
    done: set[int] = set()
    for sample in arm.samples:
        partner = partners.get(id(sample.row))
        if id(sample.row) in done or (partner is None and id(sample.row) in lent):
            continue
        both = {s.mode: s for s in (sample, partner) if s}
        done |= {id(s.row) for s in both.values()}
        direct, recursive = both.get(DIRECT), both.get(RECURSIVE)
        judged = trust((recursive or sample).row, direct.row if direct else None, unlike)
        timed = direct and recursive and has_time(direct.row) and has_time(recursive.row)
        yield {
            "arm": number,
            "direct_arm": arms.index(arm.lender) if arm.lender and direct and recursive else number,
            "id": sample.row["id"],
            "task": sample.task,
            "expected": sample.row["expected"],
            "seed": (recursive or sample).run.seed,
            "sample": (recursive or sample).row["sample"],
            "label": str(judged.label),
            "marks": list(map(str, judged.marks)),
            "reason": judged.reason,
            "ratio": direct.row["latency_s"] / recursive.row["latency_s"] if timed else None,  # type: ignore[union-attr]
            DIRECT: direct and _job(direct, strings, traces[id(direct.run)]),
            RECURSIVE: recursive and _job(recursive, strings, traces[id(recursive.run)]),
        }


def _job(sample: Sample, strings: Strings, traces: _Traces) -> Figures:
    row, key = sample.row, row_key(sample.row)
    trace = traces.jobs.get((key, row.get("session", 0)))
    used = sample.run.manifest.resolved
    drawing: Figures = {"nodes": [], "incomplete": traces.why_not(key)}
    if trace is not None:
        drawing = drawn(trace, strings, used.get("block_size") or 16, used.get("wait_policy") or "pin", traces.decode)
    return {
        "key": key,
        "answer": strings.cut(row["answer"]),
        "correct": row["correct"],
        "status": row["status"],
        "error": row["error"],
        "cut": row.get("cut") or {},
        "latency": row["latency_s"],
        "ttft": row["ttft_s"],
        "tokens": row["total_tokens"],
        "path_tokens": row["critical_path_tokens"],
        "path_steps": row.get("critical_path_steps"),
        "node_count": row["nodes"],
        **drawing,
    }


def _about(run: Run, traces: _Traces) -> Figures:
    manifest = run.manifest
    hardware = manifest.hardware
    parts = [
        hardware.get("cpu"),
        plural(cores, "core") if isinstance(cores := hardware.get("cores"), int) else None,
        *gpus_of(hardware),
    ]
    left_out = traces.incomplete
    return {
        "name": run.path.name,
        "model": Path(str(run.settings["model"])).name,
        "parameters": manifest.solver.get("parameters"),
        "dtype": run.settings["dtype"],
        "device": run.settings["device"],
        "seed": run.seed,
        "tasks": manifest.tasks.name,
        "started": manifest.started,
        "command": manifest.command,
        "commit": (manifest.git or {}).get("commit"),
        "dirty": (manifest.git or {}).get("dirty"),
        "hardware": ", ".join(str(part) for part in parts if part),
        "versions": manifest.versions,
        "left_out": traces.problem or "; ".join(f"{key}: {why}" for key, why in list(left_out.items())[:5]) or None,
        "verdict": _verdict(run.path / VERDICTS),
    }


def _decoder(run: Run) -> Decode:
    from rrm_engine.loading.load import load_tokenizer

    tokenizer = load_tokenizer(str(run.settings["model"]))
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _verdict(path: Path) -> Figures | None:
    """What `verify` found, if its file lies in the run's directory. Raises RunError for a file that is none of its."""
    try:
        checks = json.loads(path.read_text(encoding="utf-8"))["checks"]
        verdicts = [check["verdict"] for check in checks]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error!r}): verify --json writes it; move it away otherwise") from None
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    said = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())
    return {
        "said": f"verify: {said}" if said else "verify: no check",
        "whole": bool(verdicts) and "broken" not in counts,
    }
