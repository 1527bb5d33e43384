"""Replays of one graph under every policy: the same tokens, and exactly the predicted prefills and blocks."""

from collections import defaultdict
from typing import Any

import pytest
from replays import BLOCK, CARRIED, CONCLUSIONS, DEEP, FLAT, NAMES, PLAN, PREFIX, PROMPT, drawn, memory_for, run

from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.table import BlockTable
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.replay.check import check_transcripts
from rrm_engine.replay.contender import Replayed
from rrm_engine.replay.driver import Memory, Ours
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import limit_pools, measure, summarise
from rrm_engine.replay.report import markdown_table
from rrm_engine.replay.variant import parse_variant


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_ends_with_the_graphs_tokens(model: LoadedModel, name: str, lookahead: bool) -> None:
    graph = drawn(DEEP)
    variant = parse_variant(name)
    replayed = run(name, memory_for(model, graph, lookahead=lookahead), graph)
    check_transcripts(name, variant.graph(graph), replayed.tokens)
    assert {node: len(tokens) for node, tokens in replayed.sampled.items()} == {
        node: life.decoded for node, life in graph.nodes.items()
    }
    assert len(replayed.resume_s) == 4
    assert replayed.answer_s > 0
    assert all(0 < s < replayed.answer_s for s in replayed.resume_s)


def test_prefills_are_exactly_those_predicted(model: LoadedModel) -> None:
    """A block has 4 tokens, so two of the shared prefix's are full when the children start."""
    graph = drawn(FLAT)
    memory = memory_for(model, graph)
    context, cached = PREFIX + PROMPT, PREFIX // BLOCK * BLOCK
    waiting = context + PLAN + 1  # the root's tokens at its await; all but the last one have been run
    stored = waiting - 1
    fresh, appended = 3 * context, CONCLUSIONS
    reused = 2 * cached  # by the children

    assert_tokens(run("pin", memory, graph), fresh - reused + appended, reused)
    assert_tokens(run("offload", memory, graph), fresh - reused + appended, reused)
    assert_tokens(run("serial", memory, graph), fresh - reused + appended, reused)
    assert_tokens(run("pin+nocache", memory, graph), fresh + appended, 0)
    # The root is prefilled again from the end of the prefix, which the children's blocks kept in the cache.
    assert_tokens(run("drop", memory, graph), fresh - reused + appended + stored - cached, reused + cached)
    assert_tokens(run("no-reuse", memory, graph), fresh + appended + stored, 0)
    # Every full block of it is found again.
    full = stored // BLOCK * BLOCK
    assert_tokens(run("lru", memory, graph), fresh - reused + appended + stored - full, reused + full)
    # The children start from all that the root has run when they are written.
    shared = (context + PLAN - 1) + (context + PLAN)
    forked = run("pin+fork", memory, graph)
    assert_tokens(forked, context + 2 * (1 + PROMPT) + appended, shared)
    assert forked.copied_blocks == 2


def computed_twice(name: str, memory: Memory, graph: Graph) -> list[list[str]]:
    """For each token that ran more than once in the same context: the nodes it ran for, each time."""
    ran: list[tuple[Sequence, int]] = []
    step_of = ModelRunner.run

    def watched(self: ModelRunner, plan: SchedulerOutput, *rest: Any) -> Any:
        ran.extend((work.sequence, work.start + i) for work in plan.work for i in range(work.count))
        return step_of(self, plan, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "run", watched)
        run(name, memory, graph)
    nodes = defaultdict(list)
    for sequence, position in ran:
        nodes[tuple(sequence.tokens[: position + 1])].append(sequence.key)
    return sorted(sorted(keys) for keys in nodes.values() if len(keys) > 1)


