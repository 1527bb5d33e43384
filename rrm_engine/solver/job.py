"""One job on the engine: carries out the graph machine's commands and tells it what the nodes wrote."""

import hashlib
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import Any

from rrm_engine.backends.join import Joiner
from rrm_engine.backends.runtime import Runtime
from rrm_engine.backends.shadow import Shadows
from rrm_engine.engine.engine import NoRoom, Sampled
from rrm_engine.engine.sequence import State, Stop
from rrm_engine.errors import RrmError
from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.types import (
    Cancel,
    Command,
    Conclusion,
    EndReason,
    Finish,
    Pause,
    Phase,
    Resume,
    Start,
    Status,
)
from rrm_engine.graph.types import Stop as StopNode
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.events import Atomic, Done, Malformed, ParsedEvent
from rrm_engine.protocol.parser import EventParser
from rrm_engine.solver.events import Events
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.node import Grammar, NodeRun, PhasePlan
from rrm_engine.solver.outcome import outcome
from rrm_engine.solver.result import Job, JobResult

PREVIEW = 200  # characters of the prompt kept in a row


class JobRun:
    """Drives one job. The engine's loop calls ``on_token`` for each new token of its sequences."""

    def __init__(self, runtime: Runtime, job: Job, index: int, events: Events, *, texts: bool = False) -> None:
        self.runtime = runtime
        self.job = job
        self.index = index
        self.result: JobResult | None = None
        self.peak_blocks = 0
        self.nodes: dict[str, NodeRun] = {}
        self._tell = events
        self._texts = texts
        self._meter = Meter(monotonic())
        self._joiner = Joiner(runtime.engine, runtime.chat, runtime.join)
        self._shadows = Shadows(runtime.engine, runtime.join.report)
        self._by_key: dict[str, NodeRun] = {}
        self._commands: deque[Command] = deque()
        self._repairs: Counter[str] = Counter()
        self._errors: list[str] = []
        self._without_room = 0  # nodes that did not fit into a sequence
        self._boundary: int | None = None  # end of the event being handled, in its node's text
        self._prompt = ""
        self._events = 0
        self._traceback: str | None = None
        self.machine: GraphMachine | None = None
        if job.mode == "rrm":
            self.machine = GraphMachine(job.task, runtime.limits, child_context=runtime.child_context)

    def start(self) -> None:
        """Begin. Whatever goes wrong here or in ``on_token`` is the end of this job and of no other."""
        with self._own_errors():
            self._start_root()

    def on_token(self, sampled: Sampled) -> None:
        """One of the job's sequences has a new token. Nothing more is done with it once the job is over."""
        with self._own_errors():
            if self.result is None:
                self._take(sampled)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """An error in the block fails the job, unless it is one of the caller's callback."""
        try:
            yield
        except Exception as error:
            if error is self._tell.error:
                raise
            self.fail(error, str(error) if isinstance(error, RrmError) else f"{type(error).__name__}: {error}")

    def _start_root(self) -> None:
        _refuse_surrogates(self.job.task)
        self._emit("job", "root", t=self._meter.started_at, mode=self.job.mode, task=self.job.task)
        with self.runtime.engine.ranges("graph", (f"{self.job.key}:root",)):
            if self.machine is not None:
                self._carry_out(self.machine.start())
            else:
                self._carry_out([Start("root", Phase.DIRECT, self.job.task)])

    def _take(self, sampled: Sampled) -> None:
        if sampled.error is not None:
            raise sampled.error
        if self._shadows.on_token(sampled):
            return
        node = self._by_key[sampled.sequence.key]
        now, step = monotonic(), self.runtime.engine.steps
        self._meter.token(node.path, now, is_child="." in node.path)
        if node.running and not node.ends:
            self._emit("first_token", node.path, queued_s=_queued_s(node.ready, sampled.sequence.admitted))
        elif node.running and step - node.last[1] > 1:  # others had its place or its memory
            admitted_t, admitted_step = sampled.sequence.admitted
            began = admitted_t if admitted_step > node.last[1] else self.runtime.engine.began
            self._emit("readmitted", node.path, queued_s=began - node.last[0], ran_s=now - began)
        node.last = (now, self.runtime.engine.launched)
        token = None if sampled.stop is Stop.EOS else sampled.token
        piece = node.wrote(token, last=sampled.stop is not None)
        if self._texts and piece:
            self._emit("text", node.path, text=piece)
        turn = node.turn
        if node.parser is not None and piece:
            self._read(node, node.parser.feed(piece))
        if sampled.stop is not None and node.running and node.turn == turn:
            self._ended(node, sampled.stop)

    @property
    def shadow_blocks(self) -> int:
        """Blocks in use that are none of the job's own: what measures splices holds them."""
        return self._shadows.blocks

    def release(self) -> None:
        """End every sequence of this job, also one that an interrupted command had not noted down yet."""
        for sequence in self.runtime.engine.sequences:
            if sequence.key.rpartition(":")[0] == self.job.key:
                self.runtime.engine.finish(sequence)

    def fail(self, error: Exception, reason: str) -> None:
        """End the job with an error; the traceback of one that is a bug goes into the result."""
        if self.result is not None:
            return
        if not isinstance(error, RrmError):
            self._traceback = "".join(traceback.format_exception(error))
        try:
            self.cancel(reason)
        except Exception as second:
            if second is self._tell.error:
                raise
        if self.result is None:  # the job's own books are broken: it cannot even be cancelled as others are
            self.release()
            latency = monotonic() - self._meter.started_at
            self.result = JobResult(self.job, Status.FAILED, "", latency, error=reason, traceback=self._traceback)
            self._emit("finish", "root", status=Status.FAILED, answer="", events=self._events + 1)

    def cancel(self, reason: str) -> None:
        """End the job wherever it is; its blocks are free when this returns."""
        if self.result is not None:
            return
        self.release()
        self._commands.clear()  # one that an exception interrupted must not block those that follow
        self._errors.append(reason)
        if self.machine is not None:
            self._carry_out(self.machine.cancel(reason))
        else:
            self._carry_out([Cancel("root", reason), Finish(Status.FAILED, "", reason)])

    # what nodes wrote

    def _read(self, node: NodeRun, items: Iterable[ParsedEvent | Malformed]) -> None:
        """Hand events to the machine until the node has been paused or is over: what follows is discarded."""
        turn = node.turn
        for item in items:
            if not node.running or node.turn != turn:
                return
            with self.runtime.engine.ranges("graph", (node,)):
                self._handle(node, item)

    def _handle(self, node: NodeRun, item: ParsedEvent | Malformed) -> None:
        """Tell the machine of one event and do what it answers."""
        assert self.machine is not None
        node.events.append((item.start, item.end))
        if isinstance(item, Malformed):
            self._emit("malformed", node.path, reason=item.reason, text=item.text[:PREVIEW])
            self._carry_out(self.machine.on_malformed(node.path, item))
            return
        kind = type(item.event).__name__.lower()
        self._repairs.update(item.repairs)
        self._boundary = item.end
        known = len(self.machine.nodes)
        # The text before it matters only where the node may be done with it.
        needed = isinstance(item.event, (Atomic, Done))
        text = self._visible(node, node.text(item.start)) if needed else None
        commands = self.machine.on_event(node.path, item.event, text)
        child = None
        if len(self.machine.nodes) > known:
            child = list(self.machine.nodes)[-1]
            self._remember_fork(node, child)
        made = {"child": child} if kind == "child" else {}  # None: refused
        self._emit("event", node.path, kind=kind, **asdict(item.event), **made, repairs=item.repairs)
        self._carry_out(commands)
        self._boundary = None

    def _ended(self, node: NodeRun, stop: Stop) -> None:
        if node.parser is not None:
            turn = node.turn
            self._read(node, node.parser.close())
            if not node.running or node.turn != turn:
                return
        with self.runtime.engine.ranges("graph", (node,)):
            self._halt(node, stop.value)
            text = self._visible(node, node.text())
            if self.machine is not None:
                self._carry_out(self.machine.on_end(node.path, EndReason(stop.value), text))
            else:
                self._carry_out([StopNode(node.path, Conclusion("root", text)), Finish(Status.ATOMIC, text)])

    def _remember_fork(self, parent: NodeRun, child: str) -> None:
        keep, cut = self._split(parent)
        parent.forks[child] = (keep, cut, self._meter.clocks[parent.path].depth)

    # what the machine wants

    def _carry_out(self, commands: Iterable[Command]) -> None:
        """Execute commands in order; a command that fails may put more of them behind."""
        busy = bool(self._commands)
        self._commands.extend(commands)
        while self._commands and not busy:
            match self._commands[0]:
                case Start() as command:
                    self._start(command)
                case Resume() as command:
                    self._resume(command)
                case Pause(node=path):
                    self._pause(self.nodes[path])
                case StopNode(node=path, conclusion=conclusion):
                    self._keep(path, conclusion)
                    self._close(path, "concluded", answer=conclusion.answer, ok=conclusion.ok)
                case Cancel(node=path, reason=reason):
                    self._close(path, "cancelled", reason=reason)
                case Finish() as command:
                    self._finish(command)
            self._commands.popleft()

    def _start(self, command: Start) -> None:
        runtime, plan = self.runtime, self.runtime.plans[command.phase]
        fork = None
        given = self._dependencies(command.node)
        after = [self._meter.clocks[path].depth for path in given]
        if command.parent is not None:
            parent = self.nodes[command.parent]
            keep, cut, depth = parent.forks[command.node]
            after.append(depth)
        values: dict[str, Any] = {
            "task": command.task,
            "given": command.given,
            "depth_left": runtime.limits.max_depth - command.depth,
        }
        if command.fork:
            user = runtime.style.user("fork", id=command.node.rpartition(".")[2], **values)
            turn = runtime.chat.turn(user, plan.thinking, **self._so_far(parent))
            tokens = [*parent.sequence.tokens[:keep], *cut, *turn]
            fork, turns = (parent.sequence, keep), parent.user_turns + 1
        else:
            system = runtime.style.system("direct" if command.phase is Phase.DIRECT else "recursive")
            user = runtime.style.user(command.phase.value, max_width=runtime.limits.max_width, **values)
            tokens, turns = runtime.chat.opening(system, user, plan.thinking), 1
        self._prompt = self._prompt or system + "\n" + user
        key = f"{self.job.key}:{command.node}"
        grammar = self._grammar(plan, command.node)
        try:
            sequence = runtime.engine.submit(
                key,
                tokens,
                plan.budget,
                plan.sampling,
                root=self.index,
                depth=command.depth,
                matcher=plan.match(grammar),
                fork_of=fork,
            )
        except RrmError as error:
            self._no_room(command.node, error)
            return
        parser = self._parser(plan) if self.machine and command.phase is not Phase.DIRECT else None
        detokenizer = Detokenizer(runtime.tokenizer)
        node = NodeRun(command.node, sequence, command.phase, parser, detokenizer, first=len(tokens), user_turns=turns)
        self.nodes[node.path] = self._by_key[key] = node
        self._meter.start(node.path, monotonic(), after)
        node.ready = (monotonic(), runtime.engine.launched)
        about = {"phase": command.phase, "after": given, "prompt_tokens": len(tokens), "task": command.task}
        self._emit("start", node.path, **about, **plan.recorded(grammar))

    def _resume(self, command: Resume) -> None:
        runtime, plan = self.runtime, self.runtime.plans[command.phase]
        node = self.nodes[command.node]
        kind = "solve" if command.phase is Phase.SOLVER else "resume"
        assert self.machine is not None
        task = self.machine.nodes[node.path].task

        def render(conclusions: Iterable[Conclusion]) -> str:
            values: dict[str, Any] = {"notes": command.notes, "rule": command.rule}
            return runtime.style.user(kind, task=task, conclusions=conclusions, **values)

        behind = {
            "closed": self._closed(node),
            "turns": node.user_turns,
            "system": bool(runtime.style.system("recursive")),
        }
        turn, splices = self._joiner.turn(node, command.conclusions, render, plan.thinking, behind)
        tokens = [*node.cut, *turn]
        splices = [(at + len(node.cut), span) for at, span in splices]
        grammar = self._grammar(plan, node.path)
        base = len(node.sequence.tokens)
        try:
            matcher = plan.match(grammar)
            runtime.engine.resume(node.sequence, tokens, plan.budget, plan.sampling, matcher, splices)
        except RrmError as error:
            self._no_room(node.path, error)
            return
        if splices:
            self._shadows.follow(node.path, node.sequence)
        node.enter(command.phase, self._parser(plan), Detokenizer(runtime.tokenizer))
        after = [f"{node.path}.{c.id}" for c in command.conclusions]
        self._meter.resume(node.path, monotonic(), after)
        node.ready = (monotonic(), runtime.engine.launched)
        spliced = [(base + at, base + at + len(span)) for at, span in splices]
        about = {"phase": command.phase, "after": after, "appended_tokens": len(tokens), "notes": command.notes}
        about |= {"spliced": spliced}  # unless memory runs out before they are attached
        self._emit("resume", node.path, **about, **plan.recorded(grammar))

    def _pause(self, node: NodeRun) -> None:
        """Stop right behind the event just read; a token that goes on behind it is replaced by its kept part."""
        self._shadows.end(node.path)  # it shares blocks that waiting may move or give up
        if node.sequence.state is not State.PAUSED:
            self.runtime.engine.pause(node.sequence)
        keep, node.cut = self._split(node)
        self.runtime.engine.truncate(node.sequence, keep)
        self.runtime.engine.wait(node.sequence)
        self._halt(node, "await")

    def _halt(self, node: NodeRun, reason: str) -> None:
        self._shadows.end(node.path)
        if not node.running:
            return
        node.running = False
        node.reasons.append(reason)
        node.phases.append(node.phase)
        self._count_thinking(node, reason)
        node.sampled.append((node.first, len(node.sequence.tokens)))
        self._meter.pause(node.path, monotonic())
        self._emit("pause", node.path, reason=reason)

    def _close(self, path: str, how: str, **fields: Any) -> None:
        """A node is over, by conclusion or cancellation: give its blocks back."""
        node = self.nodes.get(path)
        if node is None:  # it never got a sequence
            self._emit(how, path, **fields)
            return
        self._halt(node, how)
        self.runtime.engine.finish(node.sequence)
        reports = [asdict(report) for report in self._shadows.reports if report.node == path]
        fields |= {"spliced": node.sequence.spliced, "splice_report": reports}
        counters = asdict(node.sequence.counters)
        self._emit(how, path, **fields, counters=counters, token_ids=list(node.sequence.tokens), sampled=node.sampled)

    def _keep(self, path: str, conclusion: Conclusion) -> None:
        """A node that has concluded still has its KV; its parent may want some of it."""
        node, parent = self.nodes.get(path), self.nodes.get(path.rpartition(".")[0])
        if node is not None and parent is not None and parent.sequence.state is not State.FINISHED:
            self._joiner.keep(parent, node, conclusion)

    def _no_room(self, path: str, error: RrmError) -> None:
        """A node that the engine does not take, mostly for its length, has failed; whoever waits for it is told."""
        self._errors.append(str(error))
        long = isinstance(error, NoRoom)
        self._without_room += long
        self._emit("no_room", path, reason=str(error))
        if self.machine is not None:
            self._commands.extend(self.machine.on_end(path, EndReason.CONTEXT if long else EndReason.ERROR, ""))
        else:
            self._commands.append(Finish(Status.FAILED, "", str(error)))

    def _finish(self, command: Finish) -> None:
        if self.machine is not None:
            self._repairs.update(self.machine.repairs)
        self.result = outcome(
            self.job,
            command,
            self.nodes.values(),
            self._meter,
            self._joiner.as_text,
            self._shadows.reports,
            self.machine,
            self._without_room,
            peak_kv_blocks=self.peak_blocks,
            prompt_sha256=hashlib.sha256(self._prompt.encode()).hexdigest(),
            prompt_preview=self.job.task[:PREVIEW],
            repairs=dict(self._repairs),
            error=self._error(command),
            traceback=self._traceback,
        )
        ended = self._meter.started_at + self.result.latency_s
        about = {"status": command.status, "answer": command.answer, "events": self._events + 1}
        self._emit("finish", "root", t=ended, **about)

    # small things

    def _error(self, finish: Finish) -> str | None:
        """What went wrong, if the run failed. A model that finds no answer is no error; a task that has no room is."""
        if finish.status in (Status.FAILED, Status.INVALID) and self._errors:
            return "; ".join(self._errors)
        return finish.error if finish.status is Status.FAILED else None

    def _split(self, node: NodeRun) -> tuple[int, list[int]]:
        """Where in the node's tokens the event just read ends."""
        assert self._boundary is not None
        return node.split(self._boundary, self.runtime.chat.encode)

    def _grammar(self, plan: PhasePlan, path: str) -> Grammar | None:
        """What ``plan.matcher`` takes for a node's next phase; it may split only where the machine would accept it."""
        if plan.matcher is None or self.machine is None:
            return None
        node, limits = self.machine.nodes[path], self.runtime.limits
        room = limits.max_nodes - len(self.machine.nodes)
        splits = node.depth < limits.max_depth and node.awaits < limits.max_awaits and room >= limits.max_width
        return len(node.children), splits

    def _dependencies(self, path: str) -> list[str]:
        if self.machine is None:
            return []
        found = [d.path for d in self.machine.nodes[path].dependencies.values() if d is not None]
        return [p for p in found if p in self._meter.clocks]

    def _so_far(self, node: NodeRun) -> dict[str, Any]:
        """What `ChatFormat.turn` asks about the conversation that a node's context is."""
        return {"turns": node.user_turns, "system": bool(self.runtime.style.system("recursive"))}

    def _closed(self, node: NodeRun) -> bool:
        """Whether the end of the node's turn stands there, as the template writes it.

        An end of sequence that the template has no use for, or writes something before, is taken back.
        """
        engine, sequence = self.runtime.engine, node.sequence
        if node.cut or sequence.tokens[-1] not in engine.eos_ids:
            return False
        if self.runtime.chat.closes_with(sequence.tokens[-1]):
            return True
        engine.truncate(sequence, len(sequence.tokens) - 1)
        node.sampled[-1] = (node.first, len(sequence.tokens))
        return False

    def _count_thinking(self, node: NodeRun, reason: str) -> None:
        """Note in the row where thinking was ended for it, or took all the tokens there were."""
        if getattr(node.sequence.matcher, "cut", False):
            self._repairs["thinking_cut"] += 1
        opened = self.runtime.chat.opens_thinking(self.runtime.plans[node.phase].thinking)
        by_itself = reason in set(EndReason)
        if by_itself and self.runtime.chat.marks.unfinished("".join(node.pieces), opened):
            self._repairs["thinking_unfinished"] += 1

    def _parser(self, plan: PhasePlan) -> EventParser:
        chat = self.runtime.chat
        return EventParser(chat.opens_thinking(plan.thinking), chat.marks)

    def _visible(self, node: NodeRun, text: str) -> str:
        """``text``, from the beginning of the node's phase on, without its thinking."""
        chat = self.runtime.chat
        return chat.marks.visible(text, chat.opens_thinking(self.runtime.plans[node.phase].thinking))

    def _emit(self, event: str, node: str, **fields: Any) -> None:
        self._events += 1
        if not self._tell.wanted:
            return
        engine, run = self.runtime.engine, self.nodes.get(node)
        if event != "text":  # one a token, and counting takes time
            fields |= {"pinned": engine.pinned_blocks, "offloaded": engine.offloaded_blocks}
        self._tell(
            {
                "t": monotonic(),
                "job": self.job.key,
                "node": node,
                "step": engine.steps,
                "event": event,
                "tokens": len(run.sequence.tokens) if run else 0,
                "blocks": engine.used_blocks,
                **fields,
            }
        )


def _refuse_surrogates(task: str) -> None:
    """Half of a UTF-16 pair is no text; whoever reads JSON or file names may have one in a str all the same."""
    try:
        task.encode()
    except UnicodeEncodeError as error:
        raise RrmError(
            f"the task is no text: its character {error.start + 1}, {task[error.start]!a}, is half of a surrogate pair"
        ) from None


def _queued_s(ready: tuple[float, int], admitted: tuple[float, int]) -> float:
    """How long a phase waited for the step that admitted it; nothing if that was the first one it could be in."""
    return admitted[0] - ready[0] if admitted[1] > ready[1] + 1 else 0.0
