"""Replays of one graph under every policy: the same tokens and logits, and exactly the predicted prefills."""

import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import VOCABULARY, plain_model, prepared, wrong_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from rrm_engine.engine.prepare import LoadedModel, load_model, prepare_model
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.table import BlockTable
from rrm_engine.models.geometry import GEOMETRIES, random_model
from rrm_engine.replay.check import ReplayMismatch, check_logits, check_transcripts
from rrm_engine.replay.driver import Contender, Memory, Ours, Replayed, blocks_needed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import COUNTERS, best_logits, check, limit_pools, measure, summarise
from rrm_engine.replay.reader import parse_graph
from rrm_engine.replay.report import HEADER, markdown_table, rich_table
from rrm_engine.replay.variant import parse_variant

ROOT = Path(__file__).parents[1]
BLOCK = 4
PREFIX, PROMPT, PLAN, CONCLUSIONS, CONTINUATION = 9, 6, 7, 5, 4  # 9 tokens: two full blocks are shared
FLAT: dict[str, Any] = {
    "id": "flat",
    "shared_prefix": PREFIX,
    "nodes": {
        "root": {
            "prompt": PROMPT,
            "steps": [
                {"decode": PLAN},
                {"child": "a"},
                {"decode": 1},
                {"child": "b"},
                {"await": ["a", "b"]},
                {"append": CONCLUSIONS},
                {"decode": CONTINUATION},
            ],
        },
        "a": {"prompt": PROMPT, "steps": [{"decode": 11}]},
        "b": {"prompt": PROMPT, "steps": [{"decode": 8}]},
    },
}
DEEP = {  # two levels, a fork of a node that goes on, dependencies, two awaits, a turn that awaits nobody
    "id": "deep",
    "seed": 3,
    "shared_prefix": 10,
    "nodes": {
        "root": {
            "prompt": 5,
            "steps": [
                {"decode": 6},
                {"child": "root.a"},
                {"decode": 3},
                {"child": "root.b"},
                {"decode": 2},
                {"await": ["root.a"]},
                {"append": 6},
                {"decode": 5},
                {"child": "root.c"},
                {"await": ["root.b", "root.c"]},
                {"append": 7},
                {"decode": 6},
                {"append": 2},
                {"decode": 3},
            ],
        },
        "root.a": {
            "prompt": 4,
            "steps": [
                {"decode": 5},
                {"child": "root.a.x"},
                {"child": "root.a.y"},
                {"decode": 4},
                {"await": ["root.a.x", "root.a.y"]},
                {"append": 3},
                {"decode": 4},
            ],
        },
        "root.a.x": {"prompt": 3, "steps": [{"decode": 12}], "fork": True},
        "root.a.y": {"prompt": 6, "steps": [{"decode": 5}], "after": ["root.a.x"]},
        "root.b": {"prompt": 3, "steps": [{"decode": 9}], "fork": True, "after": ["root.a"]},
        "root.c": {"prompt": 5, "steps": [{"decode": 4}]},
        "other": {"prompt": 7, "steps": [{"decode": 8}], "after": ["root.c"]},
    },
}
CARRIED = (
    FLAT
    | {  # the conclusions are the children's own tokens
        "id": "carried",
        "nodes": FLAT["nodes"]
        | {
            "root": {
                "prompt": PROMPT,
                "steps": [
                    *FLAT["nodes"]["root"]["steps"][:5],
                    {"append": 5, "of": "a"},
                    {"append": 4, "of": "b"},
                    {"append": 2},
                    {"decode": CONTINUATION},
                ],
            }
        },
    }
)
NAMES = [
    *("pin", "offload", "drop", "lru", "auto", "pin+nocache", "offload+nocache", "drop+nocache"),
    *("auto+serial", "serial", "no-reuse", "serial+no-reuse"),
    *("pin+fork", "offload+fork", "drop+fork", "lru+fork+nocache"),
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.set_num_threads(1)
    return prepared(plain_model("qwen3"))


def drawn(value: dict[str, Any]) -> Graph:
    return parse_graph(value).drawn(VOCABULARY)


def memory_for(model: LoadedModel, graph: Graph, **settings: Any) -> Memory:
    blocks = max(blocks_needed(graph, BLOCK), blocks_needed(graph.forked(), BLOCK))
    return Memory(model, blocks, block_size=BLOCK, **{"step_tokens": 32, **settings})


def run(name: str, memory: Memory, graph: Graph) -> Replayed:
    return Ours(parse_variant(name), memory).replay(graph, lambda engine: engine.check())


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_ends_with_the_graphs_tokens(model: LoadedModel, name: str) -> None:
    graph = drawn(DEEP)
    variant = parse_variant(name)
    replayed = run(name, memory_for(model, graph), graph)
    check_transcripts(name, variant.graph(graph), replayed.tokens)
    assert {node: len(tokens) for node, tokens in replayed.sampled.items()} == {
        node: life.decoded for node, life in graph.nodes.items()
    }
    assert len(replayed.resume_s) == 4
    assert replayed.answer_s > 0
    assert all(0 < s < replayed.answer_s for s in replayed.resume_s)


def test_every_variant_has_the_logits_of_pin(model: LoadedModel) -> None:
    """With room for everything, and in pools in which memory runs out again and again."""
    graph = drawn(DEEP)
    memory = memory_for(model, graph)
    variants = [parse_variant(name) for name in NAMES]
    compared = check(memory, variants, [graph])
    assert compared == len(NAMES) * sum(node.decoded for node in graph.nodes.values())
    limit_pools(memory, [graph], 0.5)
    assert check(memory, variants, [graph]) == compared
    assert run("pin", memory, graph).preemptions


def test_free_choices_are_those_of_plain_transformers(model: LoadedModel) -> None:
    """What the model would have written at each place, by plain transformers on the forced tokens."""
    graph = drawn(DEEP)
    plain = plain_model("qwen3")
    replayed = run("offload", memory_for(model, graph), graph)
    for name, tokens in replayed.tokens.items():
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1).tolist()
        places, at = [], graph.context(name)
        for step in graph.nodes[name].steps:
            size = len(getattr(step, "tokens", ()))
            places += range(at, at + size) if type(step).__name__ == "Decode" else []
            at += size
        assert replayed.sampled[name] == [logits[i - 1] for i in places], name
    assert wrong_tokens(plain, replayed.tokens["root"], [(20, 40)]) != []  # the forced ones are others


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
    # The root is prefilled again behind the prefix, which the children's blocks kept in the cache.
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
    assert splice.prefilled == pin.prefilled - 7
    assert splice.reused == pin.reused
    assert transcript.attached == 10 + 7
    assert transcript.prefilled == pin.prefilled - (5 + 4) + (1 + 1)
    assert len(transcript.tokens["root"]) == len(pin.tokens["root"]) + (11 - 5) + (8 - 4)
    text = pin.tokens["root"][PREFIX + PROMPT + PLAN + 1 :]
    assert text[:9] == [*pin.tokens["a"][-5:], *pin.tokens["b"][-4:]]
    (splice_row, pin_row) = summarise(measure([Ours(parse_variant(n), memory) for n in ("splice", "pin")], [graph], 1))
    assert (splice_row["approximate"], pin_row["approximate"]) == (True, False)
    assert markdown_table([splice_row]).splitlines()[2].startswith("| splice ~ |")


