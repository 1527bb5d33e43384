"""The graph machine by example: what a node writes, and what the machine answers."""

from dataclasses import replace

import pytest
from graphs import brief, child, concluded, resume_of, started

from rrm_engine.graph.machine import MAX_NOTES, GraphMachine
from rrm_engine.graph.paths import ROOT, NodePath
from rrm_engine.graph.states import NodeState
from rrm_engine.graph.types import (
    Cancel,
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
from rrm_engine.protocol.events import Atomic, Await, Child, Done, Malformed


def test_a_root_splits_into_two_cases_and_joins_them() -> None:
    m = GraphMachine("How many ...?", Limits())
    assert m.start() == [Start(ROOT, Phase.GRAPH, "How many ...?")]

    # Children start at their own event, while the root goes on writing.
    assert m.on_event("root", Child("case_a", "x even")) == [
        Start(NodePath("root.case_a"), Phase.GRAPH, "x even", parent=ROOT, depth=1)
    ]
    assert m.on_event("root", Child("case_b", "x odd")) == [
        Start(NodePath("root.case_b"), Phase.GRAPH, "x odd", parent=ROOT, depth=1)
    ]
    assert m.on_event("root", Await(("case_a", "case_b"), rule="sum")) == [Pause(ROOT)]

    b, a = concluded("root.case_b", "FINAL: 104"), concluded("root.case_a", "FINAL: 100")
    assert m.on_event("root.case_b", Atomic("FINAL: 104")) == [Stop(NodePath("root.case_b"), b)]
    assert m.on_event("root.case_a", Atomic("FINAL: 100")) == [
        Stop(NodePath("root.case_a"), a),
        Resume(ROOT, Phase.CONTINUATION, (a, b), rule="sum"),  # in the order named
    ]
    assert m.on_event("root", Atomic("104 + 100. FINAL: 204")) == [
        Stop(ROOT, concluded("root", "104 + 100. FINAL: 204")),
        Finish(Status.GRAPH, "104 + 100. FINAL: 204"),
    ]
    assert m.on_event("root", Done()) == []  # was in flight
    assert (m.node_count, m.max_depth, m.max_sibling_width) == (3, 1, 2)
    assert m.finished == Finish(Status.GRAPH, "104 + 100. FINAL: 204")
    assert not m.repairs


class TestDependencies:
    def test_a_child_waits_for_its_dependencies_and_is_given_their_conclusions_in_order(self) -> None:
        m = started("a", "b")
        assert m.on_event("root", child("c", "b", "a")) == []
        assert m.nodes["root.c"].state is NodeState.BLOCKED
        m.on_event("root.a", Atomic("A"))
        commands = m.on_event("root.b", Atomic("B"))
        assert brief(commands) == ["stop root.b", "start root.c"]
        assert m.nodes["root.c"].given == (concluded("root.b", "B"), concluded("root.a", "A"))

    def test_a_dependency_may_be_declared_later(self) -> None:
        m = started()
        assert m.on_event("root", child("total", "part")) == []
        assert brief(m.on_event("root", child("part"))) == ["start root.part"]
        assert brief(m.on_event("root.part", Atomic("1"))) == ["stop root.part", "start root.total"]

    def test_a_dependency_that_nobody_declared_is_dropped_when_the_parent_waits(self) -> None:
        m = started()
        m.on_event("root", child("a", "ghost"))
        assert brief(m.on_event("root", Await(("a",)))) == ["pause root", "start root.a"]
        assert m.repairs["unknown_dependency"] == 1
        assert resume_of(m.on_event("root.a", Atomic("A"))).notes == ("Child a starts without unknown ghost.",)

    def test_the_child_that_closes_a_cycle_is_refused(self) -> None:
        m = started()
        m.on_event("root", child("a", "c"))
        m.on_event("root", child("b", "a"))
        commands = m.on_event("root", child("c", "b"))  # a waits for c waits for b waits for a
        assert brief(commands) == ["start root.a"]
        assert m.nodes["root.a"].given == (Conclusion("c", "failed: not started, it would wait for itself", ok=False),)
        assert brief(m.on_event("root", child("c"))) == ["start root.c"], "the id is free for a better try"

    def test_a_child_cannot_wait_for_itself(self) -> None:
        m = started()
        assert m.on_event("root", child("a", "a")) == []
        assert m.repairs["cycle"] == 1

    def test_dependants_of_a_failed_child_start_and_can_read_why(self) -> None:
        m = started("a")
        m.on_event("root", child("b", "a"))
        start = m.on_end("root.a", EndReason.LENGTH, "thinking out loud")[-1]
        assert isinstance(start, Start)
        assert [(c.id, c.ok) for c in start.given] == [("a", False)]
        assert "token budget" in start.given[0].answer


class TestSolvesAfresh:
    def test_a_root_that_stays_whole_is_solved_by_a_direct_node(self) -> None:
        m = started(solves_afresh=True)
        assert brief(m.on_event("root", Atomic(""))) == ["stop root", "start root!direct"]
        assert m.nodes["root!direct"].task == "the task"
        finish = m.on_end("root!direct", EndReason.EOS, "FINAL: 4")[-1]
        assert finish == Finish(Status.ATOMIC, "FINAL: 4")

    def test_so_is_one_that_declares_its_own_task(self) -> None:
        m = started(solves_afresh=True)
        assert brief(m.on_event("root", Child("a", "The task"))) == ["stop root", "start root!direct"]

    def test_what_it_wrote_is_the_answer_however_it_ends_as_in_a_direct_run(self) -> None:
        for reason in (EndReason.EOS, EndReason.LENGTH, EndReason.CONTEXT):
            m = started(solves_afresh=True)
            m.on_event("root", Atomic(""))
            assert m.on_end("root!direct", reason, "so far")[-1] == Finish(Status.ATOMIC, "so far")
        m = started(solves_afresh=True)
        m.on_event("root", Atomic(""))
        assert brief(m.on_end("root!direct", EndReason.ERROR, "so far"))[-1] == "finish failed"
        fallback = started(solves_afresh=True)
        fallback.on_end("root", EndReason.EOS, "")
        assert brief(fallback.on_end("root!direct", EndReason.LENGTH, "so far"))[-1] == "finish invalid"

    def test_without_an_answer_the_run_is_invalid(self) -> None:
        m = started(solves_afresh=True)
        m.on_event("root", Atomic(""))
        assert brief(m.on_end("root!direct", EndReason.EOS, "")) == ["stop root!direct", "finish invalid"]

    def test_an_answer_or_a_child_is_no_reason_to_begin_again(self) -> None:
        m = started("a", solves_afresh=True)
        assert brief(m.on_event("root.a", Atomic(""))) == ["pause root.a", "resume root.a"]
        assert brief(started(solves_afresh=True).on_event("root", Atomic("4"))) == ["stop root", "finish atomic"]


class TestIds:
    def test_a_taken_id_is_renamed_and_still_answers_to_its_name(self) -> None:
        m = started()
        m.on_event("root", Child("a", "first"))
        assert brief(m.on_event("root", Child("a", "second"))) == ["start root.a_2"]
        m.on_event("root", Await(("a",)))  # both: no child that was asked for is lost
        m.on_event("root.a_2", Atomic("two"))
        resume = resume_of(m.on_event("root.a", Atomic("one")))
        assert resume.conclusions == (concluded("root.a", "one"), concluded("root.a_2", "two"))
        assert resume.notes == ("This child a is called a_2.",)

    def test_the_same_child_again_is_ignored(self) -> None:
        m = started("a")
        assert m.on_event("root", child("a")) == []
        assert m.repairs == {"repeated_child": 1}

    def test_siblings_with_one_task_are_one_node_that_answers_to_both_names(self) -> None:
        m = started()
        m.on_event("root", Child("late", "needs b", ("b",)))
        m.on_event("root", Child("a", "Find 5!"))
        assert m.on_event("root", Child("b", ' "find  5!." ')) == []
        assert m.repairs == {"same_task": 1} and list(m.nodes) == ["root", "root.late", "root.a"]
        assert brief(m.on_event("root", Child("c", "Find 5"))) == ["start root.c"]
        assert brief(m.on_event("root.a", Atomic("120"))) == ["stop root.a", "start root.late"]
        resume = resume_of(m.on_event("root", Await(("b", "a"))))
        assert resume.conclusions == (concluded("root.a", "120", id="b"), concluded("root.a", "120"))
        assert resume.notes == ("Child b has the task of a and is not solved a second time.",)
        assert m.repairs == {"same_task": 1}, "its other name is no child that was awaited before"

    def test_where_one_of_its_names_is_awaited_it_is_told_under_all(self) -> None:
        m = started()
        for name, task in (("a", "t"), ("b", "other"), ("c", "t")):
            m.on_event("root", Child(name, task))
        m.on_event("root.a", Atomic("1"))
        assert [c.id for c in resume_of(m.on_event("root", Await(("c",)))).conclusions] == ["c", "a"]
        m.on_event("root", Await(("a",)))
        assert m.repairs == {"same_task": 1, "repeated_await": 1}

    def test_a_name_that_is_taken_is_renamed_for_it_too(self) -> None:
        m = started()
        m.on_event("root", Child("a", "one"))
        m.on_event("root", Child("b", "two"))
        m.on_event("root", Child("a", "Two."))
        m.on_event("root.a", Atomic("1"))
        m.on_event("root.b", Atomic("2"))
        told = resume_of(m.on_event("root", Await())).conclusions
        assert [(c.id, c.answer, c.node) for c in told] == [
            ("a", "1", "root.a"),
            ("b", "2", "root.b"),
            ("a_2", "2", "root.b"),
        ]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Find N.", "Find n."),
            ("Find AB.", "Find ab."),
            ("Find 5!", "Find 5"),
            ("Find f'", "Find f"),
            ("Find x^2", "Find x²"),
            ("Question (1)", "Question (2)"),
            ("Find -5", "Find 5"),
        ],
    )
    def test_what_may_mean_something_else_is_another_task(self, one: str, other: str) -> None:
        m = started()
        m.on_event("root", Child("a", one))
        assert brief(m.on_event("root", Child("b", other))) == ["start root.b"]

    @pytest.mark.parametrize("other", ["FIND the sum", "Task: Find the sum", "“Find the sum.”", "Find\n the  sum?"])
    def test_how_it_is_written_makes_no_other_task(self, other: str) -> None:
        m = started()
        m.on_event("root", Child("a", "Find the Sum."))
        assert m.on_event("root", Child("b", other)) == [] and m.repairs == {"same_task": 1}

    def test_a_name_that_would_make_a_sibling_wait_for_itself_is_refused(self) -> None:
        m = started()
        m.on_event("root", Child("a", "t", ("b",)))
        m.on_event("root", Child("b", "t", ("b",)))
        assert m.repairs == {"cycle": 1}
        assert "wait for itself" in resume_of(m.on_event("root", Await(("b",)))).conclusions[0].answer

    def test_a_child_with_its_parents_task_makes_the_parent_solve_it(self) -> None:
        m = started()
        commands = m.on_event("root", Child("a", "'The TASK.'"))
        assert brief(commands) == ["pause root", "resume root"]
        assert resume_of(commands).phase is Phase.SOLVER and m.repairs == {"own_task": 1}
        assert resume_of(commands).notes == ("Child a was not started: it has the task of this node itself.",)

    def test_a_child_with_the_task_of_a_node_further_up_makes_its_parent_solve_its_own(self) -> None:
        m = started("a", max_depth=3)
        commands = m.on_event("root.a", Child("b", "The task"))
        assert brief(commands) == ["pause root.a", "resume root.a"] and m.repairs == {"own_task": 1}
        assert resume_of(commands).notes == ("Child b was not started: it has the task of a node above this one.",)

    def test_a_child_with_its_parents_task_beside_others_is_only_refused(self) -> None:
        m = started("a")
        assert m.on_event("root", Child("b", "the task")) == [] and m.repairs == {"own_task": 1}

    def test_a_child_may_be_tried_again_once_its_conclusion_was_read(self) -> None:
        m = started("a")
        m.on_end("root.a", EndReason.LENGTH, "")
        m.on_event("root", Await())
        assert brief(m.on_event("root", child("a"))) == ["start root.a_2"]

    def test_a_namesake_may_depend_on_the_first(self) -> None:
        m = started()
        m.on_event("root", Child("a", "draft"))
        assert m.on_event("root", Child("a", "refine the draft", ("a",))) == []
        assert brief(m.on_event("root.a", Atomic("A"))) == ["stop root.a", "start root.a_2"]

    def test_two_names_of_one_dependency_are_given_once(self) -> None:
        m = started()
        m.on_event("root", Child("a", "first"))
        m.on_event("root", Child("a", "second"))
        m.on_event("root.a_2", Atomic("two"))
        m.on_event("root", child("b", "a", "a_2"))
        assert m.nodes["root.b"].given == (concluded("root.a_2", "two"),), "a dependency means the latest"

    def test_refused_namesakes_are_not_meant(self) -> None:
        m = started(max_width=1)
        m.on_event("root", Child("a", "first"))
        m.on_event("root", Child("a", "second"))
        m.on_event("root", Await(("a",)))
        assert [c.id for c in resume_of(m.on_event("root.a", Atomic("A"))).conclusions] == ["a"]

    def test_a_child_accepted_at_the_second_try_counts_from_then(self) -> None:
        m = started()
        m.on_event("root", Child("late", ""))
        m.on_event("root", child("early"))
        m.on_event("root", child("late"))
        m.on_event("root.early", Atomic("E"))
        m.on_event("root", Await())
        resume = resume_of(m.on_event("root.late", Atomic("L")))
        assert [c.answer for c in resume.conclusions] == ["E", "L"]
        assert resume.notes == ("Child late was not started: it has no task.",)

    def test_ids_cannot_break_paths(self) -> None:
        m = started()
        assert brief(m.on_event("root", child("a.b!"))) == ["start root.a_b_"]
        assert brief(m.on_event("root", child("", "a.b!"))) == []
        assert brief(m.on_event("root.a_b_", Atomic("x"))) == ["stop root.a_b_", "start root.child"]
        assert m.repairs == {"invalid_id_renamed": 2}


