"""The command: tasks, run directory and solver in, table and exit code out."""

import contextlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrm_engine.bench.flags import (
    DEFAULT_TASKS,
    PROGRAM,
    Options,
    flag,
    parse,
    show,
)
from rrm_engine.bench.summary import summarise
from rrm_engine.bench.table import about_solver, print_closing
from rrm_engine.bench.tasks import TaskSet, load_tasks
from rrm_engine.command import (
    FAILED,
    OK,
    bug,
    check_interrupt,
    guarded,
    interrupted_code,
    interrupts,
    say,
    traceback_of,
    was_interrupted,
)
from rrm_engine.config import Resolved, RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.legible import plural, spelled
from rrm_engine.loading.checkpoint import refuse_damaged
from rrm_engine.runs.directory import ERRORS, RunDir, RunDirError
from rrm_engine.runs.environment import environment, package_version
from rrm_engine.runs.manifest import FORMAT, Manifest, TaskSource
from rrm_engine.trace.profile_reader import PROFILE, SUMMARY, ProfileError

# What records of older versions may leave open, as it was asked.
OPEN_ONCE = ("device", "placement", "attention", "host_kv_blocks")

if TYPE_CHECKING:
    from rich.console import Console

    from rrm_engine.backends.http.solver import HttpSolver
    from rrm_engine.backends.local import Solver

    AnySolver = Solver | HttpSolver


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    return guarded(lambda: _bench(parse(argv)))


def _bench(options: Options) -> int:
    if options.dry_run:
        return dry_run(options)
    return resume_run(options) if options.resume else new_run(options)


def dry_run(options: Options) -> int:
    """What nodes would be told; nothing is written and nothing decoded."""
    tasks = load_tasks(options.tasks or DEFAULT_TASKS)
    from rrm_engine.bench.dry_run import describe

    for line in describe(options.config(), tasks):
        print(line)
    return OK


def new_run(options: Options) -> int:
    """A run from its first row."""
    try:
        config = options.config()
        tasks = load_tasks(options.tasks or DEFAULT_TASKS)
        with closing_unless_begun(RunDir.create(options.out or _default_directory(config, tasks))) as directory:
            solver = _load(config, tasks, _announce(options))
            directory.write_manifest(manifest_of(config, tasks, solver))
            return _run(solver, tasks, config, directory, options)
    except KeyboardInterrupt:
        say("Interrupted before the first row.")
        return interrupted_code()


@contextlib.contextmanager
def closing_unless_begun(directory: RunDir) -> Iterator[RunDir]:
    """Close the directory at the end, and remove it if its run never began."""
    try:
        yield directory
    finally:
        interrupts().ignored = True
        directory.discard()


def resume_run(options: Options) -> int:
    """The rows of a recorded run that are missing."""
    assert options.resume is not None
    with contextlib.closing(RunDir.resume(options.resume)) as directory:
        try:
            return _resume(directory, options)
        except KeyboardInterrupt:
            rows, path = len(directory.rows), shlex.quote(str(directory.path))
            say(f"Interrupted before another row; {plural(rows, 'row')} in {directory.path} are done.")
            say(f"Go on with: {PROGRAM} --resume {path}")
            return interrupted_code()


def _resume(directory: RunDir, options: Options) -> int:
    recorded = directory.manifest
    config = _recorded_config(recorded, directory.path)
    tasks = load_tasks(options.tasks or recorded.tasks.source)
    _refuse_differences(differences(options.given, tasks, recorded), directory.path)
    if options.profile and (directory.path / PROFILE).exists():
        raise RrmError(f"{directory.path} holds a profile already: move its {PROFILE} away, or leave --profile out")
    if directory.cut:
        say("Cut a half-written row off rows.jsonl; it runs again.")
    if not _missing(tasks, config, directory):
        return _close(directory, config, options.quiet)
    # The pools' sizes are read off free memory, which is never twice the same: keep the first run's.
    sizes = {name: recorded.resolved.get(name) or None for name in ("kv_blocks", "host_kv_blocks")}
    pinned = RunConfig(**{**asdict(config), **sizes})
    solver = _load(pinned, tasks, _announce(options))
    found = [*drift(recorded.resolved, solver.resolved), *_sampling_drift(recorded.solver, solver)]
    _refuse_differences(found, directory.path)
    session = {"started": _now(), "command": _command(), **environment()}
    directory.write_manifest(replace(recorded, resumed=[*recorded.resumed, session]))
    return _run(solver, tasks, config, directory, options)