SPLICING = ["splice", "drop+splice", "offload+splice+nocache", "splice+serial", "splice+fork", "transcript+fork"]


def test_attached_kv_is_exact_up_to_where_it_is(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = drawn(CARRIED)
    memory = memory_for(model, graph.transcribed())
    variants = [parse_variant(name) for name in SPLICING]
    decoded = sum(node.decoded for node in graph.nodes.values())
    assert check(memory, variants, [graph]) == len(variants) * (decoded - CONTINUATION)
    limit_pools(memory, [graph], 0.6)
    assert check(memory, variants, [graph]) == len(variants) * (decoded - CONTINUATION)
    memory.limits.clear()
    monkeypatch.setattr(Graph, "exact", Graph.length)  # control: as if all of it were
    with pytest.raises(
        ReplayMismatch, match=r"splice: graph carried has other logits .* in \d of 31 decode steps \(root"
    ):
        check(memory, variants[:1], [graph])


def test_a_fork_of_attached_kv_is_approximate_too() -> None:
    value = json.loads(json.dumps(CARRIED))
    value["nodes"]["root"]["steps"] += [{"child": "c"}, {"await": ["c"]}, {"append": 2, "of": "c"}, {"decode": 1}]
    value["nodes"]["c"] = {"prompt": 3, "steps": [{"decode": 4}], "fork": True}
    graph = drawn(value)
    at = PREFIX + PROMPT + PLAN + 1
    assert (graph.exact("root"), graph.exact("c"), graph.exact("a")) == (at, at, graph.length("a"))
    value["nodes"]["c"]["fork"] = False
    assert drawn(value).exact("c") == drawn(value).length("c")


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


def spoil_swap_in(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = KVCache.swap_in

    def spoiled(self: KVCache, copy: Any, blocks: Any) -> None:
        for rows in copy.payload:
            rows[:, 0, 0] += 1.0
        genuine(self, copy, blocks)

    monkeypatch.setattr(KVCache, "swap_in", spoiled)


def lose_swap_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "swap_in", lambda self, copy, blocks: None)


def lose_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "copy", lambda self, copies: None)


