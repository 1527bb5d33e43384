"""What happens in a run: an event is an instance of one of these classes, and a line of trace.jsonl.

The solver makes them as things happen, with ``as_json`` they are written and handed to callbacks, and ``parse`` reads a
line back as the same class. In the file ``event`` names the class, for what a node wrote together with ``kind``::

    job            a job begins; the first of its events, at its root
    start, resume  a node begins a phase of decoding: its first one, or another after it waited
    first_token    a phase has its first token
    readmitted     others had the sequence's place or its memory for some steps, and now it has a token again
    event          the node wrote something that the graph machine takes: a child, await, atomic or done event
    malformed      it wrote something that looked like one
    pause          a phase of decoding is over
    no_room        the engine did not take the node's next phase, mostly for its length
    concluded      the node is over, and the nodes that wait for it have its answer
    cancelled      the node is over, and its answer is not needed any more
    finish         the job is over; the last of its events
    text           (only streamed, never in the file) a node wrote some text

A node lives through (start pause | resume pause | no_room)* and then concluded or cancelled. Durations, named ``*_s``,
are seconds. Ranges of tokens are pairs (start, stop) of indices in the node's tokens. A field with a default was added
after the first version of the file; older runs lack it.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, cast

from rrm_engine.graph.types import Phase, Status
from rrm_engine.legible import legible
from rrm_engine.protocol.events import MAX_TASK_CHARS, PlanShape
from rrm_engine.protocol.thinking import Thought
from rrm_engine.runs.typed import WrongShape, read_as

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event says.

    ``t`` is monotonic seconds, ``job`` the job's key ``id/mode/sample``, ``node`` the node's path, ``step`` how many
    steps the engine had run and ``tokens`` how many tokens the node's sequence had (0: it has none). Of the run as a
    whole: ``blocks`` of KV in use, of them ``pinned`` by nodes that wait, and ``offloaded`` in host memory.
    """

    EVENT: ClassVar[str]

    t: float
    job: str
    node: str
    step: int
    tokens: int
    blocks: int
    pinned: int
    offloaded: int

    def own(self) -> dict[str, Any]:
        """The fields that this class adds, as they are written."""
        return {name: _plain(getattr(self, name)) for name in _own_fields(cast(Any, type(self)))}

    def as_json(self) -> dict[str, Any]:
        """The object of a line, but for the session, which the run directory adds."""
        return {
            "t": self.t,
            "job": self.job,
            "node": self.node,
            "step": self.step,
            "event": self.EVENT,
            "tokens": self.tokens,
            "blocks": self.blocks,
            **self.own(),
            "pinned": self.pinned,
            "offloaded": self.offloaded,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBegan(Event):
    EVENT = "job"

    mode: str
    task: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """What constrained a phase: ``children`` the node had had by then, whether it might split once more, and the
    ``thought`` in front of its events, if there is any; the others are those of its `PlanShape`.
    """

    children: int
    may_split: bool
    thought: Thought | None = None
    max_task_chars: int = MAX_TASK_CHARS
    counts_parts: bool = False

    @property
    def shape(self) -> PlanShape:
        return PlanShape(self.max_task_chars, self.counts_parts)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"children": self.children, "may_split": self.may_split}
        found |= asdict(self.shape)
        return found | ({"thought": asdict(self.thought)} if self.thought else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begins(Event):
    """A phase begins. ``after`` are the nodes whose conclusions it was given.

    ``sampling`` are the settings that its tokens are drawn with (see SamplingParams), ``budget`` the tokens it may
    write; ``grammar`` is None where it was not constrained. ``continued_by`` says how a server was told what came
    before, where one decodes.
    """

    phase: Phase
    after: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None
    budget: int | None = None
    continued_by: str = ""

    def own(self) -> dict[str, Any]:
        found = Event.own(self) | {"grammar": self.grammar and self.grammar.as_json()}
        if not self.continued_by:
            del found["continued_by"]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(_Begins):
    """``system`` and ``prompt`` are the texts that it was given, ``opens`` is what its own text begins with though it
    did not write that; ``prompt_tokens`` include those of ``opens`` and of a parent's context that it was forked from.
    """

    EVENT = "start"

    prompt_tokens: int
    task: str
    system: str = ""
    prompt: str = ""
    opens: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(_Begins):
    """``appended`` is the text that it was given, ``opens`` as in `Started`. ``notes`` are what it is told there beside
    the conclusions; ``spliced`` are the ranges of what was appended whose KV is to be attached, unless memory runs out
    before that.
    """

    EVENT = "resume"

    appended_tokens: int
    notes: tuple[str, ...]
    spliced: tuple[Range, ...] = ()
    appended: str = ""
    opens: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken(Event):
    """``queued_s``: how long the phase was ready and not admitted, beyond the first step that it could be in."""

    EVENT = "first_token"

    queued_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Readmitted(Event):
    """It was out for ``queued_s``, and has taken part again for ``ran_s``: what it lost is recomputed in that time."""

    EVENT = "readmitted"

    queued_s: float
    ran_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrote(Event):
    """An event that the node wrote. ``repairs`` names the leniencies that reading it took."""

    EVENT = "event"
    KIND: ClassVar[str]

    repairs: tuple[str, ...]

    def own(self) -> dict[str, Any]:
        return {"kind": self.KIND, **Event.own(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WroteChild(Wrote):
    """``child`` is the path of the node that it made, None if it made none: the graph machine refused it, or a sibling
    had the same task, whose path is ``same_as`` then.
    """

    KIND = "child"

    id: str
    task: str
    depends_on: tuple[str, ...]
    child: str | None
    same_as: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WroteAwait(Wrote):
    KIND = "await"

    children: tuple[str, ...]
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WroteAtomic(Wrote):
    KIND = "atomic"

    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WroteDone(Wrote):
    KIND = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class WroteMalformed(Event):
    """``text`` is the beginning of what could not be read."""

    EVENT = "malformed"

    reason: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """``reason`` is await, concluded, cancelled, or an EndReason of the graph machine; ``text`` is what the node wrote
    in the phase, its thinking and its events in it.
    """

    EVENT = "pause"

    reason: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DidNotFit(Event):
    EVENT = "no_room"

    reason: str


@dataclass(frozen=True, slots=True)
class SpliceReport:
    """One resume of ``node``: the distributions of the first ``tokens`` tokens that it wrote after it.

    ``kl_mean`` and ``kl_max`` are KL divergences in nats, from the text to what was attached; ``top1`` is the share of
    the tokens for which both have the same likeliest one, ``first_difference`` the first for which they have not (0 is
    the token right after the resume, None: nowhere).
    """

    node: str
    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    first_difference: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """All ``token_ids`` of a node's sequence, and the ranges of them that the model wrote, phase by phase.

    ``counters`` are those of the sequence (see its Counters). ``spliced`` are the ranges whose KV was attached, and
    ``splice_report`` what that did, for each resume that was measured.
    """

    spliced: tuple[Range, ...] = ()
    splice_report: tuple[SpliceReport, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    sampled: tuple[Range, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "spliced": list(self.spliced),
            "splice_report": [asdict(report) for report in self.splice_report],
            "counters": self.counters,
            "token_ids": self.token_ids,
            "sampled": list(self.sampled),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends(Event):
    """A node is over. ``transcript`` is None if it never had a sequence; its fields are written beside the others."""

    transcript: Transcript | None

    def own(self) -> dict[str, Any]:
        found = Event.own(self)
        del found["transcript"]
        return found | (self.transcript.as_json() if self.transcript else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Concluded(_Ends):
    """``ok`` is false where the node found no answer."""

    EVENT = "concluded"

    answer: str
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(_Ends):
    EVENT = "cancelled"

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """``events``: how many the job had, this one among them."""

    EVENT = "finish"

    status: Status
    answer: str
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Event):
    """One for each token; pinned and offloaded blocks are not counted for it, because that takes time."""

    EVENT = "text"

    text: str
    pinned: int = 0
    offloaded: int = 0

    def as_json(self) -> dict[str, Any]:
        found = Event.as_json(self)
        del found["pinned"], found["offloaded"]
        return found


Began = Started | Resumed
Ended = Concluded | Cancelled
WRITTEN = (WroteChild, WroteAwait, WroteAtomic, WroteDone)
RECORDED: tuple[type[Event], ...] = (
    *(JobBegan, Started, Resumed, FirstToken, Readmitted, *WRITTEN, WroteMalformed),
    *(Paused, DidNotFit, Concluded, Cancelled, Finished),
)
BY_NAME = {cls.EVENT: cls for cls in RECORDED if not issubclass(cls, Wrote)}
BY_KIND = {cls.KIND: cls for cls in WRITTEN}
TRANSCRIPT = [f.name for f in fields(Transcript)]


def parse(value: dict[str, Any]) -> Event:
    """The event of a line's object, without its session; ``value`` is used up. Raises WrongShape."""
    name = value.pop("event", None)
    if name == Wrote.EVENT:
        name = value.pop("kind", None)
        cls: type[Event] | None = BY_KIND.get(name) if isinstance(name, str) else None
    else:
        cls = BY_NAME.get(name) if isinstance(name, str) else None
    if cls is None:
        raise WrongShape(f"this version knows no event {legible(ascii(name))}")
    what = f"the event {name}"
    if not issubclass(cls, _Ends):
        return cast(Event, read_as(cls, value, what))
    parts = {key: value.pop(key) for key in TRANSCRIPT if key in value}
    ended: _Ends = read_as(cls, {**value, "transcript": None}, what)
    return replace(ended, transcript=read_as(Transcript, parts, what)) if parts else ended


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@cache
def _own_fields(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.name not in Event.__slots__)
