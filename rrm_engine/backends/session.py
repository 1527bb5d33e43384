"""One job's nodes on the engine: each is a sequence."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from transformers import PreTrainedTokenizerFast

from rrm_engine.backends.join import Joiner, JoinSettings
from rrm_engine.backends.plans import PhasePlan
from rrm_engine.backends.shadow import Shadows
from rrm_engine.backends.tokens import NodeTokens
from rrm_engine.engine.engine import Engine, Sampled
from rrm_engine.engine.replicas import Driven, names_of
from rrm_engine.engine.sequence import Sequence, State, Stop
from rrm_engine.graph.paths import NodeKey, NodePath
from rrm_engine.graph.types import Conclusion, EndReason, Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.runs.events import Transcript
from rrm_engine.solver.backend import Begun, Continuation, Costs, Opening, Waited, Written


@dataclass(frozen=True, slots=True)
class Writing:
    """What all nodes share: the engine, how text becomes tokens, and how each phase decodes."""

    engine: Driven
    tokenizer: PreTrainedTokenizerFast
    chat: ChatFormat
    plans: Mapping[Phase, PhasePlan]
    join: JoinSettings = field(default_factory=JoinSettings)


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """A place in a node's context: after its first ``keep`` tokens and ``cut``, the kept part of the next one."""

    node: "EngineNode"
    keep: int
    cut: list[int]


@dataclass(slots=True, eq=False, kw_only=True)
class EngineNode(NodeTokens[Sequence]):
    """A node that was opened: see `solver.backend.NodeHandle`."""

    session: "EngineSession"
    writing: Writing
    begun: Begun
    system: bool  # whether its context begins with a system text
    ready: tuple[float, int]  # when the phase was submitted: time, and number of steps launched by then
    last: tuple[float, int] = (0.0, 0)  # the same for its last token

    @property
    def engine(self) -> Engine:
        """The engine that its sequence is on."""
        return self.writing.engine.of(self.sequence)

    @property
    def length(self) -> int:
        return len(self.sequence.tokens)

    @property
    def thinking_cut(self) -> bool:
        return self.sequence.matcher is not None and self.sequence.matcher.cut

    def place(self, at: int) -> TokenPlace:
        return TokenPlace(self, *self.split(at, self.writing.chat.encode))

    def pause(self, at: int) -> None:
        """A token that spans the place is replaced by tokens of its part before it."""
        self.session.shadows.end(self.path)  # a shadow shares blocks that the wait policy may move or give up
        engine = self.engine
        if self.sequence.state is not State.PAUSED:
            engine.pause(self.sequence)
        keep, self.cut = self.split(at, self.writing.chat.encode)
        engine.truncate(self.sequence, keep)
        engine.wait(self.sequence)

    def halt(self) -> None:
        self.session.shadows.end(self.path)
        if not self.sampled or self.sampled[-1][0] != self.first:
            self.sampled.append((self.first, len(self.sequence.tokens)))

    def resume(self, continuation: Continuation) -> None:
        writing, session, sequence = self.writing, self.session, self.sequence
        plan = writing.plans[continuation.phase]
        so_far = {"closed": self._closed(), "turns": self.user_turns, "system": self.system}
        turn, splices = session.joiner.turn(self, continuation, plan.thinking, so_far)
        opens = "" if plan.thinking else continuation.opens
        tokens = [*self.cut, *turn, *writing.chat.opens(opens)]
        splices = [(at + len(self.cut), span) for at, span in splices]
        base, matcher = len(sequence.tokens), plan.match(continuation.grammar)
        self.engine.resume(sequence, tokens, plan.budget, plan.sampling, matcher, splices)
        if splices:
            session.shadows.follow(self.path, sequence)
        self.enter(Detokenizer(writing.tokenizer), opens)
        self.ready = (monotonic(), writing.engine.launched)
        spliced = [(base + at, base + at + len(span)) for at, span in splices]
        self.begun = Begun(len(tokens), opens, spliced, plan.recorded(continuation.grammar))

    def finish(self) -> Transcript:
        sequence = self.sequence
        self.engine.finish(sequence)
        return Transcript(
            spliced=tuple(sequence.spliced),
            splice_report=tuple(report for report in self.session.shadows.reports if report.node == self.path),
            counters=asdict(sequence.counters),
            token_ids=list(sequence.tokens),
            sampled=tuple(self.sampled),
        )

    def on_token(self, sampled: Sampled) -> Written:
        """Its sequence has a new token."""
        waited = self._waited(sampled)
        token = None if sampled.stop is Stop.EOS else sampled.token
        piece = self.wrote(token, last=sampled.stop is not None)
        end = None if sampled.stop is None else EndReason(sampled.stop.value)
        return Written(self.session.job, self.path, piece, end=end, waited=waited)

    def _waited(self, sampled: Sampled) -> Waited | None:
        """How long it was not admitted before this token; None unless it is a phase's first, or steps were missed."""
        engine, now = self.writing.engine, monotonic()
        last, self.last = self.last, (now, engine.launched)
        admitted_t, admitted_step = sampled.sequence.admitted
        if not self.ends:  # none if it was admitted by the first step launched since
            return Waited(admitted_t - self.ready[0] if admitted_step > self.ready[1] + 1 else 0.0)
        if engine.steps - last[1] <= 1:
            return None
        began = admitted_t if admitted_step > last[1] else engine.began
        return Waited(began - last[0], now - began)

    def _closed(self) -> bool:
        """Whether the node's turn ends as the chat template ends it.

        Another end-of-sequence token, or one that the template would write something before, is removed.
        """
        engine, sequence = self.engine, self.sequence
        if self.cut or sequence.tokens[-1] not in engine.eos_ids:
            return False
        if self.writing.chat.closes_with(sequence.tokens[-1]):
            return True
        engine.truncate(sequence, len(sequence.tokens) - 1)
        self.sampled[-1] = (self.first, len(sequence.tokens))
        return False