@pytest.mark.parametrize(
    ("name", "spoil"), [("offload", spoil_swap_in), ("offload", lose_swap_in), ("pin+fork", lose_copies)]
)
def test_a_spoilt_block_is_noticed(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative control of the check: a restored block with one wrong token, none restored, a fork without a copy."""
    graph = drawn(FLAT)
    memory, variant = memory_for(model, graph), parse_variant(name)
    expected = best_logits(memory, variant.reference, graph)
    check_logits(name, graph, best_logits(memory, variant, graph), expected)
    spoil(monkeypatch)
    found = best_logits(memory, variant, graph)
    with pytest.raises(ReplayMismatch, match=r": graph flat has other logits than the reference in \d+ of 31 decode"):
        check_logits(name, graph, found, expected)


def test_other_tokens_are_noticed(model: LoadedModel) -> None:
    graph = drawn(FLAT)
    replayed = run("pin", memory_for(model, graph), graph)
    replayed.tokens["b"][-1] += 1
    with pytest.raises(ReplayMismatch, match="pin: b of graph flat did not end with the graph's tokens"):
        check_transcripts("pin", graph, replayed.tokens)


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


class Clockwork:
    """A contender with given times; it notes when it was called."""

    def __init__(self, name: str, answers: list[float], calls: list[str]) -> None:
        self.name = name
        self.answers = iter(answers)
        self.calls = calls

    def replay(self, graph: Graph) -> Replayed:
        self.calls.append(self.name)
        answer = next(self.answers)
        return Replayed(answer, [answer / 10, answer / 5], steps=3, prefilled=10, reused=4, peak_blocks=7)


@pytest.mark.parametrize(("minutes_left", "rounds"), [(-1.0, 1), (0.5, 3), (math.inf, 9)])
def test_no_round_is_begun_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, minutes_left: float, rounds: int
) -> None:
    now = 1000.0

    class Slow(Clockwork):
        def replay(self, graph: Graph) -> Replayed:
            nonlocal now
            now += 4.5
            return super().replay(graph)

    monkeypatch.setattr("rrm_engine.replay.measure.perf_counter", lambda: now)
    calls: list[str] = []
    contenders = [Slow(name, [1.0] * 10, calls) for name in "ab"]  # a round takes 9 seconds, and so does the warm-up
    rows = measure(contenders, [drawn(FLAT)], 9, until=now + 60 * minutes_left + 8)
    assert [len(row.answer_s) for row in rows] == [rounds, rounds]


def test_rounds_rotate_and_the_first_replay_does_not_count() -> None:
    calls: list[str] = []
    contenders: list[Contender] = [
        Clockwork("a", [99, 1, 4, 2, 4, 30, 4], calls),
        Clockwork("b", [99, 2, 2, 8, 2, 60, 2], calls),
    ]
    graphs = [drawn(FLAT), drawn(FLAT | {"id": "again"})]
    rows = measure(contenders, graphs, repeats=3)
    assert "".join(calls) == "ab" + 2 * "ba" + 2 * "ab" + 2 * "ba"
    assert [row.answer_s for row in rows] == [[1, 2, 30], [2, 8, 60], [4, 4, 4], [2, 2, 2]]
    a, b = summarise(rows)
    assert (a["answer_s"], a["ratio"]) == (3, pytest.approx(1))
    assert (b["answer_s"], b["ratio"]) == (5, pytest.approx((2 * 0.5) ** 0.5))
    assert (a["resume_s"], a["resume_worst_s"]) == (pytest.approx((0.3 + 0.6) / 2), pytest.approx((0.4 + 0.8) / 2))
    assert (a["prefilled"], a["peak_blocks"], a["copied_blocks"]) == (20, 7, None)
    assert (a["resume_ratio"], b["resume_ratio"]) == (pytest.approx(1), pytest.approx((2 * 0.5) ** 0.5))
    assert set(COUNTERS) <= a.keys()
    lines = markdown_table([a, b]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a | 3.00 s | 1.00x |")
    assert len(rich_table([a, b], "", wide=True).columns) == len(HEADER) > len(rich_table([a], "", wide=False).columns)


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


@pytest.mark.parametrize(
    ("geometry", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_geometries_have_the_published_number_of_parameters(geometry: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GEOMETRIES[geometry]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_random_model_is_always_the_same_and_runs() -> None:
    no_tokenizer: Any = SimpleNamespace(eos_token_id=None)
    small = GEOMETRIES["qwen3-0.6b"] | {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    graph = drawn(FLAT)
    models = [prepare_model(random_model(small, "float32"), no_tokenizer, "random") for _ in range(2)]
    sampled = [run("pin", memory_for(model, graph), graph).sampled for model in models]
    assert sampled[0] == sampled[1]
    with pytest.raises(ValueError, match="--model random:gpt-9: the geometries are smollm2-135m, qwen3"):
        load_model("random:gpt-9")


@pytest.fixture(scope="module")
def script() -> Any:
    """benchmarks/graph_replay.py as a module."""
    path = ROOT / "benchmarks" / "graph_replay.py"
    spec = importlib.util.spec_from_file_location("graph_replay", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_measures_checks_and_writes(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.jsonl").write_text(json.dumps(FLAT) + "\n")
    options = ["--policies", "pin,no-reuse", "--repeats", "1", "--check", "--kv-blocks", "80%", "--threads", "1"]
    script.main(["--graphs", str(tmp_path / "g.jsonl"), *options, "--json", str(tmp_path / "out" / "r.json")])
    assert "no-reuse" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "r.json").read_text())
    assert [entry["name"] for entry in result["summary"]] == ["pin", "no-reuse"]
    assert result["compared_steps"] == 2 * 2 * 31
    assert result["graphs"][0]["critical_path_tokens"] == 7 + 11 + 4
    assert all(len(row["answer_s"]) == 1 for row in result["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "keep"], "there is no 'keep'"),
        (["--graphs", "/nowhere.jsonl"], "--graphs /nowhere.jsonl: there is no such file"),
        (["--kv-blocks", "0%"], "--kv-blocks 0%: it takes a number of blocks, or a share"),
        (["--repeats", "0"], "--repeats and --count at least 1"),
        (["--compare", "llama"], "--compare llama: it takes vllm, vllm+fork"),
        (["--model", "random:gpt-9"], "--model random:gpt-9: the geometries are"),
    ],
)
def test_the_command_refuses_with_a_sentence(
    script: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        script.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_the_ablation_writes_table_plots_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    (tmp_path / "g.jsonl").write_text(json.dumps(FLAT) + "\n")
    options = ["--policies", "pin,offload", "--repeats", "1", "--threads", "1", "--graphs", str(tmp_path / "g.jsonl")]
    importlib.import_module("kv_ablation").main([str(tmp_path / "out"), *options])
    assert "embedded: 60 % of the blocks that pin takes" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [figures["compared_steps"] for figures in result["memory"].values()] == [62, 62]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| offload |") == 2
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "plot.svg").read_text()