class TestLimits:
    def test_the_deepest_nodes_solve_and_do_not_split(self) -> None:
        m = started(max_depth=1)
        (start,) = m.on_event("root", child("a"))
        assert isinstance(start, Start)
        assert start.phase is Phase.SOLVER
        assert m.on_event("root.a", child("b")) == []
        assert m.repairs["over_depth"] == 1
        assert brief(m.on_end("root.a", EndReason.EOS, "It is 4.")) == ["stop root.a"]

    def test_width_is_per_round(self) -> None:
        m = started("a", max_width=1)
        assert m.on_event("root", child("b")) == []
        m.on_event("root.a", Atomic("A"))
        resume = resume_of(m.on_event("root", Await(("a", "b"))))
        why = "a node starts at most 1 children at a time"
        assert resume.conclusions[1] == Conclusion("b", f"failed: not started, {why}", ok=False)
        assert resume.notes == (f"Child b was not started: {why}.",)
        assert brief(m.on_event("root", child("b"))) == ["start root.b"], "a new round"

    def test_the_graph_has_at_most_max_nodes_nodes(self) -> None:
        m = started("a", max_nodes=2)
        assert m.on_event("root.a", child("b")) == []
        assert m.repairs["over_nodes"] == 1

    def test_a_node_that_ends_before_it_knows_of_a_refusal_reads_of_it(self) -> None:
        m = started("a", max_nodes=1)
        pause, resume = m.on_event("root", Done())
        assert pause == Pause(ROOT)
        assert resume == Resume(
            ROOT, Phase.CONTINUATION, notes=("Child a was not started: the graph has all its 1 nodes.",)
        )

    def test_what_a_node_has_read_of_neither_keeps_it_from_ending_nor_comes_again(self) -> None:
        m = started("a", max_nodes=1)
        assert resume_of(m.on_event("root", Await())).notes
        assert resume_of(m.on_event("root", Await())).notes == ("There was no child to await.",)
        assert brief(m.on_event("root", Done(), text="It is 4.")) == ["stop root", "finish atomic"]

    def test_notes_of_one_resume_are_few(self) -> None:
        m = started(max_width=0)
        for i in range(100):
            m.on_event("root", child(f"c{i}"))
        assert len(resume_of(m.on_event("root", Await())).notes) == MAX_NOTES
        assert m.repairs["over_width"] == 100


