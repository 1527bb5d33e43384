"""Greedy tokens in fp32 equal plain transformers on each sequence's own transcript, whatever the engine is set to.

One table for everything that may be combined: families, kernels, steps of CUDA, pipelines, lookahead, drafts, wait
policies, small pools, attached KV. Sequences with generation settings have the tokens of ``generate``.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from graph_scripts import again, attaching, crowded, forgetting, live_graph, side_by_side, waiting_graph
from matrix import CROWDED, SHORT, STATIC, WAITING, Matrix, Row, rows
from oracle import FAMILIES, engine_for
from rrm_kernels.staging import Staging
from settled import IN_A_GRAPH, Settled

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.cuda_graphs import Share
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.packing import Drawn
from rrm_engine.engine.processors import Transcripts
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import PagedForward
from rrm_engine.models.lean import LeanForward

POLICIES = get_args(WaitPolicy)
BOTH = (False, True)
VARIED = ("qwen3", "gemma2", "gpt_oss", "deepseek_v3", "gpt2")  # soft-caps, windows, sinks, widths, learned positions
SPLICED = ("qwen3", "llama", "phi3", "gpt_neox", "granite", "gemma3_text")
ATTACHING = Row(attaching, prefix_cache=False)  # where the child's blocks would be found


ROWS = [
    *rows(Row(), family=sorted(FAMILIES), form=("auto", "sdpa")),
    *rows(Row(devices=2, stages=2), family=sorted({*FAMILIES} - {"gpt2"})),
    *rows(Row(lookahead=True), family=VARIED),
    *rows(Row(), family=VARIED, stages=(2, 4)),
    *rows(Row(drafts=True), family=VARIED, form=("auto", "sdpa")),
    *rows(Row(longest=88), blocks=(22, 24, 30, 45)),
    *rows(Row(side_by_side, "llama"), max_sequences=(1, 3, 64), step_tokens=(1, 7, 512)),
    *rows(Row(again), prefix_cache=BOTH),
    *rows(Row(forgetting), policy=POLICIES),
    *rows(Row(replicas=2), family=("qwen3", "gemma2"), lookahead=BOTH, drafts=BOTH),
    *rows(Row(settled=True), lookahead=BOTH, stages=(1, 3), drafts=BOTH),
    Row(settled=True, replicas=2, lookahead=True),
    *rows(Row(), form=STATIC, devices=(1, 2), stages=(1, 2), lookahead=BOTH),
    *rows(WAITING, family=VARIED[:4], policy=POLICIES, prefix_cache=BOTH),
    *rows(SHORT, family=VARIED[:4], policy=POLICIES, prefix_cache=BOTH),
    *rows(WAITING, policy=POLICIES, stages=(1, 3), lookahead=BOTH),
    *rows(SHORT, policy=POLICIES, stages=(1, 3), lookahead=BOTH, drafts=BOTH),
    *rows(SHORT, policy=POLICIES, stages=(2, 4)),
    *rows(replace(SHORT, settled=True, lookahead=True), policy=POLICIES),
    *rows(SHORT, form=STATIC, policy=POLICIES, stages=(1, 2), lookahead=BOTH),
    *rows(replace(SHORT, devices=2, stages=2), form=STATIC, policy=POLICIES),
    *rows(CROWDED, stages=(1, 2, 3, 4), lookahead=BOTH),
    *rows(replace(CROWDED, drafts=True), stages=(1, 3), lookahead=BOTH),
    *rows(replace(CROWDED, settled=True), stages=(1, 3), lookahead=BOTH),
    *rows(CROWDED, form=STATIC, devices=(1, 2), stages=(1, 2)),
    *rows(ATTACHING, family=SPLICED),
    *rows(ATTACHING, policy=POLICIES, stages=(1, 3), lookahead=BOTH, drafts=BOTH),
    *rows(replace(ATTACHING, form="captured", lookahead=True), policy=("pin", "offload")),
]


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return Matrix()


@pytest.mark.parametrize("row", dict.fromkeys(ROWS), ids=str)
def test_tokens_equal_plain_transformers(row: Row, matrix: Matrix) -> None:
    lived = matrix.lived(row)
    assert not lived.wrong
    assert lived.held == 0
    if row.life is live_graph and not row.settled:
        assert sum(b - a for ranges in lived.script.ranges.values() for a, b in ranges) == 9 + 30 + 20 + 15 + 8 + 6 + 7
    if row.replicas > 1:
        assert min(lived.steps) > 5, "only one replica did anything"
    if row.drafts:
        assert lived.count("accepted") > 0
    if row.drafts and row.life is not crowded and not row.overlaps:
        assert lived.script.done == matrix.lived(replace(row, drafts=False)).script.done
    if row.life is waiting_graph and row.policy == "offload":
        assert lived.count("restored_blocks") > 0
    if row.life is waiting_graph and row.policy == "drop":
        assert lived.count("prefilled") > matrix.lived(replace(row, policy="pin")).count("prefilled")
    if row.life is attaching:
        assert lived.count("spliced") == 29
    if row.form in STATIC:
        assert len(lived.shares) == row.devices
        assert all((share.captures > 0) == (row.form == "captured") for share in lived.shares)
        assert row.form == "eager" or all(share.replays > share.captures for share in lived.shares)


def test_a_nodes_generation_settings_show(matrix: Matrix) -> None:
    """Control of the rows above that have some: ``generate`` without them writes something else in every node."""
    engine = engine_for(matrix.model("qwen3", "auto", 1))
    settled = Settled(engine, IN_A_GRAPH)
    script = live_graph(engine)
    assert {*settled.unlike_generate(matrix.plain("qwen3", 1), script, [{}])} == {*script.done}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_lean_forward_stays_lean_over_devices(family: str, matrix: Matrix) -> None:
    one, two = (matrix.model(family, "auto", devices).forward for devices in (1, 2))
    assert isinstance(one, LeanForward) == isinstance(two, LeanForward)
    assert not isinstance(two, LeanForward) or [len(stage.layers) for stage in two.stages] == [2, 2]


# negative controls: what is broken, how, and in which rows of the table it shows

Broken = Callable[[Callable[..., Any]], Callable[..., Any]]


def nothing(_: Any) -> Callable[..., None]:
    return lambda *_: None


def to_one_place(swap_in: Any) -> Any:
    """Blocks that come back from the host come back to the wrong places."""
    return lambda self, copied, blocks: swap_in(self, copied, [blocks[0]] * len(blocks))


def of_the_first(splice: Any) -> Any:
    """Every attached token has the KV of the first one; to change them about would change no sum."""
    return lambda self, sources, *rest: splice(self, [sources[0]] * len(sources), *rest)


def of_other_rows(fill: Any) -> Any:
    """Tokens that the host does not know yet are those of other sequences."""
    return lambda self, *given: fill(Drawn(self.tokens.roll(1), self.rows), *given)


def in_another_order(collect: Any) -> Any:
    def swapped(self: Engine) -> Any:
        if self._flights:
            self._flights[0].order.reverse()
        return collect(self)

    return swapped


def of_the_step_before(batch_on: Any) -> Any:
    """A stage takes the batch of the step before for its own, as if it had not been brought there yet."""
    last: dict[str, Any] = {}

    def stale(self: PagedForward, device: torch.device) -> Any:
        self.brought[device] = self.brought.get(device, 0) + 1
        batch = batch_on(replace(self, brought={}), device)
        if self.brought[device] == 1:  # the first layer's
            last["now"], last["before"] = batch, last.get("now", batch)
            return batch
        before = last["before"]
        return before if [*before.query_lens] == [*batch.query_lens] == [1] * len(batch.query_lens) else batch

    return stale


def once(follow: Any) -> Any:
    """What the second device had in the first step is all it ever has."""
    seen: set[int] = set()

    def first(self: Staging, *given: Any) -> None:
        if id(self) not in seen:
            follow(self, *given)
        seen.add(id(self))

    return first


def left(bring: Any) -> Any:
    """The hidden states of an earlier step of that size."""

    def known(self: Share, hidden: torch.Tensor, key: Any) -> torch.Tensor:
        there = key is not None and key.tokens in self._hidden
        return self._hidden[key.tokens] if there else bring(self, hidden, key)

    return known


def credulous(_: Any) -> Any:
    """Every draft is taken for right."""

    def taken(self: Engine, sequence: Any, drawn: list[tuple[int | None, int]]) -> deque[int]:
        return deque([*(drafted for drafted, _ in drawn[1:] if drafted is not None), drawn[-1][1]])

    return taken


def unread(extend: Any) -> Any:
    """Processors see a made-up token where the last one is in flight, and where one is drafted."""

    def guessing(self: Any, sequences: Any, lengths: Any, drawn: Drawn | None, drafted: Any, device: Any) -> None:
        made_up = drawn and Drawn(torch.full_like(drawn.tokens, 3), drawn.rows)
        extend(self, sequences, lengths, made_up, [None if one is None else 3 for one in drafted], device)

    return guessing


TWO_SHARES = Row(form="captured", devices=2, stages=2)
CONTROLS: list[tuple[Any, str, Broken, list[Row]]] = [
    (KVCache, "copy", nothing, [Row(), Row(lookahead=True), Row(stages=4), Row(form="captured")]),
    (KVCache, "swap_in", to_one_place, [replace(WAITING, policy="offload"), replace(SHORT, policy="offload")]),
    (KVCache, "splice", nothing, [ATTACHING]),
    (KVCache, "splice", of_the_first, [ATTACHING, replace(ATTACHING, policy="offload", lookahead=True)]),
    (Drawn, "fill", of_other_rows, [Row(lookahead=True), Row(form="captured", lookahead=True)]),
    (Engine, "collect", in_another_order, [Row(stages=2), Row(lookahead=True)]),
    (PagedForward, "batch_on", of_the_step_before, [Row(form="sdpa", stages=2)]),
    (Staging, "follow", once, [TWO_SHARES]),
    (Share, "_bring", left, [TWO_SHARES]),
    (Engine, "_accepted", credulous, [Row(drafts=True), replace(SHORT, drafts=True, policy="drop")]),
    (Transcripts, "extend", unread, [Row(settled=True, drafts=True)]),
    (Transcripts, "extend", unread, [Row(settled=True, lookahead=True, stages=stages) for stages in (1, 3)]),
]


@pytest.mark.parametrize(
    ("owner", "name", "broken", "row"),
    [
        pytest.param(*control, row, id=f"{control[1]} {control[2].__name__} {row}")
        for *control, somewhere in CONTROLS
        for row in somewhere
    ],
)
def test_what_is_broken_shows(
    owner: Any, name: str, broken: Broken, row: Row, matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix.lived(replace(row, drafts=False))
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    assert matrix.live(row).wrong


def test_blocks_that_are_read_too_late_show(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the copy to the host is made when it is needed again, after others wrote there."""
    swap_in, read = KVCache.swap_in, KVCache.swap_out
    sources: dict[int, Any] = {}

    def late(self: KVCache, copied: Any, blocks: Any) -> None:
        read(self, copied, sources.pop(id(copied)))
        swap_in(self, copied, blocks)

    monkeypatch.setattr(KVCache, "swap_out", lambda self, copied, blocks: sources.update({id(copied): blocks}))
    monkeypatch.setattr(KVCache, "swap_in", late)
    assert matrix.live(replace(SHORT, policy="offload")).wrong
