"""A recorded profile read back: its ranges on the clock of trace.jsonl, and a table of where the time went."""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.graph.paths import NodeKey

PROFILE, SUMMARY = "profile.json.gz", "profile.txt"
ENTRY = "rrm_engine"  # ours at the top level of the Chrome trace
RANGE, ON_DEVICE = "user_annotation", "gpu_user_annotation"  # torch's categories
TORCH_ARGS = {"External id", "Record function id", "Ev Idx"}
STEP = "step"
SHOWN_JOBS = 6


class ProfileError(RrmError):
    """There is no profile to write, or no way to; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Range:
    """``start`` and ``end`` are seconds of ``time.monotonic``, ``inner`` the ranges directly in it, in order.

    ``args`` holds ``step``, ``nodes``, maybe counts of tokens, and what torch puts there. Nodes are the keys of
    sequences, ``id/mode/sample:root.a``; those of a forward are a mapping from key to tokens.
    """

    name: str
    start: float
    end: float
    args: dict[str, Any]
    inner: "list[Range]" = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def own_s(self) -> float:
        """Without the ranges in it."""
        return self.seconds - sum(r.seconds for r in self.inner)

    @property
    def jobs(self) -> set[str]:
        """Keys of the jobs it worked for."""
        return {NodeKey(key).job for key in self.args["nodes"]}

    @property
    def told(self) -> dict[str, Any]:
        """``args`` without torch's own."""
        return {name: value for name, value in self.args.items() if name not in TORCH_ARGS}

    def walk(self) -> "Iterator[Range]":
        """It and all in it, in the order they began."""
        yield self
        for one in self.inner:
            yield from one.walk()


@dataclass(frozen=True, slots=True)
class RecordedProfile:
    """``outer`` are the steps, and what was done between them. ``about`` is our entry of the file.

    ``device_s`` is by name the time from the first to the last kernel of each range, added up; empty on CPU.
    """

    outer: list[Range]
    device_s: dict[str, float]
    about: dict[str, Any]

    @property
    def ranges(self) -> list[Range]:
        """All, in the order they began."""
        return [r for one in self.outer for r in one.walk()]

    @property
    def jobs(self) -> list[str]:
        """The jobs that ran meanwhile."""
        return list(dict.fromkeys(job for r in self.ranges for job in sorted(r.jobs)))


def read_profile(directory: Path) -> RecordedProfile | None:
    """The profile in a run directory; None if it has none. Raises OSError, or ValueError on a damaged one."""
    path = directory / PROFILE
    if not path.exists():
        return None
    try:
        return from_chrome(json.loads(gzip.decompress(path.read_bytes())))
    except (EOFError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"not what a run writes there: {error!r}") from error


def from_chrome(trace: dict[str, Any]) -> RecordedProfile:
    """Our ranges in a Chrome trace that ``Profile`` wrote."""
    about, device = trace[ENTRY], defaultdict[str, float](float)
    found = [e for e in trace["traceEvents"] if e.get("cat") == RANGE and "step" in e["args"]]
    names = {e["name"] for e in found}
    for event in trace["traceEvents"]:
        if event.get("cat") == ON_DEVICE and event["name"] in names:
            device[event["name"]] += event["dur"] * 1e-6
    return RecordedProfile(_tree(found, about["monotonic_offset_s"]), dict(device), about)


def _tree(events: list[dict[str, Any]], offset_s: float) -> list[Range]:
    """Ranges in each other; compared in whole nanoseconds, which is how torch took them."""
    outer: list[Range] = []
    around: list[tuple[int, Range]] = []
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        start = round(event["ts"] * 1e3)
        end = start + round(event["dur"] * 1e3)
        one = Range(event["name"], start * 1e-9 + offset_s, end * 1e-9 + offset_s, event["args"])
        while around and around[-1][0] <= start:
            around.pop()
        (around[-1][1].inner if around else outer).append(one)
        around.append((end, one))
    return outer


def range_table(profile: RecordedProfile) -> str:
    """Where the time of the window went, a line for each kind of range; the own times add up to the window."""
    kinds: dict[str, list[Range]] = defaultdict(list)
    for one in profile.ranges:
        kinds[one.name].append(one)
    steps, window = kinds[STEP], profile.outer[-1].end - profile.outer[0].start
    first, last = steps[0].args["step"], steps[-1].args["step"]
    head = f"{'range':<16}{'calls':>8}{'tokens':>9}{'total ms':>11}{'own ms':>11}{'per step':>10}{'share':>9}"
    lines = [f"{len(steps):,} steps, {first:,} to {last:,}, in {window:.3f} s on {profile.about['device']}", "", head]

    def add(name: str, own_s: float, found: list[Range]) -> None:
        tokens = sum(r.args.get("prefill_tokens", 0) + r.args.get("decode_tokens", 0) for r in found)
        total = f"{1e3 * sum(r.seconds for r in found):,.2f}" if found else ""
        numbers = f"{len(found) or '':>8}{tokens or '':>9}{total:>11}{1e3 * own_s:>11,.2f}"
        device = f"  device {1e3 * profile.device_s[name]:,.2f} ms" if name in profile.device_s else ""
        lines.append(f"{name:<16}{numbers}{1e3 * own_s / len(steps):>10.3f}{own_s / window:>9.1%}{device}")

    own = {name: sum(r.own_s for r in found) for name, found in kinds.items()}
    for name in sorted(own.keys() - {STEP}, key=lambda name: -own[name]):
        add(name, own[name], kinds[name])
    add("step, else", own[STEP], kinds[STEP])
    add("between steps", window - sum(own.values()), [])
    shown, more = profile.jobs[:SHOWN_JOBS], len(profile.jobs) - SHOWN_JOBS
    jobs = ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
    return "\n".join([*lines, "", f"Host times, the profiler's own cost included. It made these jobs slower: {jobs}"])