def test_resumes_go_before_starts_and_deeper_nodes_before_older_ones() -> None:
    m = started()
    for name, needs in (("a", ()), ("first", ("a",)), ("second", ("a",))):
        m.on_event("root", replace(child(name), depends_on=needs))
    m.on_event("root", Await(("a",)))
    assert brief(m.on_event("root.a", Atomic("A"))) == [
        "stop root.a",
        "resume root",
        "start root.first",
        "start root.second",
    ]


def test_cancel_ends_everything_once() -> None:
    m = started("a")
    m.on_event("root", Await())
    commands = m.cancel("the user left")
    assert commands == [
        Cancel(ROOT, "the user left"),
        Cancel(NodePath("root.a"), "the user left"),
        Finish(Status.FAILED, "", error="the user left"),
    ]
    assert m.cancel("again") == m.on_end("root.a", EndReason.EOS, "x") == []


def test_a_fork_starts_from_its_parents_context() -> None:
    m = GraphMachine("t", Limits(), child_context="parent")
    assert m.start() == [Start(ROOT, Phase.GRAPH, "t")]
    (start,) = m.on_event("root", Child("a", "ta"))
    assert start == Start(NodePath("root.a"), Phase.GRAPH, "ta", parent=ROOT, depth=1, fork=True)


def test_malformed_events_are_counted_and_told() -> None:
    m = started()
    m.on_malformed("root", Malformed('{"type":"chid"}', "unknown type chid", 0, 15))
    assert resume_of(m.on_event("root", Await())).notes[0] == "An event was not understood: unknown type chid."
    assert m.repairs["malformed"] == 1


def test_a_path_that_was_never_declared_is_the_drivers_mistake() -> None:
    with pytest.raises(KeyError):
        started().on_event("root.nobody", Done())


def test_a_graph_thousands_of_levels_deep_unwinds_without_recursion() -> None:
    depth = 3000
    m = started(max_depth=depth, max_nodes=depth + 1)
    path = "root"
    for level in range(depth):
        m.on_event(path, Child("c", f"task of level {level}"))
        m.on_event(path, Await())
        path += ".c"
    while m.finished is None:
        commands = m.on_event(path, Atomic("FINAL: 1"))
        path = path.rpartition(".")[0]
        assert len(commands) == 2
    assert m.finished.status is Status.GRAPH
