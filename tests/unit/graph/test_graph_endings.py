"""The graph machine by example: how nodes wait for their children, conclude, fail and fall back."""

import pytest
from graphs import brief, child, concluded, resume_of, started

from rrm_engine.graph.paths import ROOT, NodePath
from rrm_engine.graph.states import NodeState
from rrm_engine.graph.types import EndReason, Finish, Pause, Phase, Resume, Start, Status, Stop
from rrm_engine.protocol.events import Atomic, Await, Done, Malformed


class TestAwait:
    def test_conclusions_that_are_there_already_come_at_once(self) -> None:
        m = started("a")
        m.on_event("root.a", Atomic("A"))
        assert m.on_event("root", Await(("a",))) == [
            Pause(ROOT),
            Resume(ROOT, Phase.CONTINUATION, (concluded("root.a", "A"),)),
        ]

    def test_no_names_mean_all_children_not_yet_awaited(self) -> None:
        m = started()
        for name in "abc":
            m.on_event("root", child(name))
            m.on_event(f"root.{name}", Atomic(name.upper()))
        m.on_event("root", Await(("b",)))
        resume = resume_of(m.on_event("root", Await()))
        assert [c.id for c in resume.conclusions] == ["a", "c"]

    def test_awaiting_nothing_known_resumes_with_a_note(self) -> None:
        m = started("a")
        resume = resume_of(m.on_event("root", Await(("A",))))
        assert resume.notes == ("There is no child A; not yet awaited: a.",)
        assert resume.conclusions == ()

    def test_a_conclusion_is_delivered_once(self) -> None:
        m = started("a")
        m.on_event("root.a", Atomic("A"))
        assert len(resume_of(m.on_event("root", Await(("a", "a")))).conclusions) == 1
        assert resume_of(m.on_event("root", Await(("a",)))).notes == ("Child a was awaited before.",)

    def test_beyond_max_awaits_the_node_is_told_to_answer_and_then_left_to_its_budget(self) -> None:
        m = started("a", max_awaits=1)
        m.on_event("root.a", Atomic("A"))
        m.on_event("root", Await())
        last = resume_of(m.on_event("root", Await()))
        assert last.notes == ("You cannot await any more. Answer now with what you have.",)
        assert m.on_event("root", Await()) == []
        assert m.repairs["over_awaits"] == 2

    def test_beyond_max_awaits_the_end_is_the_end(self) -> None:
        m = started(max_awaits=1)
        m.on_event("root", Await())
        m.on_event("root", child("a"))
        commands = m.on_event("root", Done(), text="It is 4.")
        assert brief(commands) == ["stop root", "cancel root.a", "finish graph"]

    @pytest.mark.parametrize("reason", [EndReason.EOS, EndReason.LENGTH])
    def test_a_sequence_that_ends_with_children_running_awaits_them(self, reason: EndReason) -> None:
        m = started("a")
        assert m.on_end("root", reason, "FINAL: hasty") == []  # ended by itself: there is nothing to pause
        assert m.nodes["root"].state is NodeState.AWAITING
        assert brief(m.on_event("root.a", Atomic("A"))) == ["stop root.a", "resume root"]
        assert m.repairs == {"implicit_await": 1}

    def test_done_with_children_running_awaits_them(self) -> None:
        m = started("a")
        assert m.on_event("root", Done(), text="") == [Pause(ROOT)]

    def test_what_a_paused_node_had_in_flight_is_ignored(self) -> None:
        m = started("a")
        m.on_event("root", Await())
        assert m.on_event("root", Atomic("hasty")) == m.on_end("root", EndReason.EOS, "") == []
        assert m.on_malformed("root", Malformed("{", "unclosed", 0, 1)) == []
        assert not m.repairs


