"""One job's nodes on the servers: a stream a phase."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from rrm_engine.backends.http.call import Call
from rrm_engine.backends.http.context import Context, Contexts, tokens_of
from rrm_engine.backends.http.faults import TooLong
from rrm_engine.backends.http.plans import Plan
from rrm_engine.backends.http.pool import Replica
from rrm_engine.backends.http.wire import Ask, Delta, Message
from rrm_engine.errors import NoRoom, RrmError
from rrm_engine.graph.paths import NodeKey, NodePath
from rrm_engine.graph.types import Conclusion, EndReason, Phase
from rrm_engine.runs.events import Transcript
from rrm_engine.solver.backend import Begun, Continuation, Costs, Grammar, Opening, Waited, Written


class Calls(Protocol):
    """Begins and ends streams."""

    def begin(self, node: "HttpNode", ask: Ask, home: Replica | None, rank: int) -> Call: ...
    def end(self, call: Call) -> None: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """What all nodes ask with. ``longest`` is the longest context there may be, if that is known; ``secret`` must not
    be told of; ``continued_by`` is how nodes go on, for the rows; ``opens``: answers can be made to begin with a text.
    """

    contexts: Contexts
    plans: Mapping[Phase, Plan]
    calls: Calls
    seed: int
    longest: int | None
    continued_by: str
    secret: str = ""
    opens: bool = True

    def opening(self, text: str, plan: Plan) -> str:
        """How an answer begins that is asked for by ``plan``, if it was to begin with ``text``."""
        return text if self.opens and not plan.thinking else ""

    def without_secret(self, text: str) -> str:
        return text.replace(self.secret, "***") if self.secret else text


@dataclass(slots=True, eq=False)
class HttpNode:
    """A node that was opened: see `solver.backend.NodeHandle`. ``calls`` are its phases' so far."""

    path: NodePath
    session: "HttpSession"
    context: Context
    begun: Begun = field(default_factory=Begun)
    calls: list[Call] = field(default_factory=list)
    running: bool = False
    silent: bool = True  # no token of its phase has come
    cut_short: bool = False  # the phase's budget is what the context leaves
    thinking_cut: bool = False

    @property
    def text(self) -> str:
        return self.context.text

    @property
    def length(self) -> int:
        return self.context.length

    def place(self, at: int) -> Context:
        return self.context.fork(at)

    def pause(self, at: int) -> None:
        self._stop()
        self.context.cut(at)

    def halt(self) -> None:
        self._stop()
        self.context.leave()

    def resume(self, continuation: Continuation) -> None:
        plan = self.session.asking.plans[continuation.phase]
        opens = self.session.asking.opening(continuation.opens, plan)
        tokens = self.context.say(continuation.user, plan.thinking, opens)
        self.begin(continuation.phase, tokens, opens, continuation.grammar, self.home)

    @property
    def home(self) -> Replica | None:
        """The replica that has its KV."""
        return self.calls[-1].replicas[-1] if self.calls and self.calls[-1].replicas else None

    def begin(self, phase: Phase, tokens: int, opens: str, grammar: Grammar | None, home: Replica | None) -> None:
        """Ask for a phase whose prompt, or whose turn, has ``tokens``, those of ``opens`` among them; ``home`` has some
        of its KV.
        """
        asking, plan, prompt = self.session.asking, self.session.asking.plans[phase], self.context.prompt
        budget, length = plan.budget, tokens_of(prompt)
        if asking.longest is not None and length >= asking.longest:
            raise NoRoom(
                f"{self.path} has {length} tokens and the servers take {asking.longest}: shorten the task or the "
                f"budgets, or start the servers with a longer context"
            )
        if asking.longest is not None:
            budget = max(1, min(budget, asking.longest - (length or _at_most(prompt))))
        self.cut_short = budget < plan.budget
        self.begun = Begun(tokens, opens, settings=plan.recorded(grammar))
        seed = _seed(asking.seed, NodeKey.of(self.session.job, self.path), len(self.calls))
        ask = plan.ask(prompt, budget, grammar, seed)
        self.calls.append(asking.calls.begin(self, ask, home, self.session.rank))
        self.running, self.silent = True, True

    def finish(self) -> Transcript:
        self._stop()
        tokens, sampled = self.context.recorded()
        return Transcript(counters=self.counters(), token_ids=tokens, sampled=tuple(sampled))

    def counters(self) -> dict[str, int]:
        """What its phases took, by the names of the engine's counters, and attempts."""
        cached = sum(_cached(call) for call in self.calls)
        prompts = sum(call.usage.prompt if call.usage else tokens_of(call.ask.prompt) for call in self.calls)
        return {
            "prefilled": prompts - cached,
            "decoded": sum(_decoded(call) for call in self.calls),
            "reused": cached,
            "attempts": sum(call.attempts for call in self.calls),
            "restarts": sum(call.restarts for call in self.calls),
        }

    def take(self, item: Delta | Exception) -> Written:
        """A chunk of its stream, or what ended it."""
        written = Written(self.session.job, self.path, tokens=0)
        if isinstance(item, TooLong):
            self.running, written.end = False, EndReason.CONTEXT
            return written
        if isinstance(item, Exception):
            self.running, written.error = False, self._told(item)
            return written
        written.text, written.tokens = self.context.take(item)
        if self.silent and written.tokens:
            written.waited, self.silent = Waited(self.calls[-1].queued_s), False
        if item.end is not None:
            self.running, written.end = False, self._end(item.end)
        return written

    def _end(self, end: str) -> EndReason:
        if end == "eos":
            return EndReason.EOS
        return EndReason.CONTEXT if self.cut_short else EndReason.LENGTH

    def _told(self, error: Exception) -> Exception:
        if isinstance(error, RrmError):
            return RrmError(self.session.asking.without_secret(f"{self.path}: {error}"))
        return error

    def _stop(self) -> None:
        if self.calls and self.running:
            self.session.asking.calls.end(self.calls[-1])
        self.running = False


