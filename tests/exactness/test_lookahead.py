"""A step launched before the tokens of the one before are known: nothing is mixed up or held longer than needed."""

from dataclasses import replace
from typing import Any, get_args

import broken
import pytest
import torch
from hypothesis import given
from lab import JOBS, TASKS, Lab, recorded, wrong_tokens
from lab import SETTINGS as LAB_SETTINGS
from lives import EOS, Life, prompt, submitted
from random_lives import ACTIONS, SETTINGS, assert_noticed, live_through, lives

from rrm_engine.backends.local import Solver
from rrm_engine.backends.settings import _lookahead
from rrm_engine.config import RunConfig, WaitPolicy
from rrm_engine.engine.draw import draw
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.flight import Flight
from rrm_engine.engine.sequence import State
from rrm_engine.kv.table import BlockTable

AHEAD = lives(lookahead=True)
POLICIES = get_args(WaitPolicy)


# bookkeeping


@SETTINGS
@given(AHEAD, ACTIONS)
def test_any_life_that_looks_ahead_ends_and_every_query_reads_its_own_history(life: Life, actions: Any) -> None:
    live_through(life, actions)


def test_one_sequence_is_in_two_steps_at_once() -> None:
    life = Life(20, 4, 40, lookahead=True)
    sequence = submitted(life.submit(prompt(5), 6))
    for known in range(1, 5):
        life.step()
        assert (len(sequence.tokens), len(sequence.flights), life.engine.launched) == (5 + known, 1, known + 1)
    life.drain()
    assert len(sequence.tokens) == 11
    assert life.memory.queries == 5 + 5, "a token was run for nothing, though the budget says where it ends"
    life.end()


def test_a_token_after_an_unforeseen_end_is_thrown_away() -> None:
    """An end of sequence is known only when the next step is under way: its token and its KV are gone."""
    foreseen = []
    for salt in range(30):
        life = Life(20, 4, 30, lookahead=True, eos=True)
        sequence = submitted(life.submit(prompt(5, salt), salt % 5 + 1))
        while sequence.state is not State.PAUSED:
            life.step()
        foreseen.append(sequence.budget == 0)
        assert foreseen[-1] or sequence.tokens[-1] == EOS
        assert EOS not in sequence.tokens[5:-1] and sequence.flights == []
        assert sequence.table.length <= len(sequence.tokens)
        assert life.memory.queries == len(sequence.tokens) - foreseen[-1]
        life.end()
    assert 5 < sum(foreseen) < 25


def test_a_child_runs_in_the_step_after_its_line_is_known() -> None:
    life = Life(40, 4, 40, lookahead=True)
    parent = submitted(life.submit(prompt(5), 12))
    life.step()
    life.step()
    child = submitted(life.submit([*parent.tokens, 1], 4, depth=1, fork_of=(parent, len(parent.tokens))))
    launched = life.engine.launched
    life.step()
    assert child.admitted[1] == launched + 1
    life.end()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_paused_with_two_steps_in_flight_keeps_what_is_known(policy: WaitPolicy) -> None:
    life = Life(20, 4, 40, lookahead=True, wait_policy=policy, host_blocks=20)
    sequence = submitted(life.submit(prompt(6), 9))
    life.engine.launch()
    assert len(sequence.flights) == 2
    life.engine.pause(sequence)
    assert (sequence.table.length, sequence.flights) == (6, [])
    life.engine.wait(sequence)
    assert life.engine.collect() == life.engine.collect() == []
    life.resume(sequence, prompt(2), 3)
    life.drain()
    assert len(sequence.tokens) == 6 + 2 + 3
    life.end()


