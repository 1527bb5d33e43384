"""What the graph machine promises on any input, checked by a driver that only believes what it was told.

That the checks bite is shown at the end, on machines with one rule taken out.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from graphs import Contract, require
from hypothesis import given
from hypothesis import strategies as st
from searched import searched

from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.node import Node
from rrm_engine.graph.states import OVER, TRANSITIONS, NodeState
from rrm_engine.graph.types import Command, EndReason, Limits, Phase, Resume, Start, Status
from rrm_engine.protocol.events import Atomic, Await, Child, Done, Event, Malformed

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


def in_other_clothes(rng: Random, event: Child, contract: Contract, path: str, step: int) -> Child:
    """Now and then the child has a task that is there already: its parent's, or that of a sibling of the same round."""
    round, dice = contract.rounds[path], rng.random()
    siblings = [d.event.task for d in contract.declared.values() if (d.parent, d.round) == (path, round)]
    known = siblings if dice > 0.05 else [contract.tasks[path]]
    if dice > 0.4 or not known:
        return event
    return replace(event, task=f"{' ' * step}'{rng.choice(known).title()}.' ")  # no two are the same, word for word


def random_limits(rng: Random) -> Limits:
    return Limits(
        max_depth=rng.randrange(4),
        max_width=rng.randrange(7),
        max_nodes=rng.choice([1, 5, 20, 100]),
        max_awaits=rng.randrange(6),
        solves_afresh=rng.random() < 0.5,
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
            if isinstance(event, Child):
                event = in_other_clothes(rng, event, contract, path, step)
            for _ in range(2 if isinstance(event, Child) and dice > 0.9 else 1):  # a child twice is one child
                contract.tell(path, event)
                contract.obey(machine.on_event(path, event, text))
    require(contract.finish is not None, "the run does not end")
    require(machine.node_count == len(contract.state), "a wrong count of nodes")
    require(machine.max_depth == max(contract.depth.values()), "a wrong depth")
    require({p for p, n in machine.nodes.items() if n.started} == set(contract.state), "wrong nodes")
    return contract


@searched(400)
@given(st.randoms(use_true_random=False))
def test_the_contract_holds_on_nonsense(rng: Random) -> None:
    """``run_chaos`` raises Violation at the first command that breaks it."""
    contract = run_chaos(rng)
    assert contract.finish is not None
    assert set(contract.state.values()) == {"over"}
    assert contract.obeyed > 2 * len(contract.state)  # each node's start and its end, and Finish


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


def test_random_runs_take_every_transition_of_the_table_and_no_other() -> None:
    taken: set[tuple[NodeState, NodeState]] = set()

    class Watched(GraphMachine):
        def _set_state(self, node: Node, state: NodeState) -> None:
            taken.add((node.state, state))
            super()._set_state(node, state)

    for seed in range(300):
        run_chaos(Random(seed), Watched)
    assert taken == set(TRANSITIONS)


@pytest.mark.parametrize("before", NodeState)
def test_a_transition_that_is_not_in_the_table_is_refused(before: NodeState) -> None:
    others = [after for after in NodeState if (before, after) not in TRANSITIONS]
    assert set(others) >= {before} and (before not in OVER or len(others) == len(NodeState))
    for after in others:
        machine = GraphMachine("the task", Limits())
        root = machine.nodes["root"]
        root.state = before
        with pytest.raises(AssertionError, match=f"root: no way from {before} to {after}"):
            machine._set_state(root, after)


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
    """A short answer that says what it was made of."""
    return f"{value} x{zlib.crc32(f'<{given}>[{told}]'.encode()):x}"


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


@searched(100)
@given(st.randoms(use_true_random=False))
def test_a_well_formed_graph_comes_to_the_same_in_any_order(rng: Random) -> None:
    plan = random_plan(rng, 3, itertools.count())
    limits = Limits(max_depth=3, max_nodes=1000)
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
    limits = Limits(max_depth=3, max_nodes=1000)
    for seed in range(seeds):
        plan = random_plan(Random(seed), 3, itertools.count())
        try:
            run_chaos(Random(seed), new)
            require(run_plan(plan, Random(seed), limits, new) == fold(plan, []), "a wrong answer")
        except AssertionError:  # a Violation, or a transition that is not in the machine's table
            return True
    return False


def test_the_machine_itself_is_not_caught() -> None:
    assert not caught()


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("blocked", property(lambda self: False)),  # children do not wait for their dependencies
        ("given", property(lambda self: ())),
        ("due", property(lambda self: tuple(c.conclusion for _, c in self.awaiting[::-1] if c.conclusion))),
        ("closes_cycle", lambda self, names, depends_on: False),
        ("drop_expected", lambda self: iter(())),
        ("unawaited", property(lambda self: [])),
        ("free_id", lambda self, name: name),
        ("ancestor", lambda self, task: None),
        ("twin", lambda self, task, depends_on: None),
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


def test_a_machine_that_compares_tasks_word_for_word_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrm_engine.graph.node.normalised", lambda task: task)
    assert caught()