class HttpSession:
    """The nodes of one job: see `solver.backend.Session`."""

    def __init__(self, asking: Asking, job: str, rank: int, forget: Callable[[str], None]) -> None:
        self.asking = asking
        self.job = job
        self.rank = rank
        self.nodes: dict[str, HttpNode] = {}
        self._forget = forget

    def open(self, node: NodePath, opening: Opening) -> HttpNode:
        plan = self.asking.plans[opening.phase]
        opens = self.asking.opening(opening.opens, plan)
        if opening.fork is not None:
            context: Context = cast(Any, opening.fork)
            context.say(opening.user, plan.thinking, opens)
        else:
            context = self.asking.contexts.open(node, opening.system, opening.user, plan.thinking, opens)
        new = HttpNode(node, self, context)
        parent = self.nodes[node.parent].home if opening.fork is not None and node.parent is not None else None
        new.begin(opening.phase, tokens_of(context.prompt), opens, opening.grammar, parent)
        self.nodes[node] = new
        return new

    def keep(self, parent: NodePath, child: NodePath, conclusion: Conclusion) -> None:
        """Nothing can be kept of a child but its text."""

    def costs(self) -> Costs:
        found = [node.counters() for node in self.nodes.values()]

        def total(name: str) -> int:
            return sum(counters[name] for counters in found)

        return Costs(
            forward_prefilled=total("prefilled"),
            forward_decoded=total("decoded"),
            reused=total("reused"),
            total_tokens=total("decoded"),
            servers=self._servers(total("attempts"), total("restarts")),
        )

    def close(self) -> None:
        for node in self.nodes.values():
            node.finish()
        self._forget(self.job)

    def _servers(self, attempts: int, restarts: int) -> dict[str, Any]:
        calls = [call for node in self.nodes.values() for call in node.calls]
        told = [call.usage.cached for call in calls if call.usage is not None and call.usage.cached is not None]
        asked = [call for call in calls if call.attempts]
        return {
            "continued_by": self.asking.continued_by,
            "replicas": {
                path: list(dict.fromkeys(replica.name for call in node.calls for replica in call.replicas))
                for path, node in self.nodes.items()
            },
            "queued_s": sum(call.queued_s for call in calls),
            "attempts": attempts,
            "restarts": restarts,
            "cached_tokens": sum(told) if told else None,
            "cached_untold": len(asked) - len(told),
        }


def _at_most(messages: Sequence[Message]) -> int:
    """A guess at the tokens of a conversation that only the server can count; rather too many than too few."""
    return 64 + sum(len(message["content"]) for message in messages) // 2


def _cached(call: Call) -> int:
    return (call.usage.cached or 0) if call.usage else 0


def _decoded(call: Call) -> int:
    """The server's own count where there are no ids and it came: a chunk may hold several tokens."""
    received, usage = call.received, call.usage
    return received.count if received.tokens or usage is None or call.restarts else usage.decoded


def _seed(seed: int, key: NodeKey, phase: int) -> int:
    """31 bits that no other phase of the run has."""
    digest = hashlib.blake2b(f"{seed}/{key}/{phase}".encode(errors="surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
