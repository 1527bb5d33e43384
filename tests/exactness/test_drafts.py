"""Tokens that were guessed and run together: a sequence has those that it would have had without, and nothing is kept
of the rest.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import broken
import pytest
import torch
from foretold import Foretold
from hypothesis import given
from lab import JOBS, Lab, Recorded, engine_of, recorded, wrong_tokens
from lives import Life, prompt, submitted
from oracle import engine_for, plain_model
from oracle import prompt as random_prompt
from random_lives import ACTIONS, SETTINGS, assert_noticed, live_through, lives

from rrm_engine.config import RunConfig, WaitPolicy
from rrm_engine.engine import engine as engine_module
from rrm_engine.engine.draft import FORCED, MOST, Drafting, Lookup, RowCosts
from rrm_engine.engine.draw import draw
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.flight import Flight
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import Work
from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.errors import RrmError
from rrm_engine.loading.prepare import prepare_model

DRAFTS = lives(drafts=True)
OVERLAPPING = lives(drafts=True, lookahead=True, stages=(1, 1, 2, 4))
POLICIES = get_args(WaitPolicy)
NONE: frozenset[int] = frozenset()


# bookkeeping


@SETTINGS
@given(DRAFTS, ACTIONS)
def test_any_life_with_drafts_ends_and_every_query_reads_its_own_history(life: Life, actions: Any) -> None:
    live_through(life, actions)


@SETTINGS
@given(OVERLAPPING, ACTIONS)
def test_drafts_in_steps_that_overlap(life: Life, actions: Any) -> None:
    live_through(life, actions)


@pytest.mark.parametrize("right", [(100,), (0,), (2,), (0, 1, 2, 3, 100)])
def test_a_step_gives_what_came_true_and_one_token_more(right: tuple[int, ...]) -> None:
    life = Life(30, 4, 60, right=right, step_tokens=30)
    sequence = submitted(life.submit(prompt(5), 30))
    life.step()
    while sequence.state is not State.PAUSED:
        known, drafted, launched = len(sequence.tokens), sequence.counters.drafted, life.engine.launched
        most = min(MOST, sequence.budget - 1)
        life.step()
        assert life.engine.launched == launched + 1
        while life.engine.left:  # nothing is launched until all have been handed out
            life.step()
        assert life.engine.launched == launched + 1
        assert sequence.counters.drafted == drafted + most, "no token is drafted that could not be had"
        assert len(sequence.tokens) == known + min(right[known % len(right)], most) + 1
    assert len(sequence.tokens) == 35
    life.end()


def test_no_draft_is_longer_than_a_sequence_may_become() -> None:
    life = Life(30, 4, 12, right=(100,), step_tokens=30)
    sequence = submitted(life.submit(prompt(5), 30))
    life.drain()
    assert (len(sequence.tokens), sequence.counters.drafted) == (12, 12 - 6 - 1)
    life.end()


@pytest.mark.parametrize("taken", range(1, MOST + 1, 3))
def test_a_sequence_paused_between_the_tokens_of_a_step_has_those_that_were_handed_out(taken: int) -> None:
    life = Life(30, 4, 60, right=(100,), step_tokens=30)
    sequence = submitted(life.submit(prompt(5), 30))
    for _ in range(1 + taken):
        life.step()
    assert life.engine.left and len(sequence.tokens) == 6 + taken == sequence.table.length - (MOST - taken)
    counters = replace(sequence.counters)
    life.engine.pause(sequence)
    assert (sequence.table.length, sequence.flights) == (6 + taken, [])
    life.step()
    assert len(sequence.tokens) == 6 + taken and sequence.counters == counters and not life.engine.left
    life.resume(sequence, prompt(3), 4)
    life.drain()
    assert len(sequence.tokens) == 6 + taken + 3 + 4
    life.end()


def test_drafts_take_what_is_left_over() -> None:
    """No tokens beyond a step's, no block that a running sequence needs next; no sequence is preempted for them."""
    life = Life(60, 1, 60, right=(100,), step_tokens=3, prefix_cache=False)
    first = submitted(life.submit(prompt(9), 20))
    life.drain()
    assert 0 < first.counters.drafted <= 2 * 20
    life.finish(first)
    life = Life(12, 1, 12, right=(100,), step_tokens=50, prefix_cache=False)
    both = [submitted(life.submit(prompt(3), 4, root=i)) for i in range(2)]
    life.drain()
    assert [s.counters.preemptions for s in both] == [0, 0] and sum(s.counters.drafted for s in both) > 0
    life.end()


