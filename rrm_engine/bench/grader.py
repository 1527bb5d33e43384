"""Grading in a process of its own: a formula may take sympy seconds deep in C, and rows are not to wait for it.

The process is started with the first answer, is nice to the batch, and has so much CPU time for each answer that only
what would never end is cut off: the kernel ends it then, whatever it is doing, and the next answer gets a new one.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

SECONDS = 15  # of CPU time for one answer; grading's own limit of a few seconds does not reach everywhere
PATIENCE = 8  # times as many seconds on the clock, on a machine that is busy with the batch
MEMORY = 8 << 30  # bytes that the process may have
NICE = 10
SERVE = "from rrm_engine.bench.grader import serve; serve()"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``correct`` is False where it could not be found out, for a reason that ``problem`` says."""

    correct: bool | None
    problem: str | None = None
    traceback: str | None = None


class GraderClosed(Exception):
    """The grader was closed before it had an answer judged."""


class Grader:
    """Judges answers one after another. One thread uses it; ``close`` may come from any."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def grade(self, answer: str, expected: str | None) -> Verdict:
        """Whether ``answer`` states ``expected``. Raises GraderClosed."""
        if expected is None:
            return Verdict(None)
        try:
            process = self._process or self._start()
        except OSError as error:
            return Verdict(False, f"no process can be started to grade in: {error}")
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps([answer, expected, self.seconds]).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout, PATIENCE * self.seconds)
        except BrokenPipeError:
            line = b""
        if line:
            return Verdict(**json.loads(line))
        self._kill()
        if self._closed:
            raise GraderClosed
        slow = process.returncode in (-signal.SIGPROF, -signal.SIGKILL)
        ended = f"took more than {self.seconds:g} s" if slow else f"ended its process (code {process.returncode})"
        return Verdict(False, f"grading {ended}")

    def close(self) -> None:
        """End the process, also in the middle of an answer: whatever waits for that sees its end and cleans up."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._closed:
            raise GraderClosed
        path = os.pathsep.join([place or os.getcwd() for place in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is not for it
        )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes its pipes


def _line(pipe: IO[bytes], seconds: float) -> bytes:
    """The next line of ``pipe``; nothing if it ends, or does not come in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return pipe.readline() if selector.select(seconds) else b""


def serve() -> None:
    """What the process does: a verdict, as a line of JSON, for each answer that comes in as one."""
    import traceback

    from rrm_engine.bench.grading import TooSlow, grade

    _be_modest()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply
    for line in sys.stdin:
        answer, expected, seconds = json.loads(line)
        reply: dict[str, object]
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF has no handler: the kernel ends the process
        try:
            reply = {"correct": grade(answer, expected)}
        except TooSlow as error:
            reply = {"correct": False, "problem": str(error)}
        except Exception as error:
            problem = f"grading failed: {type(error).__name__}: {error}"
            reply = {"correct": False, "problem": problem, "traceback": traceback.format_exc()}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _be_modest() -> None:
    """Take second place for the processor, and no more than MEMORY, where the system knows such limits."""
    os.nice(NICE)
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
