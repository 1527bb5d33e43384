"""A backend that writes what it is told to: for every node its phases' texts, in pieces, one piece a step.

It makes no tokens and holds no KV, so that a run of it shows what the solver does by itself, without torch.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rrm_engine.errors import NoRoom
from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import Conclusion, EndReason, Limits, Phase
from rrm_engine.protocol.style import load_style
from rrm_engine.protocol.thinking import DEFAULT
from rrm_engine.runs.events import Transcript
from rrm_engine.solver.backend import Begun, Capabilities, Continuation, Costs, Opening, Waited, Written
from rrm_engine.solver.events import Events
from rrm_engine.solver.loop import run_jobs
from rrm_engine.solver.result import Job, JobResult
from rrm_engine.solver.runtime import Runtime

Pieces = Sequence[str | Exception]


@dataclass(frozen=True)
class Text:
    """What a node writes in a phase, and how that ends: ``end`` comes with the last piece; None: it writes no end."""

    pieces: Pieces
    end: EndReason | None = EndReason.EOS


def pieces(text: str, size: int = 5) -> list[str]:
    """``text`` cut every ``size`` characters."""
    return [text[i : i + size] for i in range(0, len(text), size)]


Script = Mapping[str, Sequence[Text]]  # by node the texts of its phases


@dataclass(eq=False)
class ScriptedNode:
    """See `solver.backend.NodeHandle`. ``said`` is all that it was told and wrote, by speaker."""

    path: NodePath
    depth: int
    phases: list[Text]
    said: list[tuple[str, str]]
    begun: Begun = field(default_factory=Begun)
    written: list[str] = field(default_factory=list)
    total: int = 0  # pieces of all phases
    state: str = "running"
    thinking_cut: bool = False

    @property
    def text(self) -> str:
        return "".join(self.written)

    @property
    def length(self) -> int:
        return self.total

    def place(self, at: int) -> object:
        return [*self.said, ("assistant", self.text[:at])]

    def pause(self, at: int) -> None:
        self.state = "paused"
        self.written = [self.text[:at]]

    def halt(self) -> None:
        self.state = "paused" if self.state == "running" else self.state

    def resume(self, continuation: Continuation) -> None:
        del self.phases[0]
        self.said += [("assistant", self.text), ("user", continuation.user)]
        self.written, self.state = [], "running"

    def finish(self) -> Transcript:
        self.state = "finished"
        return Transcript()

    def write(self) -> Written:
        """One more piece; a phase without a text ends at once."""
        phase = self.phases[0] if self.phases else Text([])
        at = len(self.written)
        piece = phase.pieces[at] if at < len(phase.pieces) else ""
        if isinstance(piece, Exception):
            return Written("", self.path, error=piece)
        self.written.append(piece)
        self.total += 1
        end = phase.end if at + 1 >= len(phase.pieces) else None
        if end is not None:
            self.state = "paused"
        return Written("", self.path, piece, end=end, waited=None if at else Waited(0.0))


@dataclass(eq=False)
class ScriptedSession:
    job: str
    rank: int
    script: Script
    no_room: Callable[[NodePath, Opening], bool]
    nodes: dict[str, ScriptedNode] = field(default_factory=dict)

    def open(self, node: NodePath, opening: Opening) -> ScriptedNode:
        if self.no_room(node, opening):
            raise NoRoom(f"{node} has no room")
        before: Any = opening.fork or [("system", opening.system)]
        said = [*before, ("user", opening.user)]
        new = self.nodes[node] = ScriptedNode(node, opening.depth, list(self.script.get(node, ())), said)
        return new

    def keep(self, parent: NodePath, child: NodePath, conclusion: Conclusion) -> None:
        raise AssertionError("it did not say that it joins")

    def costs(self) -> Costs:
        written = sum(node.total for node in self.nodes.values())
        return Costs(forward_decoded=written, total_tokens=written)

    def close(self) -> None:
        for node in self.nodes.values():
            node.finish()


class Scripted:
    """See `solver.backend.Backend`. ``scripts`` are by the job's id; ``fail_at`` is a step that fails as a whole."""

    marks = DEFAULT
    used_blocks = pinned_blocks = offloaded_blocks = 0

    def __init__(self, scripts: Mapping[str, Script], *, forks: bool = False, fail_at: int | None = None) -> None:
        self.capabilities = Capabilities(forks=forks)
        self.scripts = scripts
        self.fail_at = fail_at
        self.no_room: Callable[[NodePath, Opening], bool] = lambda node, opening: False
        self.steps = 0
        self.sessions: list[ScriptedSession] = []

    def opens_thinking(self, phase: Phase) -> bool:
        return False

    def session(self, job: str, rank: int) -> ScriptedSession:
        self.sessions.append(ScriptedSession(job, rank, self.scripts[job.split("/")[0]], self.no_room))
        return self.sessions[-1]

    def step(self) -> Generator[Written, None, None]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise OSError("the line is dead")
        for session in self.sessions:
            for node in [node for node in session.nodes.values() if node.state == "running"]:
                if node.state == "running":  # it may have been ended by what another one wrote
                    written = node.write()
                    written.job = session.job
                    yield written

    def explain(self, error: Exception, job: str) -> str:
        return f"{job}: {error}"

    def ranges(self, name: str, of: Iterable[str] = ()) -> AbstractContextManager[Any]:
        return nullcontext()

    def alive(self) -> list[str]:
        return [node.path for s in self.sessions for node in s.nodes.values() if node.state != "finished"]


def solve(
    backend: Scripted, jobs: Sequence[Job], concurrency: int = 4, style: str = "instruct", **settings: Any
) -> tuple[dict[str, JobResult], list[dict[str, Any]]]:
    """Results by the job's id, and events."""
    context = settings.pop("child_context", "task")
    most = (settings.pop("max_row_tokens", None), settings.pop("max_row_seconds", None))
    runtime = Runtime(backend, load_style(style), Limits(**settings), context, *most)
    heard: list[dict[str, Any]] = []
    found = run_jobs(runtime, jobs, Events(heard.append), concurrency)
    results = {result.job.id: result for result in found if result is not None}
    assert not backend.alive()
    return results, heard