def test_a_sequence_with_a_guess_waits_for_the_token_in_flight_and_others_do_not() -> None:
    life = Life(60, 4, 60, right=(100, 100, 100, 0), step_tokens=50, lookahead=True)
    one, other = (submitted(life.submit(prompt(n), 20)) for n in (5, 6))
    life.drain()
    assert one.counters.accepted > 10 and other.counters.accepted > 10
    life.end()
    life = Life(60, 4, 60, lookahead=True, right=(0,), step_tokens=50)
    life.engine.drafting.most = 1  # type: ignore[union-attr]
    sequence = submitted(life.submit(prompt(5), 6))
    life.step()
    assert len(sequence.flights) == 1 and life.engine.launched == 2, "one token is not worth waiting for"
    life.end()


# exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafted_row_has_the_bits_of_a_single_decode(dtype: torch.dtype) -> None:
    """Compiled products and attention: what a row computes does not depend on the rows beside it, its own sequence's
    included.
    """
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    model = prepare_model(plain_model("qwen3").to(dtype), tokenizer, "qwen3")
    if "compiled" not in model.attention:
        pytest.skip(f"no compiled kernels here: {model.attention}")

    def lived(engine: Engine) -> tuple[dict[str, list[int]], dict[tuple[str, int], torch.Tensor]]:
        """Tokens of some sequences, and by sequence and place the logits of each that was decoded last there."""
        rows: dict[tuple[str, int], torch.Tensor] = {}

        def note(found: torch.Tensor, order: list[Work]) -> None:
            places = [(work.sequence.key, work.start + work.count) for work in order]
            rows.update({place: row.clone() for place, row in zip(places, found, strict=True)})

        engine.runner.observe = note
        sequences = [engine.submit(f"s{i}", random_prompt(i, 9 + 17 * i), 30, SamplingParams()) for i in range(3)]
        while engine.has_work:
            engine.step()
        return {s.key: s.tokens for s in sequences}, rows

    tokens, single = lived(engine_for(model, step_tokens=512))
    engine = engine_for(model, step_tokens=512)
    engine.draft(Foretold(tokens, NONE))
    again, drafted = lived(engine)
    assert again == tokens and engine.steps < 20
    assert len(single) == 90 and all(torch.equal(row, drafted[place]) for place, row in single.items())


def test_rows_and_counters_say_what_was_drafted(lab: Lab) -> None:
    drafted = recorded(lab, JOBS[:1], draft="4")
    ends = [end["counters"] for end in drafted.ends().values()]
    assert all(0 <= c["accepted"] <= c["drafted"] for c in ends) and sum(c["accepted"] for c in ends) > 0
    assert not any(end["counters"]["drafted"] for end in recorded(lab, JOBS[:1]).ends().values())


# guesses


def test_look_up_takes_the_longest_match_and_of_equals_the_last_one() -> None:
    def after(tokens: list[int], guessed: list[int] = [], most: int = 4) -> tuple[list[int], int]:  # noqa: B006
        return Lookup().after(tokens, guessed, most)

    assert after([1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 8, 8, 1, 2, 3]) == ([4, 5, 6, 7], 3)
    assert after([7, 2, 3, 4, 9, 2, 3, 8, 8, 8, 1, 2, 3]) == ([8, 8, 8, 1], 2)
    assert after([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 8, 1, 2, 3]) == ([5, 6, 7, 8], 3)
    assert after([1, 2, 3, 4]) == after([1]) == after([]) == ([], 0)
    assert after([1, 2, 3, 4, 9, 1], [2, 3]) == ([4, 9, 1, 2], 3), "after what was guessed"
    assert after([5, 1, 2, 1, 2], most=7) == ([1, 2, 1, 2, 1, 2, 1], 2), "on and on"
    assert after([1, 2, 3, 9, 1], [2], most=8) == ([3, 9, 1, 2, 3, 9, 1, 2], 2), "over what was guessed"