class TestConclusions:
    def test_atomic_without_an_answer_turns_to_solving(self) -> None:
        m = started()
        assert m.on_event("root", Atomic()) == [Pause(ROOT), Resume(ROOT, Phase.SOLVER)]
        assert brief(m.on_end("root", EndReason.EOS, "So it is 7.")) == ["stop root", "finish atomic"]

    def test_a_node_that_chose_to_solve_does_not_split(self) -> None:
        m = started()
        m.on_event("root", Atomic())
        assert m.on_event("root", child("a")) == []
        assert m.repairs == {"over_depth": 1}
        assert brief(m.on_event("root", Atomic(), text="It is 4.")) == ["stop root", "finish atomic"]

    def test_atomic_without_an_answer_is_done_where_there_are_children(self) -> None:
        m = started("a")
        assert m.on_event("root", Atomic()) == [Pause(ROOT)]
        assert m.repairs == {"implicit_await": 1}

    def test_an_answer_abandons_the_children_still_running(self) -> None:
        m = started("quick")
        m.on_event("root.quick", Atomic("q"))
        m.on_event("root", child("a"))
        m.on_event("root.a", child("deep"))
        m.on_event("root", child("late", "a"))
        commands = m.on_event("root", Atomic("FINAL: 1"))
        assert brief(commands) == ["stop root", "cancel root.a", "cancel root.a.deep", "finish graph"]
        assert m.nodes["root.late"].state is NodeState.CANCELLED  # never started: nothing to cancel
        assert m.nodes["root.quick"].state is NodeState.CONCLUDED

    def test_done_concludes_with_the_text_before_it(self) -> None:
        m = started("a")
        assert m.on_event("root.a", Done(), text="It is 4.\n") == [
            Stop(NodePath("root.a"), concluded("root.a", "It is 4."))
        ]

    def test_a_child_is_told_by_its_answer_or_its_last_sentences(self) -> None:
        m = started(max_depth=1)
        for name in "ab":
            m.on_event("root", child(name))
        long = "One has to think about it. " * 40
        (stop,) = m.on_end("root.a", EndReason.EOS, f"{long}\n**Answer:** 10")
        assert stop == Stop(NodePath("root.a"), concluded("root.a", "FINAL: 10")) and not m.repairs
        (stop,) = m.on_end("root.b", EndReason.EOS, f"{long}It cannot be told. There is no more to say.")
        assert stop == Stop(NodePath("root.b"), concluded("root.b", "It cannot be told. There is no more to say."))
        assert m.repairs == {"unmarked_answer": 1}

    def test_an_answer_in_prose_is_that_of_a_root_asked_for_a_graph(self) -> None:
        text = "Nothing to split here. " * 40 + "The answer is 10."
        assert started().on_end("root", EndReason.EOS, text)[-1] == Finish(Status.ATOMIC, text)
        assert brief(started().on_end("root", EndReason.EOS, "The answer is not 10."))[-1] == "start root!direct"
        assert brief(started().on_end("root", EndReason.LENGTH, "The answer is 10. So"))[-1] == "start root!direct"

    def test_done_without_text_leaves_the_decision_to_the_end(self) -> None:
        m = started("a")
        assert m.on_event("root.a", Done()) == []
        assert brief(m.on_end("root.a", EndReason.EOS, "It is 4.")) == ["stop root.a"]

    def test_text_cut_off_after_its_final_counts_by_its_final(self) -> None:
        m = started(max_depth=0)
        commands = m.on_end("root", EndReason.LENGTH, "FINAL: 4\nWait, let me check again and again and")
        assert commands[-1] == Finish(Status.ATOMIC, "FINAL: 4")

    def test_a_child_that_wrote_nothing_fails(self) -> None:
        m = started("a")
        (stop,) = m.on_end("root.a", EndReason.EOS, " \n")
        assert stop == Stop(NodePath("root.a"), concluded("root.a", "failed: it ended without an answer", ok=False))


class TestFallback:
    def test_prose_instead_of_a_graph_falls_back_to_a_direct_solve(self) -> None:
        m = started()
        commands = m.on_end("root", EndReason.EOS, "I would first look at x.")
        assert brief(commands) == ["stop root", "start root!direct"]
        assert commands[-1] == Start(NodePath("root!direct"), Phase.DIRECT, "the task")
        assert m.on_event("root!direct", child("a")) == []
        commands = m.on_end("root!direct", EndReason.EOS, "FINAL: 9")
        assert commands[-1] == Finish(Status.FALLBACK, "FINAL: 9")

    def test_prose_with_a_final_is_an_answer(self) -> None:
        assert brief(started().on_end("root", EndReason.EOS, "Easy. FINAL: 9"))[-1] == "finish atomic"

    def test_a_failing_root_takes_its_children_along(self) -> None:
        m = started("a")
        commands = m.on_end("root", EndReason.CONTEXT, "")
        assert brief(commands) == ["stop root", "cancel root.a", "start root!direct"]

    @pytest.mark.parametrize(
        ("reason", "status"), [(EndReason.LENGTH, Status.INVALID), (EndReason.ERROR, Status.FAILED)]
    )
    def test_when_nothing_helps(self, reason: EndReason, status: Status) -> None:
        m = started()
        m.on_end("root", EndReason.LENGTH, "")
        finish = m.on_end("root!direct", reason, "")[-1]
        assert isinstance(finish, Finish)
        assert (finish.status, finish.answer) == (status, "")
        assert finish.error

    def test_an_error_of_the_root_is_remembered_when_the_fallback_does_not_help(self) -> None:
        m = started()
        m.on_end("root", EndReason.ERROR, "")
        commands = m.on_end("root!direct", EndReason.LENGTH, "")
        assert brief(commands) == ["stop root!direct", "finish failed"]