class EngineSession:
    """The nodes of one job: see `solver.backend.Session`. ``rank`` is the root priority of their sequences."""

    def __init__(self, writing: Writing, job: str, rank: int, forget: Callable[[str], None]) -> None:
        self.writing = writing
        self.job = job
        self.rank = rank
        self.peak_blocks = 0
        self.nodes: dict[str, EngineNode] = {}
        self.joiner = Joiner(writing.engine, writing.chat, writing.join)
        self.shadows = Shadows(writing.engine, writing.join.report)
        self._forget = forget

    def open(self, node: NodePath, opening: Opening) -> EngineNode:
        writing, plan = self.writing, self.writing.plans[opening.phase]
        fork, turns, system = None, 1, bool(opening.system)
        if isinstance(opening.fork, TokenPlace):
            parent, keep = opening.fork.node, opening.fork.keep
            turns, system = parent.user_turns, parent.system
            turn = writing.chat.turn(opening.user, plan.thinking, turns=turns, system=system)
            tokens = [*parent.sequence.tokens[:keep], *opening.fork.cut, *turn]
            fork, turns = (parent.sequence, keep), turns + 1
        else:
            tokens = writing.chat.opening(opening.system, opening.user, plan.thinking)
        opens = "" if plan.thinking else opening.opens
        tokens += writing.chat.opens(opens)
        sequence = writing.engine.submit(
            NodeKey.of(self.job, node),
            tokens,
            plan.budget,
            plan.sampling,
            root=self.rank,
            depth=opening.depth,
            matcher=plan.match(opening.grammar),
            fork_of=fork,
        )
        begun = Begun(len(tokens), opens, settings=plan.recorded(opening.grammar))
        new = EngineNode(
            node,
            sequence,
            Detokenizer(writing.tokenizer),
            len(tokens),
            turns,
            opens,
            session=self,
            writing=writing,
            begun=begun,
            system=system,
            ready=(monotonic(), writing.engine.launched),
        )
        self.nodes[node] = new
        return new

    def keep(self, parent: NodePath, child: NodePath, conclusion: Conclusion) -> None:
        keeper = self.nodes[parent]
        if keeper.sequence.state is not State.FINISHED:
            self.joiner.keep(keeper, self.nodes[child], conclusion)

    def on_token(self, sampled: Sampled) -> Written | None:
        """One of the job's sequences has a new token; None if it is a shadow's."""
        node = NodeKey(sampled.sequence.key).node
        try:
            if sampled.error is not None:
                raise sampled.error
            if self.shadows.on_token(sampled):
                return None
            return self.nodes[node].on_token(sampled)
        except Exception as error:  # the node's own, not the step's
            return Written(self.job, node, error=error)

    def costs(self) -> Costs:
        def total(name: str) -> int:
            return sum(getattr(node.sequence.counters, name) for node in self.nodes.values())

        return Costs(
            forward_prefilled=total("prefilled"),
            forward_decoded=total("decoded"),
            reused=total("reused"),
            drafted=total("drafted"),
            accepted=total("accepted"),
            total_tokens=total("decoded"),
            forked_blocks=total("forked_blocks"),
            copied_blocks=total("copied_blocks"),
            peak_kv_blocks=self.peak_blocks,
            preemptions=total("preemptions") + total("dropped"),
            offloaded_blocks=total("offloaded_blocks"),
            restored_blocks=total("restored_blocks"),
            spliced_tokens=total("spliced"),
            splice_report=[asdict(report) for report in self.shadows.reports],
            text_joins=self.joiner.as_text,
            servers=self._replicas(),
        )

    def _replicas(self) -> dict[str, Any]:
        """By node the replica that it is on; empty if there is only one engine."""
        driven = self.writing.engine
        if len(driven.engines) == 1:
            return {}
        names = dict(zip(map(id, driven.engines), names_of(driven.engines), strict=True))
        return {"replicas": {path: [names[id(driven.of(node.sequence))]] for path, node in self.nodes.items()}}

    def close(self) -> None:
        """Also ends a sequence of a call that was interrupted before its node was entered."""
        for engine in self.writing.engine.engines:
            for sequence in engine.sequences:
                if NodeKey(sequence.key).job == self.job:
                    engine.finish(sequence)
        self._forget(self.job)