def differences(given: dict[str, Any], tasks: TaskSet, recorded: Manifest) -> list[str]:
    """What was asked for now and differs from the recorded run, each as a phrase."""
    settings = recorded.settings
    found = [
        f"{flag(name)} is {show(value)}, was {show(settings[name])}"
        for name, value in given.items()
        if show(value) != show(settings[name])
    ]
    if tasks.sha256 != recorded.tasks.sha256:
        found.append(f"the tasks of {tasks.source} are not those of the recorded {recorded.tasks.name}")
    return found


def drift(recorded: dict[str, Any], resolved: Resolved) -> list[str]:
    """Where the same settings come out as others here: another device, another default.

    What an older version left open in its record is no difference.
    """
    return [
        f"{flag(f.name)} comes out as {show(value)}, was {show(recorded[f.name])}"
        for f in fields(RunConfig)
        if f.name in recorded
        and not (f.name in OPEN_ONCE and recorded[f.name] in (None, "auto"))
        and show(value := getattr(resolved, f.name)) != show(recorded[f.name])
    ]


def _sampling_drift(recorded: dict[str, Any], solver: "AnySolver") -> list[str]:
    """Phases that would be drawn otherwise than before, for the checkpoint or the style says something else now."""
    now = solver.describe()["sampling"]
    before = recorded.get("sampling", now)
    return [
        f"the {phase} phase samples with {now[phase]}, before with {before[phase]}"
        for phase in now
        if now[phase] != before[phase]
    ]


def _refuse_differences(found: list[str], path: Path) -> None:
    if found:
        raise RrmError(f"{path} was recorded under other settings: {'; '.join(found)}")


def _recorded_config(recorded: Manifest, path: Path) -> RunConfig:
    """The settings of run.json; those that a newer version added keep their defaults."""
    settings = dict(recorded.settings)
    if unknown := settings.keys() - {f.name for f in fields(RunConfig)}:
        raise RrmError(f"{path / 'run.json'} has settings that this version lacks: {', '.join(sorted(unknown))}")
    for f in fields(RunConfig):
        settings.setdefault(f.name, f.default)
    return RunConfig(**{**settings, "modes": tuple(settings["modes"])})


def _load(config: RunConfig, tasks: TaskSet, announce: Callable[[str], None]) -> "AnySolver":
    """The solver for the chosen tasks."""
    if config.backend != "local":
        return _load_servers(config, announce)
    announce(f"Loading {config.model} ...")  # torch and transformers alone take seconds
    refuse_damaged(config.model)
    from rrm_engine.backends.local import Solver

    solver = Solver.load(config, [task.problem for task in tasks.chosen(config.limit, config.shard)], announce)
    check_interrupt()
    return solver


def _load_servers(config: RunConfig, announce: Callable[[str], None]) -> "HttpSolver":
    try:
        from rrm_engine.backends.http.solver import HttpSolver
    except ImportError as error:
        if error.name not in ("openai", "httpx2"):
            raise
        needs = f"--backend {config.backend} needs the package {error.name}: pip install 'rrm-engine[servers]'"
        raise RrmError(needs) from error
    return HttpSolver(config, announce)


def _run(solver: "AnySolver", tasks: TaskSet, config: RunConfig, directory: RunDir, options: Options) -> int:
    """The missing rows, then the closing table, however it ended."""
    from rrm_engine.bench.progress import make_display
    from rrm_engine.bench.run import execute

    console, quiet = _console(stderr=True), options.quiet
    if not quiet:
        _print_header(console, solver, tasks, config, directory)
    try:
        jobs = _missing(tasks, config, directory)
        with _profiled(solver, directory, options):
            execute(solver, jobs, tasks.chosen(config.limit, config.shard), directory, make_display(console, quiet))
            if options.profile and not quiet:
                say("Writing the profile ...")
        solver.close()
        interrupts().ignored = True
    except (Exception, KeyboardInterrupt) as error:
        interrupts().ignored = True
        return _broken_off(error, tasks, config, directory, quiet)
    return _close(directory, config, quiet)


