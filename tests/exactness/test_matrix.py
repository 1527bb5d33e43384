"""Greedy tokens in fp32 equal plain transformers on each sequence's own transcript, whatever the engine is set to.

One table for everything that may be combined: families, kernels, steps of CUDA, pipelines, lookahead, drafts, wait
policies, small pools, attached KV. Sequences with generation settings have the tokens of ``generate``.
"""

from dataclasses import replace
from typing import get_args

import broken
import pytest
from broken import Breaks
from graph_scripts import again, attaching, crowded, forgetting, live_graph, side_by_side, waiting_graph
from matrix import CROWDED, SHORT, STATIC, WAITING, Matrix, Row, rows
from oracle import FAMILIES, engine_for
from settled import IN_A_GRAPH, Settled

from rrm_engine.config import WaitPolicy
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
    *rows(Row(forgetting, settled=True), lookahead=BOTH),
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
    if row.life is live_graph and row.longest < Row.longest:
        assert lived.script.done == matrix.lived(replace(row, blocks=Row.blocks)).script.done
    elif row.life is live_graph and not row.settled:
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


# negative controls: what is broken, and in which rows of the table it shows

TWO_SHARES = Row(form="captured", devices=2, stages=2)
CONTROLS: list[tuple[Breaks, list[Row]]] = [
    (broken.no_copies, [Row(), Row(lookahead=True), Row(stages=4), Row(form="captured")]),
    (broken.swap_ins_to_one_place, [replace(WAITING, policy="offload"), replace(SHORT, policy="offload")]),
    (broken.swap_outs_too_late, [replace(SHORT, policy="offload")]),
    (broken.no_splices, [ATTACHING]),
    (broken.splices_of_one_token, [ATTACHING, replace(ATTACHING, policy="offload", lookahead=True)]),
    (broken.tokens_of_other_rows, [Row(lookahead=True), Row(form="captured", lookahead=True)]),
    (broken.tokens_in_another_order, [Row(stages=2), Row(lookahead=True)]),
    (broken.batches_of_the_step_before, [Row(form="sdpa", stages=2)]),
    (broken.buffers_of_the_first_step, [TWO_SHARES]),
    (broken.hidden_states_of_an_earlier_step, [TWO_SHARES]),
    (broken.drafts_are_believed, [Row(drafts=True), replace(SHORT, drafts=True, policy="drop")]),
    (broken.processors_that_guess, [Row(settled=True, drafts=True)]),
    (broken.processors_that_guess, [Row(settled=True, lookahead=True, stages=stages) for stages in (1, 3)]),
]


@pytest.mark.parametrize(
    ("breaks", "row"),
    [pytest.param(breaks, row, id=f"{breaks.__name__}: {row}") for breaks, somewhere in CONTROLS for row in somewhere],
)
def test_what_is_broken_shows(breaks: Breaks, row: Row, matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix.lived(replace(row, drafts=False))
    breaks(monkeypatch)
    assert matrix.live(row).wrong
