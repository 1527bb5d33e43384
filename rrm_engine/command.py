"""What every command does alike: it begins at once, can be interrupted at any time, complains in one sentence, ends.

Only built-in modules are imported here, so that Ctrl-C is heard before anything that takes long.
"""

import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from time import monotonic
from typing import Any, NoReturn

from rrm_engine.errors import RrmError
from rrm_engine.legible import spelled

OK, FAILED, REFUSED, SIGNALLED = 0, 1, 2, 128  # SIGNALLED + the signal's number, as a shell does: Ctrl-C is 130
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
IN_QUICK_SUCCESSION_S = 1.0
ERRORS = "rrm_engine.output"  # how what cannot be encoded is written


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP asks the command to end."""


class Interrupts:
    """A handler of signals. The first one ends what runs, and those right after it do not disturb the ending.

    Later ones raise again, for a library may have swallowed the first, until the command has said how it ended.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.ignored = False
        self._raised_at = -IN_QUICK_SUCCESSION_S

    def __call__(self, number: int, frame: object) -> None:
        self.first = self.first or number
        if not self.ignored and monotonic() - self._raised_at > IN_QUICK_SUCCESSION_S:
            self._raised_at = monotonic()
            raise Interrupted


def interrupts() -> Interrupts:
    """The handler of this process; one that nothing ever reaches, if ``run`` did not start it."""
    found = signal.getsignal(signal.SIGINT)
    return found if isinstance(found, Interrupts) else Interrupts()


def check_interrupt() -> None:
    """Raise the interrupt that a library has swallowed, if there was one."""
    if interrupts().first is not None:
        raise Interrupted


def was_interrupted(error: BaseException | None) -> bool:
    """Whether a signal caused ``error``: cleaning up after an interrupted step may itself have failed."""
    if interrupts().first is not None:
        return True
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def interrupted_code() -> int:
    """The exit code after a signal."""
    return SIGNALLED + (interrupts().first or signal.SIGINT)


def run(module: str, kept: bool = False) -> NoReturn:
    """Be the process of the command whose ``main()`` is in ``module``.

    With ``kept`` what it prints lies in files as well, so that it may be lost without that being a failure.
    """
    handler = Interrupts()
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, handler)
    out, err = _open_stream(1, "stdout"), _open_stream(2, "stderr")
    try:
        code = guarded(lambda: import_module(module).main())
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else FAILED
    except BaseException:  # a signal while the end was being told
        code = FAILED
    for name in SIGNALS:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is handler:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if handler.first is not None:
        code = SIGNALLED + handler.first
    lost = [stream.loss() for stream in (out, err)]
    if lost[0] and not kept:
        code = code or FAILED
    say("".join(f"{sentence}\n" for sentence in lost if sentence), end="")
    sys.exit(code)


def guarded(body: Callable[[], int]) -> int:
    """The exit code of ``body``, whatever it raises; the user is told in one sentence what that was."""
    try:
        return body()
    except RrmError as error:
        say("error: " + str(error).replace("\n", "\\n"))  # as the name of a file may have it
        return REFUSED
    except BrokenPipeError:
        close_output()
        return FAILED
    except MemoryError as error:
        say(f"error: {str(error) or 'there is not enough memory'}")
        return REFUSED
    except Exception as error:
        if not was_interrupted(error):
            say(f"error: {bug(error)}; its traceback is in {_keep(traceback_of(error))}")
            return FAILED
    except KeyboardInterrupt:
        pass
    say("Interrupted.")
    return interrupted_code()


def bug(error: BaseException) -> str:
    """An error of our own doing, in half a sentence."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} (a bug)"


def traceback_of(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _keep(text: str) -> str:
    """Write a traceback where the user finds it; the file's name."""
    import tempfile

    try:
        number, path = tempfile.mkstemp(".log", "rrm-engine-")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f"no file, since none can be written:\n{text}"
    return path


def say(text: str, end: str = "\n") -> None:
    print(spelled(text), file=sys.stderr, end=end, flush=True)


def close_output() -> None:
    """The reader of our output is gone: keep the exit from complaining about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Stream(io.FileIO):
    """A standard stream that may be closed, full or without a reader: what cannot be written is dropped."""

    def __init__(self, number: int, name: str) -> None:
        self.error = _closed(number)
        self.what = f"standard {'output' if number == 1 else 'error'}"
        super().__init__(number, "w", closefd=False)
        self.std = name

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def loss(self) -> str:
        """What has been lost, in a sentence; nothing if the reader chose to read no more."""
        getattr(sys, self.std).flush()
        if self.error is None or self.error.errno in (errno.EPIPE, errno.EIO):  # a pipe, a terminal that is gone
            return ""
        return f"error: {self.what} cannot be written: {self.error.strerror}"


def _closed(number: int) -> OSError | None:
    """What is wrong with a descriptor; a closed one is filled, or the next file to be opened would be in its place."""
    try:
        os.fstat(number)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        return error
    return None


def _open_stream(number: int, name: str) -> _Stream:
    """Put a stream that never fails in the place of ``sys.stdout`` or ``sys.stderr``."""
    codecs.register_error(ERRORS, _as_bytes_or_escaped)
    _closed(0)
    before, stream = getattr(sys, name), _Stream(number, name)
    encoding = before.encoding if before else "utf-8"
    lines = number == 2 or stream.isatty()
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(stream), encoding, ERRORS, line_buffering=lines))
    return stream


def _as_bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte of a file name that is no UTF-8 is written as it is, what the encoding lacks as its escape."""
    assert isinstance(error, UnicodeEncodeError)
    if 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF:
        return bytes([ord(error.object[error.start]) - 0xDC00]), error.start + 1
    return error.object[error.start].encode("ascii", "backslashreplace"), error.start + 1
