"""What the graph machine promises on any input, checked by a driver that only believes what it was told.

`Contract` keeps its own record of events told and commands received and never looks into the machine.
That the checks bite is shown at the end, on machines with one rule taken out.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.node import Node
from rrm_engine.graph.types import (
    Cancel,
    Command,
    Conclusion,
    EndReason,
    Finish,
    Limits,
    Pause,
    Phase,
    Resume,
    Start,
    Status,
    Stop,
)
from rrm_engine.protocol.events import Atomic, Await, Child, Done, Event, Malformed


class Violation(AssertionError):
    pass


def require(ok: bool, what: str) -> None:
    if not ok:
        raise Violation(what)


def is_refusal(conclusion: Conclusion) -> bool:
    return conclusion.answer.startswith("failed: not started")


@dataclass
class Declared:
    """A child event as told. Each has a task of its own, which leads from a Start back to its event."""

    event: Child
    parent: str
    round: int
    dropped: set[str] = field(default_factory=set)  # names nobody had declared when the parent waited
    path: str | None = None


@dataclass
class Contract:
    """Checks every command against what a driver may expect."""

    limits: Limits
    state: dict[str, str] = field(default_factory=dict)  # path -> decoding | paused | ended | over
    depth: dict[str, int] = field(default_factory=dict)
    concluded: dict[str, Conclusion] = field(default_factory=dict)
    declared: dict[str, Declared] = field(default_factory=dict)  # by task
    rounds: Counter[str] = field(default_factory=Counter)
    widths: Counter[tuple[str, int]] = field(default_factory=Counter)
    awaiting: dict[str, tuple[str, ...]] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)
    finish: Finish | None = None

    def decoding(self) -> list[str]:
        return [path for path, state in self.state.items() if state == "decoding"]

    def tell(self, path: str, event: Event) -> None:
        if self.state[path] != "decoding":
            return
        if isinstance(event, Child):
            self.declared.setdefault(event.task, Declared(event, path, self.rounds[path]))
        else:
            self.awaiting[path] = event.children if isinstance(event, Await) else ()
            self._drop_undeclared(path)

    def tell_end(self, path: str) -> None:
        if self.state[path] == "decoding":
            self.state[path] = "ended"
            self.awaiting[path] = ()
            self._drop_undeclared(path)

    def _drop_undeclared(self, parent: str) -> None:
        siblings = [d for d in self.declared.values() if d.parent == parent]
        names = {d.event.id for d in siblings}
        for child in siblings:
            child.dropped |= set(child.event.depends_on) - names

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            require(self.finish is None, f"{command} after Finish")
            match command:
                case Start():
                    self._start(command)
                case Pause(path):
                    self._move(path, {"decoding"}, "paused")
                case Resume():
                    self._resume(command)
                case Stop(path, conclusion):
                    self._move(path, {"decoding", "ended"}, "over")
                    require(path.split(".")[-1] == conclusion.id, "conclusion under a foreign id")
                    self.concluded[path] = conclusion
                case Cancel(path, _):
                    self._move(path, {"decoding", "ended", "paused"}, "over")
                case Finish():
                    self._finish(command)
            busy, room = len(self.decoding()), self.limits.max_concurrency
            require(room is None or busy <= room, f"{busy} nodes decode, {room} may")
        require(self.finish is not None or bool(self.decoding()), "nothing decodes and nothing is finished")

    def _move(self, path: str, before: set[str], after: str) -> None:
        require(self.state.get(path) in before, f"{path} is {self.state.get(path)}, not {before}")
        self.state[path] = after

    def _start(self, start: Start) -> None:
        require(start.node not in self.state, f"{start.node} starts twice")
        self.state[start.node] = "decoding"
        self.depth[start.node] = start.depth
        require(start.depth <= self.limits.max_depth, "too deep")
        nodes = sum(not path.endswith("!direct") for path in self.state)
        require(nodes <= max(1, self.limits.max_nodes), "too many nodes")
        if start.phase is Phase.DIRECT:
            require(start.node.endswith("!direct") and self.limits.fallback, "a stray direct solve")
            require(self.decoding() == [start.node], "the fallback is not alone")
        elif start.parent is None:
            require(start.node == "root" and start.depth == 0 and not start.fork, "a strange root")
        else:
            self._start_child(start, start.parent)

    def _start_child(self, start: Start, parent: str) -> None:
        require(start.task in self.declared, "a child that nobody declared")
        child = self.declared[start.task]
        require(child.path is None, "one event, two nodes")
        child.path = start.node
        require(child.parent == parent and start.node.rpartition(".")[0] == parent, "a foreign parent")
        require(start.depth == self.depth[parent] + 1, "a wrong depth")
        require(self.state[parent] != "over", "a child of a parent that is over")
        expected = Phase.GRAPH if start.depth < self.limits.max_depth else Phase.SOLVER
        require(start.phase is expected, "a wrong phase")
        self.widths[parent, child.round] += 1
        require(self.widths[parent, child.round] <= self.limits.max_width, "too wide")
        self._check_given(start, child)

    def _check_given(self, start: Start, child: Declared) -> None:
        """Every dependency that was ever declared has concluded, and its conclusion is given, in order."""
        names = [n for n in dict.fromkeys(child.event.depends_on) if n not in child.dropped]
        for name in names:
            known = any(d.parent == child.parent and d.event.id == name for d in self.declared.values())
            require(known or name in {c.id for c in start.given}, f"{start.node} does not wait for {name}")
        for conclusion in start.given:
            self._check_conclusion(child.parent, conclusion)
        self._check_order(child.parent, names, start.given)
        require(len(start.given) <= len(child.event.depends_on), "more given than asked for")

    def _check_order(self, parent: str, names: list[str], conclusions: tuple[Conclusion, ...]) -> None:
        """``conclusions`` has those of all ``names``, in order, as far as a name means one started child."""
        plain = []
        refused = {c.id for c in conclusions if is_refusal(c)}
        for name in names:
            known = [d for d in self.declared.values() if d.parent == parent and d.event.id == name]
            if len(known) == 1 and known[0].path == f"{parent}.{name}" and name not in refused:
                require(known[0].path in self.concluded, f"{known[0].path} has not concluded")
                plain.append(name)
        require([c.id for c in conclusions if c.id in plain] == plain, f"{conclusions} are not of {plain}")

    def _check_conclusion(self, parent: str, conclusion: Conclusion) -> None:
        """It is word for word what the child concluded, or says why there is no such node."""
        path = f"{parent}.{conclusion.id}"
        if is_refusal(conclusion):
            require(not conclusion.ok, "a refusal that is ok")
        else:
            require(self.concluded.get(path) == conclusion, f"{conclusion} is not what {path} concluded")

    def _resume(self, resume: Resume) -> None:
        path = resume.node
        self._move(path, {"paused", "ended"}, "decoding")
        require(resume.phase in (Phase.CONTINUATION, Phase.SOLVER), "a wrong phase")
        self.rounds[path] += 1
        names = [n for n in dict.fromkeys(self.awaiting.pop(path, ())) if f"{path}.{n}" not in self.delivered]
        for conclusion in resume.conclusions:
            self._check_conclusion(path, conclusion)
            if not is_refusal(conclusion):
                child = f"{path}.{conclusion.id}"
                require(child not in self.delivered, f"{child} is delivered twice")
                self.delivered.add(child)
        if resume.conclusions:  # else the await may have been refused
            self._check_order(path, names, resume.conclusions)

    def _finish(self, finish: Finish) -> None:
        self.finish = finish
        alive = [path for path, state in self.state.items() if state != "over"]
        require(not alive, f"finished, but {alive} are alive")
        if finish.status in (Status.GRAPH, Status.ATOMIC):
            require(self.concluded["root"].ok, "a failed root answers")
            require(finish.answer == self.concluded["root"].answer, "not the root's answer")
            split = any(path.startswith("root.") for path in self.state)
            require((finish.status is Status.GRAPH) == split, "GRAPH means that the root had children")
        elif finish.status is Status.FALLBACK:
            require(finish.answer == self.concluded["root!direct"].answer, "not the fallback's answer")
        else:
            require(bool(finish.error), "failed without saying why")


# models that write anything

NAMES = ["a", "b", "c", "d", "a_2", "a.b", "", "!", "root", "é x"]
TEXTS = ["", " ", "prose", "so FINAL: 7", "\\boxed{3}"]


def names(rng: Random, count: int) -> tuple[str, ...]:
    return tuple(rng.choices(NAMES, [9, 9, 9, 9, 2, 1, 1, 1, 1, 1], k=count))


def any_event(rng: Random, task: Iterator[str], kinds: int) -> Event:
    match rng.randrange(kinds):
        case 0 | 1 | 2 | 3 | 4 | 5:
            depends_on = names(rng, rng.choice([0, 0, 1, 1, 2, 3]))
            return Child(names(rng, 1)[0], next(task), depends_on)
        case 6 | 7 | 8:
            return Await(names(rng, rng.randrange(4)), rng.choice(["", "sum"]))
        case 9:
            return Atomic(rng.choice(["", "  ", "FINAL: 1"]))
        case _:
            return Done()


def random_limits(rng: Random) -> Limits:
    return Limits(
        max_depth=rng.randrange(4),
        max_width=rng.randrange(7),
        max_nodes=rng.choice([1, 5, 20, 100]),
        max_awaits=rng.randrange(6),
        max_concurrency=rng.choice([None, 1, 2, 3]),
        fallback=rng.random() < 0.5,
    )


Machine = Callable[[str, Limits], GraphMachine]


def run_chaos(rng: Random, new: Machine = GraphMachine) -> Contract:
    """One run of nodes that write nonsense in random turns, and come to their end after a while."""
    limits = random_limits(rng)
    machine, contract = new("the task", limits), Contract(limits)
    task = (f"task {i}" for i in itertools.count())
    contract.obey(machine.start())
    for step in range(3000):
        if contract.finish:
            break
        path = rng.choice(contract.decoding() if rng.random() < 0.95 else list(contract.state))
        # A root that goes on writing makes the larger graphs.
        dice, kinds = rng.random(), 9 if path == "root" and rng.random() < 0.9 else 12
        if dice < 0.002:
            contract.obey(machine.cancel("on purpose"))
        elif dice < 0.05:
            contract.obey(machine.on_malformed(path, Malformed("{", "unclosed", 0, 1)))
        elif dice < (0.15 if kinds == 12 else 0.06) or step > 300:
            contract.tell_end(path)
            reason = EndReason.EOS if step > 300 else rng.choice(list(EndReason))
            contract.obey(machine.on_end(path, reason, rng.choice(TEXTS)))
        else:
            event, text = any_event(rng, task, kinds), rng.choice([None, *TEXTS])
            for _ in range(2 if isinstance(event, Child) and dice > 0.9 else 1):  # a child twice is one child
                contract.tell(path, event)
                contract.obey(machine.on_event(path, event, text))
    require(contract.finish is not None, "the run does not end")
    require(machine.node_count == len(contract.state), "a wrong count of nodes")
    require(machine.max_depth == max(contract.depth.values()), "a wrong depth")
    require({p for p, n in machine.nodes.items() if n.started} == set(contract.state), "wrong nodes")
    return contract


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_contract_holds_on_nonsense(rng: Random) -> None:
    run_chaos(rng)


def test_the_contract_holds_on_many_seeds_and_the_runs_are_worth_it() -> None:
    """The same with plain seeds, and a look at whether the runs get anywhere."""
    statuses: Counter[Status] = Counter()
    nodes = resumes = given_to = 0
    for seed in range(1500):
        contract = run_chaos(Random(seed))
        assert contract.finish is not None
        statuses[contract.finish.status] += 1
        nodes += len(contract.state)
        resumes += contract.rounds.total()
        given_to += sum(bool(d.path and set(d.event.depends_on) - d.dropped) for d in contract.declared.values())
    assert set(statuses) == set(Status)
    assert min(nodes, resumes, given_to) > 1000


# models that write a well-formed graph


@dataclass(frozen=True)
class Plan:
    """What a node does: rounds of children, then an answer made of its value and of all it was told."""

    value: int
    rounds: tuple["Round", ...] = ()


@dataclass(frozen=True)
class Round:
    children: tuple[tuple[str, tuple[str, ...], Plan], ...]  # id, depends_on, plan; in order of declaration
    awaited: tuple[str, ...]
    how: str  # await | await_all | done | eos

    def delivered(self) -> tuple[str, ...]:
        return self.awaited if self.how == "await" else tuple(id for id, _, _ in self.children)


def combine(value: int, given: list[str], told: list[str]) -> str:
    return f"{value}<{','.join(given)}>[{','.join(told)}]"


def fold(plan: Plan, given: list[str]) -> str:
    """The answer of a node by plain recursion: what the graph must come to in any order."""
    answers: dict[str, str] = {}
    told: list[str] = []
    for round in plan.rounds:
        waiting = list(round.children)
        while waiting:
            id, depends_on, child = next(w for w in waiting if all(d in answers for d in w[1]))
            answers[id] = fold(child, [answers[d] for d in depends_on])
            waiting.remove((id, depends_on, child))
        told += [answers[id] for id in round.delivered()]
    return combine(plan.value, given, told)


def random_plan(rng: Random, depth: int, serial: Iterator[int]) -> Plan:
    rounds: list[Round] = []
    earlier: list[str] = []
    for _ in range(rng.randrange(3) if depth else 0):
        ids = [f"c{len(earlier) + i}" for i in range(rng.randrange(1, 4))]
        children = []
        for rank, id in enumerate(ids):  # each depends on some of lower rank, then declaration is shuffled
            depends_on = [d for d in earlier + ids[:rank] if rng.random() < 0.4]
            rng.shuffle(depends_on)
            children.append((id, tuple(depends_on), random_plan(rng, depth - 1, serial)))
        rng.shuffle(children)
        rounds.append(Round(tuple(children), tuple(ids), rng.choice(["await", "await_all", "done", "eos"])))
        earlier += ids
    return Plan(next(serial), tuple(rounds))


@dataclass
class Writer:
    """A model that follows its plan: one event a turn, ``None`` for the end of its text."""

    plan: Plan
    given: list[str]
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = self._write()

    def _write(self) -> Iterator[Event | None]:
        for round in self.plan.rounds:
            for id, depends_on, child in round.children:
                yield Child(id, f"task {child.value}", depends_on)
            match round.how:
                case "await":
                    yield Await(round.awaited)
                case "await_all":
                    yield Await()
                case "done":
                    yield Done()
                case _:
                    yield None
        yield Atomic(combine(self.plan.value, self.given, self.told))


def plans_by_task(plan: Plan) -> dict[str, Plan]:
    found = {f"task {plan.value}": plan}
    for round in plan.rounds:
        for _, _, child in round.children:
            found |= plans_by_task(child)
    return found


def run_plan(plan: Plan, rng: Random, limits: Limits, new: Machine = GraphMachine) -> str:
    plans, writers = plans_by_task(plan), dict[str, Writer]()
    machine, contract = new(f"task {plan.value}", limits), Contract(limits)
    commands = machine.start()
    while True:
        contract.obey(commands)
        for command in commands:
            if isinstance(command, Start):
                writers[command.node] = Writer(plans[command.task], [c.answer for c in command.given])
            elif isinstance(command, Resume):
                writers[command.node].told += [c.answer for c in command.conclusions]
                require(not command.notes, f"a note on a well-formed graph: {command.notes}")
        if contract.finish:
            return contract.finish.answer
        path = rng.choice(contract.decoding())
        event = next(writers[path].turns)
        if event is None:
            contract.tell_end(path)
            commands = machine.on_end(path, EndReason.EOS, "")
        else:
            contract.tell(path, event)
            commands = machine.on_event(path, event, "")


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 1, 2, 5]))
def test_a_well_formed_graph_comes_to_the_same_in_any_order(rng: Random, room: int | None) -> None:
    plan = random_plan(rng, 3, itertools.count())
    limits = Limits(max_depth=3, max_nodes=1000, max_concurrency=room)
    expected = fold(plan, [])
    for _ in range(3):
        assert run_plan(plan, rng, limits) == expected


def test_equal_calls_give_equal_commands() -> None:
    def record(seed: int) -> list[Command]:
        log: list[Command] = []

        class Recorded(GraphMachine):
            def _commands(self) -> list[Command]:
                commands = super()._commands()
                log.extend(commands)
                return commands

        run_chaos(Random(seed), Recorded)
        return log

    assert all(record(seed) == record(seed) for seed in range(50))


# the checks bite


def caught(new: Machine = GraphMachine, seeds: int = 300) -> bool:
    """Whether any run shows that something is wrong with the machine."""
    limits = Limits(max_depth=3, max_nodes=1000, max_concurrency=2)
    for seed in range(seeds):
        plan = random_plan(Random(seed), 3, itertools.count())
        try:
            run_chaos(Random(seed), new)
            require(run_plan(plan, Random(seed), limits, new) == fold(plan, []), "a wrong answer")
        except Violation:
            return True
    return False


def test_the_machine_itself_is_not_caught() -> None:
    assert not caught()


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("blocked", property(lambda self: False)),  # children do not wait for their dependencies
        ("given", property(lambda self: ())),
        ("due", property(lambda self: tuple(c.conclusion for c in self.awaiting[::-1] if c.conclusion))),
        ("closes_cycle", lambda self, names, depends_on: False),
        ("drop_expected", lambda self: iter(())),
        ("unawaited", property(lambda self: [])),
        ("free_id", lambda self, name: name),
    ],
)
def test_a_node_without_one_rule_is_caught(rule: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, rule, broken)
    assert caught()


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("_abandon", lambda self, nodes, reason: None),
        ("_refusal", lambda self, parent, event, names: None),
        ("_wake_dependants", lambda self, node: None),
        ("_go_on_if_due", lambda self, node: self._go_on(node, Phase.CONTINUATION)),
        ("_pause", lambda self, node: None),
        ("_heeded", lambda self, node: True),
        ("_status", lambda self, node: Status.GRAPH),
        ("_refuse_await", lambda self, node: self._wait(node, ())),
    ],
)
def test_a_machine_without_one_rule_is_caught(rule: str, broken: object) -> None:
    assert caught(type("Broken", (GraphMachine,), {rule: broken}))


def test_a_machine_without_its_concurrency_limit_is_caught() -> None:
    class Unlimited(GraphMachine):
        def _commands(self) -> list[Command]:
            self._running = 0
            return super()._commands()

    assert caught(Unlimited)