def test_pin_and_forks_compute_no_token_twice(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last token before a fork, which its parent has not run yet where it goes on: both run that one."""
    graph = drawn(DEEP | {"shared_prefix": 2 * BLOCK})
    memory = memory_for(model, graph)
    assert computed_twice("serial", memory, graph) == []
    assert computed_twice("pin", memory, graph) == [["root.a", "root.a.x"]]
    forks = [["root", "root.a"], ["root", "root.c"], ["root.a", "root.a.x"]]
    assert computed_twice("pin+fork", memory, graph) == forks
    for name in ("drop", "drop+fork", "offload", "pin+nocache", "no-reuse"):  # controls
        assert len(computed_twice(name, memory, graph)) > 2 * BLOCK, name
    fork = BlockTable.fork
    monkeypatch.setattr(BlockTable, "fork", lambda self, length: fork(self, length - 1))
    assert len(computed_twice("pin+fork", memory, graph)) > len(forks)


def test_attached_tokens_are_not_prefilled(model: LoadedModel) -> None:
    """All of what is carried but the last token, which a child has never run, and which runs what follows."""
    graph = drawn(CARRIED)
    memory = memory_for(model, graph.transcribed())
    pin, splice, transcript = (run(name, memory, graph) for name in ("pin", "splice", "transcript"))
    assert (splice.attached, pin.attached) == (4 + 3, 0)
    assert pin.prefilled and splice.prefilled == pin.prefilled - 7
    assert splice.reused == pin.reused
    assert transcript.attached == 10 + 7
    assert transcript.prefilled == pin.prefilled - (5 + 4) + (1 + 1)
    assert len(transcript.tokens["root"]) == len(pin.tokens["root"]) + (11 - 5) + (8 - 4)
    text = pin.tokens["root"][PREFIX + PROMPT + PLAN + 1 :]
    assert text[:9] == [*pin.tokens["a"][-5:], *pin.tokens["b"][-4:]]
    (splice_row, pin_row) = summarise(measure([Ours(parse_variant(n), memory) for n in ("splice", "pin")], [graph], 1))
    assert (splice_row["approximate"], pin_row["approximate"]) == (True, False)
    assert markdown_table([splice_row]).splitlines()[2].startswith("| splice ~ |")


def test_nothing_to_attach_is_refused(model: LoadedModel) -> None:
    graph = drawn(FLAT)
    with pytest.raises(ValueError, match=r"--policies splice: no append step of graph flat names the child whose"):
        run("splice", memory_for(model, graph), graph)


def assert_tokens(replayed: Replayed, prefilled: int, reused: int) -> None:
    assert (replayed.prefilled, replayed.reused) == (prefilled, reused)


def test_blocks_are_counted_where_they_are(model: LoadedModel) -> None:
    graph = drawn(FLAT)
    memory = memory_for(model, graph)
    pin, offload, drop = (run(name, memory, graph) for name in ("pin", "offload", "drop"))
    waiting = -(-(PREFIX + PROMPT + PLAN) // BLOCK)  # blocks of the root at its await
    own = waiting - PREFIX // BLOCK
    assert pin.offloaded_blocks == drop.offloaded_blocks == pin.peak_host_blocks == 0
    assert offload.offloaded_blocks == offload.restored_blocks == offload.peak_host_blocks == own
    assert pin.peak_blocks and offload.peak_blocks and drop.peak_blocks
    assert offload.peak_blocks == drop.peak_blocks == pin.peak_blocks - own
    assert pin.steps == offload.steps


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keep", "there is no 'keep'"),
        ("pin+drop", "contradict or repeat"),
        ("pin+no-reuse", "contradict or repeat"),
        ("fork+fork", "contradict or repeat"),
        ("splice+transcript", "contradict or repeat"),
        ("", "there is no ''"),
    ],
)
def test_unknown_policies_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--policies .*{message}"):
        parse_variant(name)


def test_a_node_longer_than_the_models_context_is_refused(model: LoadedModel) -> None:
    graph = drawn(FLAT | {"shared_prefix": 600})
    with pytest.raises(ValueError, match=r"graph flat has a node of 623 tokens and qwen3 knows 512 positions"):
        run("pin", memory_for(model, graph), graph)


def test_a_pool_is_never_larger_than_the_cache(model: LoadedModel) -> None:
    graph = drawn(FLAT)
    memory = Memory(model, 8, block_size=BLOCK)
    with pytest.raises(ValueError, match=r"one sequence of 33 tokens takes 9 KV blocks of 4, the pool has 8"):
        run("pin", memory, graph)
    memory = memory_for(model, graph)
    limit_pools(memory, [graph], 0.01)
    assert memory.pool_blocks(graph) == 9
    assert run("pin", memory, graph).peak_blocks == 9
