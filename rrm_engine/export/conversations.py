"""Recorded nodes as conversations, and of each of their tokens who wrote it."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.export.writers import MODEL, Words, Written
from rrm_engine.graph.paths import NodePath
from rrm_engine.legible import legible, legible_key
from rrm_engine.protocol.events import Child, ParsedEvent
from rrm_engine.protocol.parser import EventParser
from rrm_engine.protocol.thinking import DEFAULT, KNOWN
from rrm_engine.runs.arms import Arm, Run, Sample
from rrm_engine.runs.events import Concluded, Started, WroteChild
from rrm_engine.runs.reader import read_jobs, timeline
from rrm_engine.runs.rows import row_key
from rrm_engine.runs.timeline import Incomplete, JobTrace, Stretch
from rrm_engine.runs.trust import Trust

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows, ``jobs`` by their keys, and which of their nodes: with ``planners`` only those that made children."""

    jobs: Collection[str]
    labels: Collection[str]
    modes: Collection[str]
    clean: bool
    planners: bool

    def takes(self, sample: Sample, trust: Trust) -> bool:
        if row_key(sample.row) not in self.jobs:
            return False
        return trust.label in self.labels and sample.mode in self.modes and not (self.clean and trust.marks)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A node: what it was told and wrote. ``token_ids`` are those of its sequence, [] where a server gave none;
    ``spans`` are (start, stop, who) and cover them.
    """

    run: str
    job: str
    node: str
    sample: Sample
    trust: Trust
    task: str
    answer: str
    messages: list[Message]
    token_ids: list[int] = field(default_factory=list)
    spans: list[Written] = field(default_factory=list)

    @property
    def written(self) -> list[int]:
        """1 for each token that the model chose, 0 for the others."""
        return [int(who == MODEL) for start, stop, who in self.spans for _ in range(start, stop)]

    def as_json(self) -> dict[str, Any]:
        row = self.sample.row
        tokens = {"input_ids": self.token_ids, "assistant_masks": self.written, "spans": list(map(list, self.spans))}
        return {
            "run": self.run,
            "id": row["id"],
            "mode": row["mode"],
            "sample": row["sample"],
            "node": self.node,
            "label": str(self.trust.label),
            "marks": list(map(str, self.trust.marks)),
            "task": self.task,
            "answer": self.answer,
            "messages": self.messages,
            **(tokens if self.token_ids else {}),
        }


def conversations(
    arms: Sequence[Arm], choice: Choice, model: str | None = None, trust_remote_code: bool = False
) -> list[Conversation]:
    """The nodes chosen that came to an answer. ``model`` is where the runs' model is now, if it has been moved.

    Raises RrmError where no row is chosen, a trace is not whole or has no texts, or a tokenizer cannot be had.
    """
    found = []
    for arm in arms:
        chosen = [(sample, trust) for sample, trust in arm.trusted if choice.takes(sample, trust)]
        for run in arm.runs:
            own = {row_key(sample.row): (sample, trust) for sample, trust in chosen if sample.run is run}
            found += list(_of_run(run, own, choice, model, trust_remote_code)) if own else []
    if not found:
        there = Counter(str(trust.label) for arm in arms for _, trust in arm.trusted)
        told = ", ".join(f"{label} {count:,}" for label, count in there.most_common())
        what = " or ".join(choice.labels)
        raise RrmError(
            f"no row is to be exported: --labels {what} chooses none that --jobs, --modes and --clean keep ({told})"
        )
    return found


def _of_run(
    run: Run, rows: dict[str, tuple[Sample, Trust]], choice: Choice, model: str | None, trust_remote_code: bool
) -> Iterator[Conversation]:
    used, words = run.manifest.resolved, None
    forks = used.get("child_context") == "parent"
    for job in read_jobs(run.path, list(rows)):
        if job.key not in rows:
            continue
        try:
            trace = timeline(job)
        except Incomplete as error:
            raise RrmError(f"{run.path}: the trace of {legible_key(job.key)} is not whole: {error}") from None
        sample, trust = rows[job.key]
        planners = {NodePath(e.child).parent for e in trace.events if isinstance(e, WroteChild) and e.child}
        for path in trace.nodes:
            end, begins = trace.end(path), trace.real(path)
            if not isinstance(end, Concluded) or not end.ok or not begins or (choice.planners and path not in planners):
                continue
            ids = end.transcript.token_ids if end.transcript else []
            if ids and words is None:
                words = Words(model or str(used.get("tokenizer") or used.get("model")), used, trust_remote_code)
            started = trace.beginning(begins[0])
            yield Conversation(
                run=str(run.path),
                job=job.key,
                node=path,
                sample=sample,
                trust=trust,
                task=started.task if isinstance(started, Started) else "",
                answer=end.answer,
                messages=_messages(trace, path, forks, words),
                token_ids=ids,
                spans=words.spans(trace, path) if words and ids else [],
            )


def _messages(trace: JobTrace, path: str, forks: bool, words: Words | None) -> list[Message]:
    """What stands in the node's context, from the first text on: for a fork, all that its parent knew."""
    stretches = trace.real(path)
    found = _before(trace, path, words) if forks and NodePath(path).parent in trace.nodes else []
    for stretch in stretches:
        found += [*_told(trace, stretch, words), _said("assistant", trace.pause(stretch).text)]
    return found