def test_look_up_learns_what_is_new_and_is_not_misled_by_what_is_gone() -> None:
    lookup, tokens = Lookup(), prompt(60, 3)
    for length in range(3, 60):
        for _ in range(2):
            fresh = Lookup().after(tokens[:length], [], 5)
            assert lookup.after(tokens[:length], [], 5) == fresh
    shorter = [*tokens[:20], 9, 8, 7, 9, 8]
    assert lookup.after(shorter, [], 3)[0] in ([7, 9, 8], [])
    assert lookup.after([*tokens[:5], 4, 4], [], 3) == ([], 0)


def test_what_a_grammar_forces_is_guessed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a child's first characters its line goes on in one way only, up to its task."""
    guessed: list[str] = []
    guess = Drafting.guess

    def watched(self: Drafting, sequence: Sequence) -> Any:
        found = guess(self, sequence)
        guessed.append(lab.model.tokenizer.decode([token for token, source in found if source == FORCED]))
        return found

    monkeypatch.setattr(Drafting, "guess", watched)
    recorded(lab, JOBS[:2], draft="64")
    assert any('2","task' in one for one in guessed), "the line of a second child"


def test_drafts_follow_what_came_true_and_what_rows_cost() -> None:
    free, dear = RowCosts((1, 8, 16), (1.0, 1.0, 1.0), 0.0), RowCosts((1, 8, 16), (1.0, 8.0, 16.0), 0.0)
    assert [free.step(n) for n in (1, 5, 16, 64)] == [1, 1, 1, 4] and [dear.step(n) for n in (3, 12, 32)] == [3, 12, 32]
    assert RowCosts((1, 8), (1.0, 1.0), 0.5).row(3, 10) == 5.0
    sequence = submitted(Life(30, 4, 60).submit([1, 2, 3, 4, 5, 1, 2, 3], 20))
    assert sequence is not None
    drafting = Drafting(8, NONE, free)
    assert drafting.choose([sequence], 1, 100) == {sequence: [4, 5, 1, 2, 3, 4, 5, 1]}
    assert drafting.choose([sequence], 1, 2) == {sequence: [4, 5]} and drafting.choose([sequence], 1, 0) == {}
    assert Drafting(8, NONE, dear).choose([sequence], 1, 100) == {}
    some = RowCosts((1, 16), (1.0, 7.0), 0.0)
    drafting = Drafting(8, NONE, some)
    counts = []
    for hits in (8, 8, 8, 8, *[0] * 12):
        draft = drafting.choose([sequence], 1, 100).get(sequence, [])
        counts.append(len(draft))
        drafting.checked(sequence, len(draft), min(hits, len(draft)))
    assert counts[4] > counts[0] > counts[-1] == 0
    for _ in range(60):
        waited = drafting.choose([sequence], 1, 100)
    assert waited, "what did not come true is tried again some day"


# settings


@pytest.mark.parametrize("value", ["0", "-1", "some", "", "1.5"])
def test_what_draft_takes(value: str) -> None:
    with pytest.raises(RrmError, match="--draft takes auto, off, or the most tokens"):
        RunConfig(draft=value)


# negative controls


def test_a_wrong_draft_that_is_taken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.drafts_are_believed(monkeypatch)
    assert_noticed("not the sequence's token", some_lives=DRAFTS)


def test_kv_of_a_wrong_draft_that_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.kv_of_wrong_drafts(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        live = Life(30, 4, 60, right=(0,), step_tokens=16)
        submitted(live.submit(prompt(5), 30))
        live.end()


@pytest.mark.parametrize("fault", ["noise", "grammar"])
def test_noise_or_grammar_of_another_place_is_noticed(lab: Lab, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a draft are drawn like the first of them."""
    alone = recorded(lab, JOBS[:1])
    run = Recorded(lab.solver())
    known = {key: end["token_ids"] for key, end in alone.ends().items()}
    engine_of(run.solver).draft(Foretold(known, engine_of(run.solver).eos_ids))
    if fault == "noise":

        def at_the_first(logits: Any, sequences: Any, positions: Any, *rest: Any) -> Any:
            first: dict[Sequence, int] = {}
            return draw(
                logits, sequences, [first.setdefault(s, p) for s, p in zip(sequences, positions, strict=True)], *rest
            )

        monkeypatch.setattr(engine_module, "draw", at_the_first)
    else:
        monkeypatch.setattr(Flight, "matchers", lambda flight: [work.sequence.matcher for work in flight.order])
    run.run(JOBS[:1], 1)
    assert run.rows() != alone.rows() or wrong_tokens(lab.plain, run) != {}
