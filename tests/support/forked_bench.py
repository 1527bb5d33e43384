"""Runs the bench many times in processes of its own, without paying for the imports of each.

A fork server imports torch, transformers and the engine once. Every bench is then a forked process that runs the
module ``rrm_engine.bench`` as ``python -m`` does, and can be killed, limited or sabotaged like any other process.
"""

import ctypes
import importlib
import multiprocessing as mp
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from rrm_engine.bench.rows import RowWriter
from rrm_engine.device import memory
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.loading import engines
from rrm_engine.models.attention import PagedForward
from rrm_engine.models.lean import Stage
from rrm_engine.runs import directory
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.rows import Row
from rrm_engine.solver.result import JobResult

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
SERVER = mp.get_context("forkserver")
# Not this module: the server does not know its folder.
SERVER.set_forkserver_preload(
    ["rrm_engine.backends.local", "rrm_engine.bench.run", "transformers.models.qwen3.modeling_qwen3"]
)


class Bench:
    """A bench that was started in ``cwd``. ``prepare`` runs in the new process first, ``after`` at its end."""

    def __init__(
        self,
        cwd: Path,
        *argv: str,
        prepare: Sequence[Callable[[], None]] = (),
        after: Callable[[], None] | None = None,
    ) -> None:
        self._streams = [cwd / f".{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        for stream in self._streams:
            stream.touch()
        self.process = SERVER.Process(target=_run, args=(cwd, argv, prepare, after, *self._streams))
        self.process.start()

    @property
    def out(self) -> str:
        return self._streams[0].read_text()

    @property
    def err(self) -> str:
        return self._streams[1].read_text()

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 300) -> int:
        """Its exit code; negative: the signal that ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it still runs: {self.err}"
        return self.process.exitcode


def _run(
    cwd: Path,
    argv: tuple[str, ...],
    prepare: Sequence[Callable[[], None]],
    after: Callable[[], None] | None,
    out: Path,
    err: Path,
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    sys.argv = ["bench", *argv]
    for step in prepare:
        step()
    try:
        runpy.run_module("rrm_engine.bench", run_name="__main__", alter_sys=True)
    finally:
        if after:
            after()


# ways to prepare a process


def limit_files(size: int) -> None:
    """No file may grow over ``size`` bytes: writing more fails as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(more: int) -> None:
    """The process may take ``more`` bytes than it has now."""
    import resource

    have = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (have + more, have + more))


def mount_small_disk(path: Path, size: int) -> None:
    """A file system of ``size`` bytes at ``path``, seen by this process alone and gone with it. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    _succeed(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    path.mkdir(exist_ok=True)
    _succeed(libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()))


def _succeed(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def copy_out(source: Path, target: Path) -> None:
    """Save what lies on a small disk before it is gone."""
    shutil.copytree(source, target)


def die_writing(row: int, cut: int | None) -> None:
    """SIGKILL while the ``row``-th row is written, with ``data[:cut]`` of it on the disk."""
    write, count = os.write, 0

    def torn(descriptor: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == row:
            write(descriptor, data[:cut])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = torn  # type: ignore[assignment]


def die_in_step(number: int) -> None:
    """SIGKILL before the tokens of the engine's step ``number`` are read."""
    collect = Engine.collect

    def last(self: Engine) -> Any:
        if self.steps + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self)

    Engine.collect = last  # type: ignore[method-assign]


