"""Random lives on the bookkeeping: what may happen in one, and how it is lived through."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lives import Life
from searched import CONTROL, searched

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.sequence import State
from rrm_engine.kv.host import SwapCosts

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


MORE = st.lists(st.integers(0, 1), max_size=5)


WHO = st.integers(0, 50)


SHARE = st.floats(0, 1)


BUDGET = st.integers(1, 9)


RIGHT: list[tuple[int, ...]] = [(), (0,), (1,), (100,), (0, 3, 100), (2, 100, 100), (0, 0, 0, 5)]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), TOKENS, BUDGET, st.integers(0, 4)),
        st.tuples(st.just("child"), WHO, TOKENS, BUDGET),
        st.tuples(st.just("fork"), WHO, SHARE, MORE, BUDGET),
        st.tuples(st.just("pause"), WHO),
        st.tuples(st.just("wait"), WHO),
        st.tuples(st.just("resume"), WHO, MORE, BUDGET),
        st.tuples(st.just("resume"), WHO, MORE, BUDGET),
        st.tuples(st.just("truncate"), WHO, SHARE),
        st.tuples(st.just("keep"), WHO, WHO, SHARE, SHARE),
        st.tuples(st.just("join"), WHO, MORE.filter(len), BUDGET),
        st.tuples(st.just("finish"), WHO),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=25,
)


@st.composite
def lives(
    draw: st.DrawFn,
    least: int = 4,
    most: int = 24,
    stages: tuple[int, ...] = (1,),
    lookahead: bool = False,
    drafts: bool = False,
) -> Life:
    """Pools from the smallest that holds one longest sequence up to a comfortable one.

    ``drafts``: tokens are drafted, by look-up or right as often as is drawn.
    """
    size, longest = draw(st.integers(1, 5)), draw(st.integers(least, most))
    return Life(
        -(-longest // size) + draw(st.sampled_from([0, 0, 0, 1, 2, 5, 30])),
        size,
        longest,
        max_sequences=draw(st.sampled_from([1, 1, 2, 3, 64])),
        step_tokens=draw(st.sampled_from([1, 2, 5, 16, 100])),
        prefix_cache=draw(st.booleans()),
        eos=draw(st.booleans()),
        wait_policy=draw(st.sampled_from(get_args(WaitPolicy))),
        host_blocks=draw(st.sampled_from([0, 1, 5, 100])),
        costs=draw(st.sampled_from([None, SwapCosts(1.0, 0.1), SwapCosts(0.1, 1.0)])),
        stages=draw(st.sampled_from(stages)),
        lookahead=lookahead,
        right=draw(st.sampled_from(RIGHT)) if drafts else None,
    )


def act(life: Life, action: tuple[Any, ...]) -> None:
    engine, name, args = life.engine, action[0], action[1:]
    if name == "submit":
        tokens, budget, root = args
        life.submit(list(tokens), budget, root=root)
    elif name == "step":
        for _ in range(args[0]):
            life.step()
    elif life.sequences:
        sequence = life.sequences[args[0] % len(life.sequences)]
        paused = sequence.state is State.PAUSED
        where: dict[str, int] = {"root": sequence.root, "depth": sequence.depth + 1}
        if name == "child":
            life.submit(list(args[1]), args[2], **where)
        elif name == "fork":
            length = round(args[1] * len(sequence.tokens))
            if tokens := [*sequence.tokens[:length], *args[2]]:
                life.submit(tokens, args[3], fork_of=(sequence, length), **where)
        elif name == "pause":
            engine.pause(sequence)
        elif name == "wait":
            engine.pause(sequence)
            engine.wait(sequence)
        elif name == "resume" and paused:
            life.resume(sequence, list(args[1]), args[2])
        elif name == "truncate" and paused:
            engine.truncate(sequence, max(1, round(args[1] * len(sequence.tokens))))
        elif name == "finish":
            life.finish(sequence)
        elif name in ("keep", "keep and join"):
            source = life.sequences[args[1] % len(life.sequences)]
            known = min(source.table.length, len(source.tokens))
            start, stop = sorted(round(share * known) for share in args[2:4])
            if start < stop and not source.table.host:
                life.keep(sequence, source, start, stop)
        if name in ("join", "keep and join") and not sequence.splices:
            engine.pause(sequence)
            life.join(sequence, list(args[-2]), args[-1])
    life.check()


def live_through(life: Life, actions: list[tuple[Any, ...]]) -> Life:
    """Raises AssertionError, or what the engine raises, at the first step that is not right."""
    for action in actions:
        act(life, action)
    life.end()
    return life


SETTINGS = searched(500)


def assert_noticed(how: str, actions: Any = ACTIONS, some_lives: Any = None) -> None:
    """The property fails with what matches ``how``; the search ends at the first such life."""
    some_lives = lives() if some_lives is None else some_lives

    def check(life: Life, actions: list[tuple[Any, ...]]) -> None:
        live_through(life, actions)

    with pytest.raises((AssertionError, RuntimeError), match=how):
        CONTROL(given(some_lives, actions)(check))()
