"""From results to rows: graded and written beside the batch, in the order in which they came."""

import traceback
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from rrm_engine.bench.grader import Grader, GraderClosed, Verdict
from rrm_engine.bench.progress import Display
from rrm_engine.graph.types import Status
from rrm_engine.runs.directory import FLUSH_S, RunDir, RunDirError
from rrm_engine.runs.rows import Row
from rrm_engine.solver.result import Job, JobResult

UNRECORDED = ("job", "traceback")  # of a result's fields: the one is spelled out in a row, the other has its own file


class RowWriter:
    """A thread that grades results and writes their rows. As a context: at its end all rows are on the disk.

    ``error`` is why no more rows can be written: the disk is full, as a rule.
    """

    def __init__(
        self,
        directory: RunDir,
        display: Display,
        expected: Mapping[str, str | None],
        policy: Mapping[str, Any],
        grader: Grader | None = None,
    ) -> None:
        """``expected`` answers are by task; ``policy`` are the settings that every row carries. ``grader`` is closed at
        the end.
        """
        self.error: RunDirError | None = None
        self._directory, self._display = directory, display
        self._expected, self._policy = expected, policy
        self._grader = grader or Grader()
        self._results: SimpleQueue[JobResult | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="rows", daemon=True)

    def __enter__(self) -> "RowWriter":
        self._thread.start()
        return self

    def put(self, result: JobResult) -> None:
        """Take a result; returns at once. Raises RunDirError if rows cannot be written any more."""
        self._results.put(result)
        self.check()

    def check(self) -> None:
        """Raise what the thread has failed with, if it has."""
        if self.error is not None:
            raise self.error

    def __exit__(self, *exception: object) -> None:
        self._results.put(None)
        try:
            self._thread.join()
        finally:  # interrupted once more: what is not graded yet is not written, and runs again
            self._grader.close()
            self._thread.join()
        if exception == (None, None, None):
            self.check()

    def _work(self) -> None:
        while (result := self._next()) is not None:
            try:
                if self.error is None:
                    self._write(result)
            except RunDirError as error:
                self.error = error
            except GraderClosed:
                return

    def _next(self) -> JobResult | None:
        """The next result. While there is none, the events that came so far go to the disk."""
        while True:
            try:
                return self._results.get(timeout=FLUSH_S)
            except Empty:
                try:
                    self._directory.flush()
                except RunDirError as error:
                    self.error = error

    def _write(self, result: JobResult) -> None:
        expected = self._expected[result.job.id]
        verdict = Verdict(None) if expected is None else Verdict(False)
        if result.error is None:
            verdict = self._grader.grade(result.answer, expected)
        for text in (result.traceback, verdict.traceback):
            if text:
                self._directory.log_error(result.job.key, text)
        session = self._directory.session
        try:
            row = make_row(result, expected, verdict, self._policy, session)
            self._directory.add(row)
        except RunDirError:
            raise
        except Exception as error:  # nothing that a row holds ends more than the row
            self._directory.log_error(result.job.key, traceback.format_exc())
            failed = JobResult(result.job, Status.FAILED, "", result.latency_s, error=f"writing the row: {error!r}")
            row = make_row(failed, expected, Verdict(False), self._policy, session)
            self._directory.add(row)
        self._display.row(row)


def make_row(result: JobResult, expected: str | None, verdict: Verdict, policy: Mapping[str, Any], session: int) -> Row:
    """Every field of the result, the job's spelled out, with the grade and the settings it was run under."""
    job = {f.name: getattr(result.job, f.name) for f in fields(Job)}
    measured = {f.name: getattr(result, f.name) for f in fields(JobResult) if f.name not in UNRECORDED}
    return {
        **job,
        **measured,
        "status": str(result.status),
        "expected": expected,
        "correct": verdict.correct,
        "grading_error": verdict.problem,
        "settings": dict(policy),
        "session": session,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