def fail_forward(number: int, memory: bool) -> None:
    """The engine's step ``number`` fails in the middle of its forward."""
    build = Engine.__init__

    def built(self: Engine, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        break_forward(self.runner, number, memory)

    Engine.__init__ = built  # type: ignore[method-assign]


def break_forward(runner: ModelRunner, number: int, memory: bool) -> Callable[[], None]:
    """Let ``runner``'s forward ``number`` fail in its second layer: out of memory, for real, or with another error.

    What is returned mends it. Layers run one by one until then, or a step of decodes would have no middle.
    """
    right, step, in_one_call = PagedForward.attention, 0, Stage.in_one_call

    def failing(self: PagedForward, layer: int, *given: Any) -> torch.Tensor:
        nonlocal step
        if self.cache is runner.cache:
            step += layer == 0
            if (step, layer) == (number, 1):
                torch.empty(1 << 50 if memory else -1)
        return right(self, layer, *given)

    def mend() -> None:
        PagedForward.attention = right  # type: ignore[method-assign]
        Stage.in_one_call = in_one_call

    PagedForward.attention = failing  # type: ignore[assignment]
    Stage.in_one_call = False
    return mend


def overlook_limits() -> None:
    """What is free is read off the system alone: the limits of the process are met where they are exceeded."""
    memory.process_room = list


def let_allocations_fail() -> None:
    """An allocation that fails is not turned into a sentence."""
    engines.refuse_out_of_memory = lambda sentence: nullcontext()  # type: ignore[assignment, return-value]


def write_rows_before_events() -> None:
    """The order of writing is the wrong one: a row goes to the disk before its events."""
    add, flush = RunDir.add, RunDir.flush

    def added(self: RunDir, row: Row) -> None:
        add(self, row)
        flush(self)

    RunDir.add = added  # type: ignore[method-assign]
    RunDir.flush = lambda self: None  # type: ignore[method-assign]
    directory.FLUSH_S = float("inf")


def wait_for_rows() -> None:
    """The batch goes on only when the row of a result is on the disk, so that what fills the disk is no race."""
    put = RowWriter.put

    def put_and_wait(self: RowWriter, result: JobResult) -> None:
        before = len(self._directory.rows)
        put(self, result)
        while self._thread.is_alive() and self.error is None and len(self._directory.rows) == before:
            time.sleep(0.01)
        self.check()

    RowWriter.put = put_and_wait  # type: ignore[method-assign]


def leave_torn_lines() -> None:
    """A torn last line is not cut off."""
    directory.mend_tail = lambda path: False


def skip_torn_lines() -> None:
    """Nor complained about: lines that are not JSON are passed over."""
    leave_torn_lines()
    RunDir._load = _load_those(lambda line, before: None)  # type: ignore[assignment]


def accept_torn_lines() -> None:
    """A torn line that still says whose row it is counts as that row."""
    leave_torn_lines()

    def guess(line: bytes, before: Row) -> Row | None:
        found = re.match(rb'{"id": "(.+?)".*"mode": "(.+?)", "sample": (\d+)', line)
        return found and {**before, "id": found[1].decode(), "mode": found[2].decode(), "sample": int(found[3])}

    RunDir._load = _load_those(guess)  # type: ignore[assignment]


def _load_those(read_torn: Callable[[bytes, Row], Row | None]) -> Callable[[RunDir], None]:
    def load(self: RunDir) -> None:
        for line in (self.path / "rows.jsonl").read_bytes().splitlines():
            row = directory._parse(line) or read_torn(line, self.rows[-1])
            if row is not None:
                self.rows.append(cast(Row, row))

    return load


def hear_interrupts() -> None:
    """A runner in the background ignores SIGINT and hands that down; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def signal_itself(where: str, number: int, times: int = 1, swallow: bool = False) -> None:
    """At the first call of ``module:function`` the process is sent a signal; a library may swallow what it raises."""

    def signalled() -> None:
        for _ in range(times):
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                if not swallow:
                    raise

    _before(where, signalled)


def raise_at(where: str) -> None:
    """The first call of ``module:function`` fails with an error that nobody foresaw."""

    def raising() -> None:
        raise ValueError("shapes")

    _before(where, raising)


def _before(where: str, act: Callable[[], None]) -> None:
    """Do ``act`` before the first call of ``module:function``."""
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for one in owners:
        owner = getattr(owner, one)
    original, done = getattr(owner, name), False

    def first(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if not done:
            done = True
            act()
        return original(*args, **kwargs)

    setattr(owner, name, first)


def replace_stream(number: int, path: str | None) -> None:
    """The standard stream ``number`` is ``path``; None: it is closed."""
    os.close(number)
    if path is not None:
        assert os.open(path, os.O_WRONLY) == number


def lose_reader(number: int) -> None:
    """Nobody reads what goes to the standard stream ``number``."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)
