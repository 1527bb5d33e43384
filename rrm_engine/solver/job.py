"""One job from its start to its result: the graph machine decides what to do, a backend decodes."""

import hashlib
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rrm_engine.errors import RrmError
from rrm_engine.graph.direct import DirectMachine
from rrm_engine.graph.machine import GraphMachine, Machine
from rrm_engine.graph.paths import ROOT, NodeKey
from rrm_engine.graph.types import Finish, Status
from rrm_engine.runs.events import Finished, JobBegan
from rrm_engine.solver.backend import Written
from rrm_engine.solver.commands import Commands
from rrm_engine.solver.events import Events
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.outcome import outcome
from rrm_engine.solver.reading import PREVIEW, Reading
from rrm_engine.solver.result import Job, JobResult
from rrm_engine.solver.runtime import Runtime
from rrm_engine.solver.trace import JobTrace


class JobRun:
    """Drives one job, the ``rank``-th of its run. The loop calls ``on_written`` for what its nodes write."""

    def __init__(self, runtime: Runtime, job: Job, rank: int, events: Events, *, texts: bool = False) -> None:
        backend = runtime.backend
        self.runtime = runtime
        self.job = job
        self.result: JobResult | None = None
        self.machine: Machine = (
            GraphMachine(job.task, runtime.limits, child_context=runtime.child_context)
            if job.mode == "rrm"
            else DirectMachine(job.task)
        )
        self._session = backend.session(job.key, rank)
        self._tell = events
        self._meter = Meter(monotonic())
        self._trace = JobTrace(backend, job.key, events)
        self.commands = Commands(runtime, self._session, self.machine, self._meter, self._trace, self._finish)
        self._reading = Reading(backend, job.key, self.machine, self._meter, self.commands, texts)
        self._cut = self._so_far = ""  # the row limit that ended it, if one did, and its answer so far
        self._traceback: str | None = None

    def start(self) -> None:
        """Begin. An error here or in ``on_written`` fails this job and no other."""
        with self._own_errors():
            self._start_root()

    def on_written(self, written: Written) -> None:
        """One of the job's nodes has written. Ignored once the job is over."""
        with self._own_errors():
            if self.result is None:
                self._reading.take(written)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """An error in the block fails the job, except one of the caller's callback, which is raised."""
        try:
            yield
        except Exception as error:
            if error is self._tell.error:
                raise
            self.fail(error, str(error) if isinstance(error, RrmError) else f"{type(error).__name__}: {error}")

    def _start_root(self) -> None:
        _refuse_surrogates(self.job.task)
        now = self.commands.now(ROOT) | {"t": self._meter.started_at}
        self.commands.tell(JobBegan(**now, mode=self.job.mode, task=self.job.task))
        with self.runtime.backend.ranges("graph", (NodeKey.of(self.job.key, ROOT),)):
            self.commands.carry_out(self.machine.start())

    def release(self) -> None:
        """End every node of this job, even one opened by a command that was interrupted before it entered the node."""
        self._session.close()

    def fail(self, error: Exception, reason: str) -> None:
        """End the job with an error. If it is a bug, its traceback goes into the result."""
        if self.result is not None:
            return
        if not isinstance(error, RrmError):
            self._traceback = "".join(traceback.format_exception(error))
        try:
            self.cancel(reason)
        except Exception as second:
            if second is self._tell.error:
                raise
        if self.result is None:  # cancelling failed too: make a result without the machine
            self.release()
            latency = monotonic() - self._meter.started_at
            self.result = JobResult(self.job, Status.FAILED, "", latency, error=reason, traceback=self._traceback)
            self._tell_finish(Status.FAILED, "")

    def keep_limits(self) -> None:
        """End a job that has reached a row limit, tokens or seconds, with the answer that it has so far.

        Called between steps, when all its nodes have been read up to the same step.
        """
        runtime, taken = self.runtime, monotonic() - self._meter.started_at
        spent = {"max_row_tokens": self._reading.tokens, "max_row_seconds": taken}
        reached = [name for name, value in spent.items() if value >= (getattr(runtime, name) or math.inf)]
        if reached and self.result is None:
            with self._own_errors():
                self._cut = reached[0]
                self._so_far = self._reading.answer_so_far()
                self._end(f"--{reached[0].replace('_', '-')}")

    def cancel(self, reason: str) -> None:
        """End the job in whatever state it is; all it holds is free when this returns."""
        if self.result is None:
            self.commands.errors.append(reason)
            self._end(reason)

    def _end(self, reason: str) -> None:
        self.release()
        self.commands.forget()
        self.commands.carry_out(self.machine.cancel(reason))

    def _finish(self, command: Finish) -> None:
        commands = self.commands
        if self._cut:
            status = Status.ATOMIC if self.job.mode == "direct" else Status.INVALID
            command = Finish(status, self._so_far)
        commands.repairs.update(self.machine.repairs)
        self.result = outcome(
            self.job,
            command,
            commands.nodes.values(),
            self._meter,
            self._session.costs(),
            self.machine,
            commands.without_room,
            prompt_sha256=hashlib.sha256(commands.prompt.encode()).hexdigest(),
            prompt_preview=self.job.task[:PREVIEW],
            repairs=dict(commands.repairs),
            error=self._error(command),
            traceback=self._traceback,
        )
        if self._cut:
            self.result.cut[self._cut] = 1
        self._tell_finish(command.status, command.answer)

    def _tell_finish(self, status: Status, answer: str) -> None:
        assert self.result is not None
        now = self.commands.now(ROOT) | {"t": self._meter.started_at + self.result.latency_s}
        self.commands.tell(Finished(**now, status=status, answer=answer, events=self._trace.count + 1))

    def _error(self, finish: Finish) -> str | None:
        """The error of a failed run. It is no error if a model finds no answer, but it is one if a task has no room."""
        if finish.status in (Status.FAILED, Status.INVALID) and self.commands.errors:
            return "; ".join(self.commands.errors)
        return finish.error if finish.status is Status.FAILED else None


def _refuse_surrogates(task: str) -> None:
    """Raise RrmError for a lone UTF-16 surrogate, which is no text, but may get into a str from JSON or file names."""
    try:
        task.encode()
    except UnicodeEncodeError as error:
        raise RrmError(
            f"the task is no text: its character {error.start + 1}, {task[error.start]!a}, is half of a surrogate pair"
        ) from None
