"""Scripted lives of an engine that are like those of graphs, and which of their tokens are not plain transformers'."""

from typing import Any

from oracle import engine_for, prepared, prompt, wrong_tokens

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import Driven
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Counters, Sequence, State
from rrm_engine.kv.host import SwapCosts

GREEDY = SamplingParams()
CHEAP_COPIES, DEAR_COPIES = SwapCosts(1e-6, 1e-3), SwapCosts(1e-3, 1e-6)


class Script:
    """Drives an engine through a graph-like life and remembers which tokens were sampled."""

    def __init__(self, engine: Driven) -> None:
        self.engine = engine
        self.ranges: dict[str, list[list[int]]] = {}
        self.done: dict[str, list[int]] = {}
        self.counters: dict[str, Counters] = {}

    def submit(self, key: str, tokens: list[int], budget: int, **options: Any) -> Sequence:
        self.ranges[key] = [[len(tokens), len(tokens)]]
        return self.engine.submit(key, list(tokens), budget, GREEDY, **options)

    def run(self, until: int = 10_000) -> None:
        """Step until everything has paused or ``until`` tokens were sampled."""
        while self.engine.has_work and until > 0:
            for sampled in self.engine.step():
                self.ranges[sampled.sequence.key][-1][1] = len(sampled.sequence.tokens)
                until -= 1
            for engine in self.engine.engines:
                engine.check()

    def resume(self, sequence: Sequence, tokens: list[int], budget: int, **options: Any) -> None:
        self.engine.of(sequence).resume(sequence, tokens, budget, **options)
        self.ranges[sequence.key].append([len(sequence.tokens)] * 2)

    def finish(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.done[sequence.key] = list(sequence.tokens)
            self.counters[sequence.key] = sequence.counters
            self.engine.of(sequence).finish(sequence)


def live_graph(engine: Driven) -> Script:
    """A root that forks mid-block, waits, resumes twice with several chunks, beside other roots and children."""
    script = Script(engine)
    root = script.submit("root", prompt(1, 37), 9)
    other = script.submit("other", prompt(2, 5), 30, root=1)
    script.run(until=12)
    at = len(root.tokens)  # not a multiple of the block size in general; the root goes on after it
    forked = script.submit("root.a", [*root.tokens, *prompt(3, 6)], 20, depth=1, fork_of=(root, at))
    fresh = script.submit("root.b", prompt(1, 24) + prompt(4, 9), 15, depth=1)
    script.run()
    script.resume(root, prompt(5, 30), 8)
    again = script.submit("root.c", [*root.tokens[: at + 2], *prompt(6, 3)], 6, depth=1, fork_of=(root, at + 2))
    script.run()
    script.resume(root, prompt(7, 3), 7)
    script.run()
    script.finish(root, other, forked, fresh, again)
    return script


def short_graph(engine: Driven) -> Script:
    """Mixed steps and decodes of several sizes: a root that forks in mid-block, waits and resumes, and two children."""
    script = Script(engine)
    root = script.submit("root", prompt(1, 22), 3)
    script.run()
    forks = [
        script.submit(f"root.{i}", [*root.tokens, *prompt(3 + i, 2)], 4, depth=1, fork_of=(root, len(root.tokens)))
        for i in range(2)
    ]
    script.run()
    script.resume(root, prompt(5, 5), 3)
    script.run()
    script.finish(root, *forks)
    return script


def side_by_side(engine: Driven) -> Script:
    """Five sequences of very different lengths."""
    script = Script(engine)
    sequences = [script.submit(f"r{i}", prompt(i, 3 + 11 * i), 12, root=i) for i in range(5)]
    script.run()
    script.finish(*sequences)
    return script


def again(engine: Driven) -> Script:
    """A sequence, one that begins as it does, and then the same once more."""
    script = Script(engine)
    first = script.submit("first", prompt(1, 33), 5)
    script.run()
    second = script.submit("second", prompt(1, 33) + prompt(9, 4), 10)
    script.run()
    third = script.submit("third", prompt(1, 32), 4)
    script.run()
    script.finish(first, second, third)
    return script


def forgetting(engine: Engine) -> Script:
    """A sequence that is truncated, goes on with other tokens, and waits."""
    script = Script(engine)
    root = script.submit("root", prompt(1, 20), 12)
    script.run()
    engine.truncate(root, 27)
    script.ranges["root"][-1][1] = 27
    engine.wait(root)
    script.resume(root, prompt(2, 5), 10)
    script.run()
    script.finish(root)
    return script


def attaching(engine: Engine) -> Script:
    """A parent that is given KV of its child, computed after the parent's own tokens and for the same positions."""
    script = Script(engine)
    parent = script.submit("root", prompt(1, 21), 4)
    other = script.submit("other", prompt(4, 9), 25, root=1)
    script.run(until=5)
    while parent.state is not State.PAUSED:
        script.run(until=1)
    at, written = len(parent.tokens), prompt(2, 30)
    child = script.submit("root.a", [*parent.tokens, *written], 4, depth=1, fork_of=(parent, at))
    engine.wait(parent)
    script.run()
    spans = [engine.keep(parent, child, at + start, at + stop) for start, stop in ((0, 11), (12, 30))]
    script.finish(child)
    script.resume(parent, [*written, *prompt(3, 3)], 5, splices=[(0, spans[0]), (12, spans[1])])
    script.run()
    script.finish(parent, other)
    return script


def five(script: Script) -> list[Sequence]:
    return [script.submit(f"r{i}", prompt(i, 20 + i), 30, root=i) for i in range(5)]


def uncrowded(engine: Engine) -> Script:
    """What ``crowded`` runs, with room for everything."""
    script = Script(engine)
    sequences = five(script)
    script.run()
    script.finish(*sequences)
    return script


def crowded(engine: Engine) -> Script:
    """Five sequences in too small a pool (22 blocks of 4), one of which is cancelled, in flight if any is."""
    script = Script(engine)
    sequences = five(script)
    script.run(until=9)
    cancelled = next((s for s in sequences if s.flights), sequences[2])
    engine.finish(cancelled)
    engine.check()
    script.run()
    assert sum(s.counters.preemptions for s in sequences) > 0
    rest = [s for s in sequences if s is not cancelled]
    assert {len(s.tokens) - 20 - i for i, s in enumerate(sequences) if s in rest} == {30}
    script.finish(*rest)
    return script


def mistakes(plain: Any, script: Script) -> dict[str, list[int]]:
    return {
        key: wrong
        for key, tokens in script.done.items()
        if (wrong := wrong_tokens(plain, tokens, [(a, b) for a, b in script.ranges[key]]))
    }


def waiting_graph(engine: Engine) -> Script:
    """A root that forks, waits twice, beside another root and children; nothing is shared but by design."""
    script = Script(engine)
    root = script.submit("root", prompt(1, 37), 9)
    other = script.submit("other", prompt(2, 5), 30, root=1)
    script.run(until=12)
    at = len(root.tokens)
    forked = script.submit("root.a", [*root.tokens, *prompt(3, 6)], 20, depth=1, fork_of=(root, at))
    engine.pause(root)
    engine.wait(root)
    script.run()
    fresh = script.submit("root.b", prompt(1, 24) + prompt(4, 9), 15, depth=1)
    engine.wait(forked)
    script.run()
    script.resume(root, prompt(5, 30), 8)
    script.run()
    engine.wait(root)
    script.resume(forked, prompt(8, 5), 4)
    script.run()
    script.resume(root, prompt(7, 3), 7)
    script.run()
    script.finish(root, other, forked, fresh)
    return script


def policy_engine(model: Any, policy: WaitPolicy, blocks: int = 200, **changes: Any) -> Engine:
    return engine_for(model, blocks, wait_policy=policy, host_blocks=blocks, costs=CHEAP_COPIES, **changes)


def assert_tokens_equal(plain: Any, policy: WaitPolicy, **changes: Any) -> None:
    """With room for everything, and in a pool in which memory runs out."""
    model = prepared(plain)
    for blocks in (200, 30):
        engine = policy_engine(model, policy, blocks, max_sequence_tokens=110, **changes)
        assert mistakes(plain, waiting_graph(engine)) == {}
        assert engine.pool.num_used == engine.space.num_used == 0
