"""A torch.profiler trace of a window of engine steps, with named ranges that say which nodes they worked for.

torch writes only the name of a record_function into its Chrome trace. What else belongs to a range is noted beside it
and put into the range's ``args`` when the trace is written. Times in the file are torch's; its entry ``rrm_engine``
says how far they are from ``time.monotonic``, the clock of trace.jsonl.
"""

import gzip
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rrm_engine.device.transfer import wait_for
from rrm_engine.engine.ranges import HasSequence, Ranges
from rrm_engine.engine.scheduler import Work
from rrm_engine.engine.sequence import Sequence
from rrm_engine.trace.kernel_names import named_kernels
from rrm_engine.trace.profile_reader import ENTRY, PROFILE, RANGE, STEP, SUMMARY, ProfileError, from_chrome, range_table

STEPS, WARM_UP = 200, 10  # steps recorded, and left out before
OPERATORS = 25  # lines of the table of operators
PREFILL, DECODE = "prefill", "decode"


class Profile(Ranges):
    """Records ``steps`` steps after the first ``warm_up``; before and after that it makes no range either.

    ``device`` decides what is recorded: with CUDA its kernels and copies too. ``about`` goes into the trace's entry
    ``rrm_engine``, ``devices`` are all those that compute. What runs in the window takes longer for it.
    """

    def __init__(
        self,
        device: torch.device,
        steps: int = STEPS,
        *,
        warm_up: int = WARM_UP,
        devices: Iterable[torch.device] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if steps < 1:
            raise ProfileError("--profile must be at least 1")
        self.device = device
        self.devices = {device, *devices}
        self.steps = steps
        self.warm_up = warm_up
        self.recorded = 0
        self._about = dict(about or {})
        self._seen = 0
        self._on = False
        self._names = ExitStack()  # of the compiled kernels, for as long as it is on
        self._number = 0  # of the step that runs
        self._noted: list[tuple[str, dict[str, Any]]] = []  # of each range, in the order they were opened in
        self._entered: list[tuple[float, float]] = []  # monotonic seconds before and after each step's range opened
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes into the terminal
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):
            pass  # seconds of imports, which no step should pay for
        self._profiler = profile(activities=activities)

    def __call__(self, name: str, of: "Iterable[HasSequence | Sequence | str]" = ()) -> AbstractContextManager[Any]:
        return self._open(name, {"nodes": list(map(_key, of))}) if self._on else nullcontext()

    def forward(self, work: Iterable[Work]) -> AbstractContextManager[Any]:
        """Named by what the forward holds: prefill, decode or prefill+decode; with the tokens of all sequences."""
        if not self._on:
            return nullcontext()
        tokens, nodes = {PREFILL: 0, DECODE: 0}, {}
        for item in work:
            nodes[item.sequence.key] = item.count
            tokens[PREFILL if item.prefilled else DECODE] += item.count
        name = "+".join(kind for kind, count in tokens.items() if count)
        return self._open(name, {"nodes": nodes, **{f"{kind}_tokens": count for kind, count in tokens.items()}})

    def reclaims(self, victim: Sequence, needy: Sequence) -> None:
        """A range without length."""
        if self._on:
            with self._open("reclaim", {"nodes": [victim.key], "needed_by": needy.key}):
                pass

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        self._seen += 1
        self._number = number
        if self._seen == self.warm_up + 1:
            self._names.enter_context(named_kernels())
            self._profiler.start()
            self._on = True
        if not self._on:
            yield
            return
        before = monotonic()
        with self._open(STEP, {"nodes": []}):
            self._entered.append((before, monotonic()))
            yield
        self.recorded += 1
        if self.recorded == self.steps:
            self._stop()

    def write(self, directory: Path) -> None:
        """Write ``profile.json.gz`` (for Perfetto or chrome://tracing) and ``profile.txt``; what runs is over then.

        Raises ProfileError if no step was recorded, or if they cannot be written.
        """
        self._stop()
        if not self.recorded:
            raise ProfileError(
                f"--profile has nothing to show: there were {self._seen} steps, and the first {self.warm_up} are a "
                f"warm-up; profile a longer run"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            trace = self._exported(directory)
            _write(directory / PROFILE, gzip.compress(json.dumps(trace).encode(), compresslevel=5))
            text = f"{range_table(from_chrome(trace))}\n\n{self._operators()}\n"
            _write(directory / SUMMARY, text.encode())
        except OSError as error:
            raise ProfileError(f"{directory / PROFILE} cannot be written: {error.strerror or error}") from None

    def _open(self, name: str, args: dict[str, Any]) -> AbstractContextManager[Any]:
        self._noted.append((name, {"step": self._number, **args}))
        return record_function(name)

    def _stop(self) -> None:
        if self._on:
            self._on = False
            wait_for(self.devices)
            self._profiler.stop()
            self._names.close()

    def _exported(self, directory: Path) -> dict[str, Any]:
        """torch's Chrome trace, with what was noted in it."""
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            trace: dict[str, Any] = json.loads(path.read_bytes())
        ours = {name for name, _ in self._noted}
        ranges = [e for e in trace["traceEvents"] if e.get("cat") == RANGE and e["name"] in ours]
        ranges.sort(key=lambda e: e["args"]["Ev Idx"])
        if [e["name"] for e in ranges] != [name for name, _ in self._noted]:
            raise ProfileError("torch's trace does not hold the ranges that were made; profile fewer steps")
        for event, (_, args) in zip(ranges, self._noted, strict=True):
            event["args"].update(args)
        opened = [e["ts"] for e in ranges if e["name"] == STEP]
        trace[ENTRY] = {**self._about, "device": str(self.device), **_clock(opened, self._entered)}
        return trace

    def _operators(self) -> str:
        sort_by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table: str = self._profiler.key_averages().table(sort_by=sort_by, row_limit=OPERATORS, max_name_column_width=60)
        return f"Top {OPERATORS} operators and ranges by their own time\n{table.rstrip()}"


def _key(item: HasSequence | Sequence | str) -> str:
    if isinstance(item, str):
        return item
    return item.key if isinstance(item, Sequence) else item.sequence.key


def _clock(opened: list[float], entered: list[tuple[float, float]]) -> dict[str, float]:
    """How to get from torch's microseconds to monotonic seconds: ``ts * 1e-6 + monotonic_offset_s``.

    ``opened`` is when torch began each step's range; that was between the two monotonic times in ``entered``. So
    each of them bounds the offset from both sides. By ``clock_error_s`` it may be off: half of what the bounds leave
    open, or of their contradiction if one of the clocks was set meanwhile.
    """
    least = max(before - ts * 1e-6 for ts, (before, _) in zip(opened, entered, strict=True))
    most = min(after - ts * 1e-6 for ts, (_, after) in zip(opened, entered, strict=True))
    return {"monotonic_offset_s": (least + most) / 2, "clock_error_s": abs(most - least) / 2}


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(data)
    draft.replace(path)