def _broken_off(error: BaseException, tasks: TaskSet, config: RunConfig, directory: RunDir, quiet: bool) -> int:
    """Say why a run ended early, and close it; the exit code."""
    interrupted = was_interrupted(error)
    if isinstance(error, RrmError):
        say(f"error: {error}")
    elif not interrupted:
        directory.log_error("the run", traceback_of(error))
        say(f"error: {bug(error)}; its traceback is in {directory.path / ERRORS}")
    whole = isinstance(error, ProfileError) and not _missing(tasks, config, directory)
    _close(directory, config, quiet, broken=None if whole else error)
    if isinstance(error, RunDirError):
        with contextlib.suppress(RunDirError):  # it has been said
            directory.close()
    return interrupted_code() if interrupted else FAILED


def _profiled(solver: "AnySolver", directory: RunDir, options: Options) -> contextlib.AbstractContextManager[Any]:
    if options.profile is None:
        return contextlib.nullcontext()
    return solver.profile(directory.path, options.profile, session=directory.session)


def _missing(tasks: TaskSet, config: RunConfig, directory: RunDir) -> list[Any]:
    from rrm_engine.bench.run import plan

    return plan(tasks.chosen(config.limit, config.shard), config, directory.rows)


def _close(directory: RunDir, config: RunConfig, quiet: bool, broken: BaseException | None = None) -> int:
    """summary.json, the table, where everything lies and, if the run broke off, how to go on. Takes no time."""
    interrupts().ignored = True
    summary = summarise(directory.rows)
    unwritten = None
    try:
        directory.write_summary(summary)
    except RunDirError as error:  # a full disk must not cost the table
        unwritten = error
    console = _console()
    print_closing(console, summary, directory.rows, config.task_concurrency)
    files = ["run.json", "rows.jsonl", "trace.jsonl", "summary.json"]
    files += [name for name in (PROFILE, SUMMARY, ERRORS) if (directory.path / name).exists()]
    path, lines = shlex.quote(str(directory.path)), [f"Written to {directory.path}: {', '.join(files)}"]
    if any(row["mode"] == "rrm" for row in directory.rows):
        lines.append(f"Where the time went: python -m rrm_engine.trace {path} (--plot FILE: as a picture)")
    if broken:
        lines.append(f"Go on with: {PROGRAM} --resume {path}{' --quiet' if quiet else ''}")
    console.print(*map(spelled, lines), sep="\n", markup=False, highlight=False, soft_wrap=True)
    if unwritten and not isinstance(broken, RunDirError):  # else one has been said
        say(f"error: {unwritten}")
    return FAILED if summary["errors"] or unwritten else OK


def manifest_of(config: RunConfig, tasks: TaskSet, solver: "AnySolver") -> Manifest:
    """run.json: what was asked, what it came out as, and where it ran."""
    used = len(tasks.chosen(config.limit, config.shard))
    return Manifest(
        format=FORMAT,
        started=_now(),
        command=_command(),
        seed=config.seed,
        tasks=TaskSource(tasks.name, tasks.source, tasks.sha256, len(tasks.tasks), used),
        settings=asdict(config),
        resolved=asdict(solver.resolved),
        solver=solver.describe(),
        **environment(),
    )


def _print_header(
    console: "Console", solver: "AnySolver", tasks: TaskSet, config: RunConfig, directory: RunDir
) -> None:
    """What runs, on what, and where to."""
    chosen, done = len(tasks.chosen(config.limit, config.shard)), len(directory.rows)
    rows = chosen * config.samples * len(config.modes)
    what = f"{tasks.name}: {plural(chosen, 'task')} x {plural(config.samples, 'sample')} x {' + '.join(config.modes)}"
    lines = [
        f"rrm-engine {package_version()}   {what}: {plural(rows, 'row')}" + (f", {done} of them done" if done else ""),
        *about_solver(solver.describe()),
        f"to {directory.path}",
        *filter(None, [tasks.ungraded(config.limit, config.shard)]),
    ]
    console.print(*map(spelled, lines), sep="\n", markup=False, highlight=False)


def _default_directory(config: RunConfig, tasks: TaskSet) -> Path:
    """``runs/<time>-<model>-<tasks>``, followed by a number if that is taken."""
    model = config.model.rstrip("/").rsplit("/", 1)[-1]
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(model)}-{_slug(tasks.name)}"
    path, number = Path("runs") / name, 2
    while path.exists():
        path, number = Path("runs") / f"{name}-{number}", number + 1
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "x"


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def _announce(options: Options) -> Callable[[str], None]:
    """Where the memory plan goes, before the weights are loaded."""
    return (lambda text: None) if options.quiet else say


def _command() -> str:
    return shlex.join([*PROGRAM.split(), *sys.argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