def _told(trace: JobTrace, stretch: Stretch, words: Words | None) -> list[Message]:
    begin = trace.beginning(stretch)
    system, user = (begin.system, begin.prompt) if isinstance(begin, Started) else ("", begin.appended)
    if not user:
        raise RrmError(
            f"the trace of {legible_key(trace.key)} does not have the texts that {legible(stretch.node)} was given: "
            f"another version recorded it; record the run again"
        )
    if system.strip() and words is not None and not words.chat.has_system_role:
        system, user = "", f"{system.strip()}\n\n{user.strip()}"
    return [*([_said("system", system.strip())] if system.strip() else []), _said("user", user.strip())]


def _before(trace: JobTrace, child: str, words: Words | None) -> list[Message]:
    """What a forked child has of its parent: all up to the end of the event that declared it."""
    parent = str(NodePath(child).parent)
    declared = next(i for i, event in enumerate(trace.events) if isinstance(event, WroteChild) and event.child == child)
    found = _before(trace, parent, words) if NodePath(parent).parent in trace.nodes else []
    for stretch in trace.real(parent):
        text = trace.pause(stretch).text
        if stretch.begin < declared < stretch.end:
            return [
                *found,
                *_told(trace, stretch, words),
                _said("assistant", text[: _end_of(declared, text, stretch, trace)]),
            ]
        found += [*_told(trace, stretch, words), _said("assistant", text)]
    raise RrmError(f"the trace of {legible_key(trace.key)} does not say when {legible(child)} was declared")


def _end_of(declared: int, text: str, stretch: Stretch, trace: JobTrace) -> int:
    """Where in a phase's ``text``, read again, the event ends that stands at ``declared`` in the trace."""
    earlier = trace.events[stretch.begin : declared]
    number = sum(isinstance(event, WroteChild) and event.node == stretch.node for event in earlier)
    marks = next((marks for marks in KNOWN if marks.close in text), DEFAULT)
    inside = marks.always or (marks.close in text and not 0 <= text.find(marks.open) < text.find(marks.close))
    opens = len(trace.beginning(stretch).opens)
    items = EventParser(inside, marks, opens).feed(text[opens:])
    ends = [item.end for item in items if isinstance(item, ParsedEvent) and isinstance(item.event, Child)]
    if len(ends) <= number:
        raise RrmError(f"{legible(stretch.node)} of {legible_key(trace.key)} declares a child that its text lacks")
    return ends[number]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
