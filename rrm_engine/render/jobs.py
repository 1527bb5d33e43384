"""A job as the page draws it: what each node did when, was told and wrote. Seconds are from the job's beginning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from rrm_engine.analyze.batch import tokens_of, useful
from rrm_engine.graph.paths import NodePath
from rrm_engine.protocol.thinking import KNOWN
from rrm_engine.render.strings import Strings
from rrm_engine.runs.events import Cancelled, Concluded, Paused, Resumed, Started, Wrote, WroteMalformed
from rrm_engine.runs.timeline import NAMES, JobTrace, Stretch
from rrm_engine.trace.attribution import Hop, attribute

Decode = Callable[[Sequence[int]], str]  # token ids to text
KV_OF_RUN = ("run", "pin", "host", "drop")


def drawn(
    trace: JobTrace, strings: Strings, block_size: int, wait_policy: str, decode: Decode | None = None
) -> dict[str, Any]:
    """The time line of a job whose events are whole; ``decode`` gives the texts that its run did not record."""
    return _Drawing(trace, strings, decode).document(block_size, wait_policy)


class _Drawing:
    """One job on its way to the page. Nodes are named by their index, each after its parent."""

    def __init__(self, trace: JobTrace, strings: Strings, decode: Decode | None) -> None:
        self.trace = trace
        self.decode = decode
        self.strings = strings
        self.began = trace.events[0].t
        self.paths = in_order(trace)
        self.index = {path: i for i, path in enumerate(self.paths)}
        self.hops = attribute(trace).hops

    def document(self, block_size: int, wait_policy: str) -> dict[str, Any]:
        used = useful(self.trace)
        return {
            "span": self._at(self.trace.events[-1].t),
            "nodes": [self._node(path, path in used) for path in self.paths],
            "critical": [[self.index[hop.node], _ms(hop.ready_s), _ms(hop.until_s)] for hop in self.hops],
            "kv": self._kv(block_size, wait_policy),
        }

    def _at(self, t: float) -> float:
        return _ms(t - self.began)

    def _node(self, path: str, used: bool) -> dict[str, Any]:
        trace, end = self.trace, self.trace.end(path)
        started = trace.events[trace.nodes[path][0].begin]
        return {
            "path": path,
            "parent": self.index.get(NodePath(path).parent or "", -1),
            "task": started.task if isinstance(started, Started) else None,
            "how": end.EVENT,
            "why": end.reason if isinstance(end, Cancelled) else None,
            "ok": end.ok if isinstance(end, Concluded) else None,
            "answer": end.answer if isinstance(end, Concluded) else None,
            "useful": used,
            "tokens": tokens_of(trace, path),
            "counters": end.transcript.counters if end.transcript else None,
            "waits": [[self._at(trace.events[a].t), self._at(trace.events[b].t)] for a, b in trace.waits(path)],
            "phases": list(self._phases(path)),
        }

    def _phases(self, path: str) -> Iterator[dict[str, Any]]:
        trace, end = self.trace, self.trace.end(path)
        sampled, before = iter(end.transcript.sampled if end.transcript else ()), 0
        for stretch in trace.real(path):
            begin, pause = trace.beginning(stretch), trace.pause(stretch)
            told = begin.prompt if isinstance(begin, Started) else begin.appended
            low, high = next(sampled)
            prompt, text = told or self._decoded(path, before, low), pause.text or self._decoded(path, low, high)
            before = high
            told = getattr(begin, "prompt", "") if isinstance(begin, Started) else getattr(begin, "appended", "")
            yield {
                "kind": self._kind(stretch),
                "ready": self._at(stretch.ready_t),
                "admitted": self._at(stretch.admitted_t),
                "first": self._at(stretch.first_t),
                "end": self._at(stretch.end_t),
                "out": [[self._at(a), self._at(b)] for a, b in stretch.put_back],
                "tokens": high - low,
                "given": begin.prompt_tokens if isinstance(begin, Started) else begin.appended_tokens,
                "budget": begin.budget,
                "grammar": begin.grammar is not None,
                "reason": pause.reason,
                "after": [self._conclusion(given) for given in stretch.after if given in self.index],
                "giver": self._giver(stretch),
                "system": self.strings.put(begin.system) if isinstance(begin, Started) else None,
                "prompt": self.strings.put(prompt),
                "notes": list(begin.notes) if isinstance(begin, Resumed) else [],
                "text": [[kind, self.strings.cut(part)] for kind, part in parts(text)],
                "events": list(self._events(stretch)),
            }

    def _decoded(self, path: str, start: int, stop: int) -> str:
        transcript = self.trace.end(path).transcript
        return self.decode(transcript.token_ids[start:stop]) if self.decode and transcript else ""

    def _kind(self, stretch: Stretch) -> str:
        """What it was for: a node that could have split and answered has solved."""
        name = NAMES[stretch.phase]
        splits = any(path.startswith(f"{stretch.node}.") for path in self.paths)
        return "solve" if name == "plan" and not splits else name

    def _conclusion(self, path: str) -> dict[str, Any]:
        return {"node": self.index[path], "t": self._at(self.trace.events[self.trace.over[path]].t)}

    def _giver(self, stretch: Stretch) -> dict[str, Any] | None:
        """What made the stretch ready, in another node; whether the critical path came that way."""
        event = self.trace.events[self.trace.cause(stretch.begin)]
        if event.node not in self.index or event.node == stretch.node:
            return None
        return {
            "node": self.index[event.node],
            "t": self._at(event.t),
            "critical": _leads(self.hops, event.node, stretch, self.began),
        }

    def _events(self, stretch: Stretch) -> Iterator[dict[str, Any]]:
        for event in self.trace.events[stretch.begin : stretch.end + 1]:
            if event.node != stretch.node:
                continue
            if isinstance(event, Wrote):
                yield {"t": self._at(event.t), **event.own()}
            elif isinstance(event, WroteMalformed):
                yield {"t": self._at(event.t), "kind": "malformed", "reason": event.reason, "text": event.text}

    def _kv(self, block_size: int, wait_policy: str) -> dict[str, list[float]]:
        """Blocks over time as the run's events tell them: other jobs that ran at the time are in it, but for ``drop``:
        what the waiting nodes of this job would hold, if their KV was given up.

        Between two events blocks only become more, token by token; whatever else changes them is an event. So there
        is a point right before each event and one at it, and lines between them.
        """
        changes = sorted(
            change
            for path in self.paths
            for start, end in self.trace.waits(path)
            for change in self._given_up(path, start, end, block_size, wait_policy)
        )
        found: dict[str, list[float]] = {"t": [], **{name: [] for name in KV_OF_RUN}}
        blocks, pinned, offloaded, dropped = 0, 0, 0, 0
        for event in self.trace.events:
            before = (max(blocks, event.blocks), pinned, offloaded, dropped)
            over = isinstance(event, Paused) and event.reason != "await"  # what it holds is free at its next event
            blocks, pinned, offloaded = event.blocks, pinned if over else event.pinned, event.offloaded
            while changes and changes[0][0] <= event.t:
                dropped += changes.pop(0)[1]
            for total, pin, host, drop in (before, (blocks, pinned, offloaded, dropped)):
                point = (self._at(event.t), total - pin, pin, host, drop)
                if not found["t"] or point != tuple(values[-1] for values in found.values()):
                    for values, value in zip(found.values(), point, strict=True):
                        values.append(value)
        return found

    def _given_up(
        self, path: str, start: int, end: int, block_size: int, wait_policy: str
    ) -> Iterable[tuple[float, int]]:
        transcript, events = self.trace.end(path).transcript, self.trace.events
        if wait_policy != "drop" and not (transcript and transcript.counters.get("dropped")):
            return ()
        blocks = -(-events[start].tokens // block_size)
        return (events[start].t, blocks), (events[end].t, -blocks)


def in_order(trace: JobTrace) -> list[str]:
    """Its nodes, each after what started it, siblings as they began."""
    begins = {path: stretches[0].ready_t for path, stretches in trace.nodes.items()}

    def place(path: str) -> list[float]:
        names = path.split(".")
        return [begins.get(".".join(names[: i + 1]), 0.0) for i in range(len(names))]

    return sorted(trace.nodes, key=place)


def parts(text: str) -> Iterator[tuple[str, str]]:
    """What a node wrote, thinking apart from the rest: ("thinking" or "text", part), marks of thinking left out."""
    marks = next((marks for marks in KNOWN if marks.close in text or marks.open in text), None)
    if marks is None:
        if text:
            yield "text", text
        return
    if text.find(marks.close) >= 0 and not 0 <= text.find(marks.open) < text.find(marks.close):
        text = marks.open + text  # the prompt opened it
    while text:
        before, opened, rest = text.partition(marks.open)
        thought, _, text = rest.partition(marks.close)
        if before.strip():
            yield "text", before
        if opened and thought.strip():
            yield "thinking", thought


def _leads(hops: list[Hop], giver: str, stretch: Stretch, began: float) -> bool:
    ready = stretch.ready_t - began
    return any(
        one.node == giver and other.node == stretch.node and other.ready_s == ready for one, other in pairwise(hops)
    )


def _ms(seconds: float) -> float:
    """Seconds to a tenth of a millisecond, as much as a picture shows."""
    return round(seconds, 4)