@pytest.mark.parametrize("stages", [1, 3])
def test_the_host_knows_the_tokens_of_one_step_while_the_next_one_runs(
    stages: int, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grammar or not: whenever tokens are collected in the middle of a run, the next step is already running."""
    running: list[int] = []
    collect = Engine.collect

    def watched(self: Engine) -> Any:
        running.append(self.launched - self.steps - 1)
        return collect(self)

    monkeypatch.setattr(Engine, "collect", watched)
    recorded(replace(lab, model=replace(lab.model, stages=stages)), lookahead="on")
    assert set(running) <= set(range(stages + 1)) and sum(map(bool, running)) > 0.8 * len(running)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("lookahead", ["on", "off"])
def test_no_node_is_said_to_have_queued_where_there_is_room(lab: Lab, lookahead: str, count: int) -> None:
    """A node in the first step launched after it was ready has not queued, even if another step was under way then."""
    config = RunConfig(prompt_style=str(lab.style), lookahead=lookahead, **{**LAB_SETTINGS, "kv_blocks": 2000})
    solver = Solver(lab.model, config, TASKS, [lab.model] * count)
    events: list[dict[str, Any]] = []
    results = list(solver.run(JOBS, events.append, concurrency=len(JOBS)))
    assert len(results) == len(JOBS) and len([e for e in events if e["event"] == "resume"]) > 2
    assert {e["queued_s"] for e in events if "queued_s" in e} == {0.0}


# settings


def test_what_auto_means_and_where_it_cannot_be_had(lab: Lab) -> None:
    cuda = replace(lab.model, device=torch.device("cuda"))
    assert _lookahead(RunConfig(), cuda) == "on"
    assert _lookahead(RunConfig(), replace(cuda, stages=2)) == "on"
    assert _lookahead(RunConfig(join="splice"), cuda) == "off", "the splice report reads tokens before the next step"
    assert lab.solver().resolved.lookahead == "off", "on a CPU there is no device to overlap the host's work with"
    with pytest.raises(ValueError, match="--splice-report 0"):
        lab.solver(lookahead="on", join="splice")
    assert lab.solver(lookahead="on", join="splice", splice_report=0).resolved.lookahead == "on"


# negative controls


def test_tokens_of_other_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.tokens_of_other_rows(monkeypatch)
    assert_noticed("not the sequence's token", some_lives=AHEAD)


def test_kv_of_a_token_that_was_thrown_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.kv_of_tokens_thrown_away(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_sequence_paused_with_two_steps_in_flight_keeps_what_is_known("pin")


def test_blocks_offered_before_their_tokens_are_known_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is offered as that of a token 0, and becomes that of another; a prompt with 0 there finds it."""

    def live() -> None:
        life = Life(12, 1, 8, lookahead=True)
        first = submitted(life.submit([0, 1], 4))
        life.step()
        assert first.table.length == len(first.tokens) == 3 and first.tokens[2] != 0
        submitted(life.submit([0, 1, 0, 0], 1))
        life.end()

    live()
    register = BlockTable.register

    def hasty(self: BlockTable, tokens: Any) -> None:
        register(self, [*tokens, 0][: max(len(tokens), self.length)])

    monkeypatch.setattr(BlockTable, "register", hasty)
    with pytest.raises(AssertionError, match="reads what is not its own"):
        live()


def test_a_grammar_that_is_asked_too_early_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is drawn as soon as it has been launched, whatever is still to be told to a grammar."""
    monkeypatch.setattr(Flight, "waits_for_tokens", False)
    try:
        noticed = wrong_tokens(lab.plain, recorded(lab, JOBS[:1], lookahead="on")) != {}
    except ValueError as error:
        noticed = "not allowed by the grammar" in str(error)
    assert noticed


def test_noise_of_another_place_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted by the tokens that are known, one too few for a sequence that runs ahead."""
    monkeypatch.setattr("rrm_engine.engine.engine.draw", short_of_one)
    assert wrong_tokens(lab.plain, recorded(lab, JOBS[:1], lookahead="on")) != {}


def short_of_one(logits: torch.Tensor, sequences: Any, positions: list[int], *_: Any) -> torch.Tensor:
    return draw(logits, sequences, [len(s.tokens) for s in sequences])
