"""Graph files: what the reader refuses, the shapes, a recorded run as a graph, and the walk through a graph."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import by_hand
import pytest

from rrm_engine import RunConfig, Solver
from rrm_engine.bench.grader import Verdict
from rrm_engine.bench.rows import make_row
from rrm_engine.loading.prepare import load_model
from rrm_engine.replay.contender import Replayed
from rrm_engine.replay.driver import Memory, Ours, blocks_needed
from rrm_engine.replay.generate import SHAPES, generate
from rrm_engine.replay.graph import Append, Await, Decode, Graph, Node
from rrm_engine.replay.reader import GraphError, as_json, parse_graph, read_graphs, write_graphs
from rrm_engine.replay.recorded import recorded_graphs
from rrm_engine.replay.split import sentence, split
from rrm_engine.replay.variant import parse_variant
from rrm_engine.replay.walk import Resume, Start, Walk
from rrm_engine.runs.directory import RunDir
from rrm_engine.solver.result import Job

SHIPPED = Path(__file__).parents[3] / "benchmarks" / "graphs"
TWO: dict[str, Any] = {
    "id": "two",
    "seed": 7,
    "shared_prefix": 5,
    "nodes": {
        "root": {
            "prompt": 4,
            "steps": [
                {"decode": 6},
                {"child": "root.a"},
                {"decode": 2},
                {"child": "root.b"},
                {"await": ["root.a", "root.b"]},
                {"append": 3},
                {"decode": 7},
            ],
        },
        "root.a": {"prompt": [1, 2, 3], "steps": [{"decode": 9}]},
        "root.b": {"prompt": 2, "steps": [{"decode": [4, 5, 6, 7]}], "fork": True, "after": ["root.a"]},
    },
}


APPENDED = [{"append": 1}, {"append": 4, "of": "root.a"}, {"append": [5, 6], "of": "root.b"}, {"append": 1}]


def changed(path: str, value: Any) -> Any:
    """TWO with one thing replaced, or removed where ``value`` is None; ``path`` has its keys, joined by slashes."""
    graph = json.loads(json.dumps(TWO))
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    at = graph
    for key in way:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return graph


def test_a_graph_comes_back_as_it_was_written(tmp_path: Path) -> None:
    graphs = [parse_graph(TWO), *generate("small", 2), *generate("aime", 1)]
    write_graphs(tmp_path / "g.jsonl", graphs)
    assert read_graphs(tmp_path / "g.jsonl") == graphs
    assert json.loads((tmp_path / "g.jsonl").read_text().splitlines()[0]) == TWO


def test_appended_tokens_may_be_a_childs(tmp_path: Path) -> None:
    steps = [*TWO["nodes"]["root"]["steps"][:-2], *APPENDED, {"decode": 7}]
    value = changed("nodes/root/steps", steps)
    graph = parse_graph(value)
    write_graphs(tmp_path / "g.jsonl", [graph])
    assert json.loads((tmp_path / "g.jsonl").read_text()) == value
    drawn = graph.drawn(50)
    a, b = drawn.transcript("root.a"), drawn.transcript("root.b")
    appended = drawn.transcript("root")[-7 - 8 : -7]
    assert (appended[1:5], appended[5:7]) == (a[-4:], [5, 6])
    starts = len(a) - 4, len(b) - 3
    assert [(x.at, x.child, x.start, x.size) for x in drawn.all_attached()] == [
        (1, "root.a", starts[0], 3),  # its last token has not been run
        (5, "root.b", starts[1], 2),
    ]
    whole = drawn.transcribed()
    assert whole.length("root") == drawn.length("root") + (9 - 4) + (4 - 2)
    assert parse_graph(changed("nodes/root/steps/5", {"append": 3})).drawn(50).all_attached() == []


def test_figures_of_a_graph() -> None:
    graph = parse_graph(TWO)
    assert graph.roots == ["root"]
    assert [graph.depth(name) for name in graph.nodes] == [0, 1, 1]
    assert [graph.context(name) for name in graph.nodes] == [9, 8, 9 + 8 + 2]
    assert [graph.length(name) for name in graph.nodes] == [9 + 8 + 3 + 7, 17, 23]
    assert graph.critical_path() == 6 + 9 + 4 + 7


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", None, "the line lacks id"),
        ("id", 3, "id takes a name, not 3"),
        ("seed", "x", 'seed takes a whole number, not "x"'),
        ("shared_prefix", -1, "shared_prefix takes a count of at least 0 or a list of token ids, not -1"),
        ("nodes", {}, "nodes takes an object with at least one node"),
        ("extra", 1, "the line has the unknown key 'extra'"),
        ("nodes/root/prompt", 0, "prompt of root takes a count of at least 1 or a list of token ids, not 0"),
        ("nodes/root/prompt", True, "prompt of root takes a count of at least 1 or a list of token ids, not true"),
        ("nodes/root/prompt", [1, -2], "prompt of root takes a count of at least 1"),
        ("nodes/root.a/prompt", [], "prompt of root.a takes a count of at least 1"),
        ("nodes/root/steps", None, "root lacks steps"),
        ("nodes/root/steps", [], "the first and the last step of root have to be decode"),
        ("nodes/root/steps/6", None, "the first and the last step of root have to be decode"),
        ("nodes/root/steps/0", {"child": "root.a"}, "the first and the last step of root have to be decode"),
        ("nodes/root/steps/2", {"sleep": 1}, "a step of root has one key, decode, child, await or append, and this is"),
        ("nodes/root/steps/2", {"decode": 1, "append": 2}, "a step of root has one key"),
        ("nodes/root/steps/1", {"child": 4}, "child of root takes a node's name, not 4"),
        ("nodes/root/steps/1", {"child": "root.c"}, "root starts root.c, and there is no such node"),
        ("nodes/root/steps/3", {"child": "root.a"}, "root awaits root.b, which it has not started before"),
        ("nodes/root/steps/5", {"child": "root.a"}, "root starts root.a between two decode steps"),
        ("nodes/root/steps/4", {"await": []}, "await of root takes a list of node names, not []"),
        ("nodes/root.a/steps", [{"decode": 1}, {"child": "root.b"}, {"decode": 1}], "root.b is started twice"),
        ("nodes/root.b/after", ["nobody"], "root.b comes after nobody, and there is no such node"),
        ("nodes/root.a/after", ["root.b"], "its nodes wait for each other in a circle, so it can never end"),
        ("nodes/root.a/after", ["root"], "its nodes wait for each other in a circle, so it can never end"),
        ("nodes/root.b/fork", 1, "fork of root.b takes true or false, not 1"),
        ("nodes/root/fork", True, "root forks and no child step starts it"),
        ("nodes/root/steps/5", {"append": 3, "of": 4}, "of of root takes a node's name, not 4"),
        (
            "nodes/root/steps/5",
            {"append": 3, "of": "root.c"},
            "root appends tokens of root.c, which it has not awaited",
        ),
        ("nodes/root/steps/5", {"append": 10, "of": "root.a"}, "root appends 10 tokens of root.a, which has 9 at last"),
        (
            "nodes/root/steps/5",
            {"append": [5, 7], "of": "root.b"},
            "root appends tokens of root.b that root.b does not",
        ),
        ("nodes/root/steps/5", {"append": 3, "from": "root.a"}, "a step of root has one key"),
    ],
)
def test_malformed_graphs_are_refused_with_a_sentence(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(TWO | {"id": "first"}) + "\n\n" + json.dumps(changed(path, value)) + "\n")
    with pytest.raises(GraphError) as refused:
        read_graphs(file)
    assert str(refused.value).startswith(f"{file}, line 3: {message}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: the line has to be an object, not [1]"),
        ('{"id": "a", "id": "b", "nodes": {}}', "line 1: the key 'id' stands twice in one object"),
        (json.dumps(TWO) + "\n" + json.dumps(TWO), "line 2: id 'two' is that of line 1 too"),
        ("\n", "holds no graph"),
    ],
)
def test_malformed_files_are_refused_with_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(GraphError, match=message.replace("[", r"\[")):
        read_graphs(file)
    with pytest.raises(GraphError, match="there is no such file"):
        read_graphs(tmp_path / "nowhere.jsonl")


def test_tokens_are_drawn_from_the_seed() -> None:
    graph = parse_graph(TWO)
    drawn = graph.drawn(50)
    assert drawn == graph.drawn(50)
    assert drawn.nodes["root.a"].prompt == (1, 2, 3)
    assert [drawn.length(name) for name in drawn.nodes] == [graph.length(name) for name in graph.nodes]
    tokens = drawn.transcript("root.b")
    assert tokens[:17] == drawn.transcript("root")[:17]
    assert tokens[-4:] == [4, 5, 6, 7]
    assert all(0 <= token < 50 for name in drawn.nodes for token in drawn.transcript(name))
    assert parse_graph(changed("seed", 8)).drawn(50).transcript("root") != drawn.transcript("root")
    with pytest.raises(ValueError, match="token id 7 and the model knows none above 5: replay it with the --model"):
        graph.drawn(6)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_generated_graphs_have_their_shape(shape: str) -> None:
    bounds, graphs = SHAPES[shape], generate(shape, 30)
    assert generate(shape, 3) == graphs[:3]
    assert generate(shape, 3, seed=1) != graphs[:3]
    splits = depends = 0
    for graph in graphs:
        assert parse_graph(as_json(graph)) == graph
        for name, node in graph.nodes.items():
            depends += bool(node.after)
            if not node.children:
                assert bounds.solve[0] <= node.decoded <= bounds.solve[1]
                continue
            splits += name != "root"
            *plan, continuation = (step for step in node.steps if not isinstance(step, Append | Await))
            carried = [step.of for step in node.steps if isinstance(step, Append) and step.of]
            assert carried == node.children
            planned = sum(step.tokens for step in plan if isinstance(step, Decode) and isinstance(step.tokens, int))
            assert bounds.plan[0] <= planned <= bounds.plan[1]
            assert bounds.children[0] <= len(node.children) <= bounds.children[1]
            assert isinstance(continuation, Decode)
            assert bounds.continuation[0] <= node.decoded - planned <= bounds.continuation[1]
        assert max(map(graph.depth, graph.nodes)) <= 2
    assert splits and depends


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_shipped_graphs_are_what_the_generator_makes(shape: str) -> None:
    shipped = read_graphs(SHIPPED / f"{shape}.jsonl")
    assert shipped == generate(shape, len(shipped))


def test_serial_runs_one_node_at_a_time_depth_first() -> None:
    graph = generate("small", 2)[1].drawn(50)
    walk, running, order = Walk(graph, serial=True), set(), []
    commands = walk.start()
    while True:
        for command in commands:
            if isinstance(command, Start | Resume):
                running.add(command.node)
                order.append(command.node)
            else:
                running.remove(command.node)
            assert len(running) <= 1
        if not running:
            break
        commands = walk.token(next(iter(running)))
    assert walk.answered and walk.unfinished == []
    inner = next(name for name in graph.nodes if name != "root" and graph.nodes[name].children)
    first, *_, last = [i for i, name in enumerate(order) if name == inner]
    assert all(name.startswith(inner) for name in order[first:last])  # nobody else in between


@pytest.fixture(scope="module", params=["task", "parent"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model as the bench records it, recursive and direct, greedy, also with forks."""
    tasks = [json.loads(line) for line in (SHIPPED.parents[1] / "rrm_engine/data/embedded_tasks.jsonl").open()]
    kinds = {task["id"].rpartition("-")[0]: task["problem"] for task in reversed(tasks)}  # the first one of each
    texts = [kinds[kind] for kind in ("flat", "depends", "nested")]
    config = RunConfig(temperature=0.0, child_context=request.param, planner_max_tokens=200, solver_max_tokens=60)
    directory = RunDir.create(tmp_path_factory.mktemp("run") / "run")
    directory.write_manifest(by_hand.manifest(child_context=request.param))
    solver = Solver.load(config, texts)
    jobs = [Job(f"t{i}", text, "rrm") for i, text in enumerate(texts)]
    for result in solver.run([*jobs, Job("t0", texts[0], "direct")], directory.event, concurrency=2):
        directory.add(make_row(result, None, Verdict(None), {}, 0))
    directory.close()
    return directory.path


def test_a_recorded_run_replays_token_by_token(recorded: Path) -> None:
    """The graphs have the rows' figures, and greedy sampling, left free in each step, writes what was recorded."""
    rows = {f"{r['id']}/{r['mode']}/{r['sample']}": r for r in map(json.loads, (recorded / "rows.jsonl").open())}
    graphs = recorded_graphs(recorded)
    assert {graph.id for graph in graphs} == rows.keys()
    model = load_model("embedded")
    memory = Memory(model, max(blocks_needed(graph, 16) for graph in graphs))
    for graph in graphs:
        row = rows[graph.id]
        assert parse_graph(as_json(graph)) == graph
        assert graph.drawn(model.model.config.vocab_size) == graph
        assert graph.critical_path() == row["critical_path_tokens"]
        assert sum(node.decoded for node in graph.nodes.values()) == row["total_tokens"]
        assert len(graph.nodes) == row["nodes"]
        replayed = Ours(parse_variant("drop"), memory).replay(graph)
        for name, node in graph.nodes.items():
            assert replayed.tokens[name] == graph.transcript(name)
            decoded = [t for step in node.steps if isinstance(step, Decode) for t in step.tokens]  # type: ignore[union-attr]
            assert replayed.sampled[name] == decoded, name
    depths = [max(map(graph.depth, graph.nodes)) for graph in graphs]
    assert max(depths) >= 1
    forks = any(node.fork for graph in graphs for node in graph.nodes.values())
    assert forks == (json.loads((recorded / "run.json").read_text())["resolved"]["child_context"] == "parent")


@pytest.mark.parametrize("join", ["splice", "transcript"])
def test_what_a_recorded_run_attached_is_attached_again(tmp_path: Path, join: str) -> None:
    tasks = [json.loads(line) for line in (SHIPPED.parents[1] / "rrm_engine/data/embedded_tasks.jsonl").open()]
    texts = [next(t["problem"] for t in tasks if t["id"].startswith(kind)) for kind in ("flat", "nested")]
    directory = RunDir.create(tmp_path / "run")
    directory.write_manifest(by_hand.manifest(child_context="task"))
    solver = Solver.load(RunConfig(join=join, temperature=0.0, splice_report=0), texts)
    rows = {}
    for result in solver.run([Job(f"t{i}", text) for i, text in enumerate(texts)], directory.event):
        directory.add(make_row(result, None, Verdict(None), {}, 0))
        rows[result.job.key] = result
    directory.close()
    memory = Memory(solver.model, 400, splices=True)
    graphs = recorded_graphs(directory.path)
    assert sum(result.spliced_tokens for result in rows.values()) > 0
    for graph in graphs:
        assert parse_graph(as_json(graph)) == graph
        replayed = Ours(parse_variant("splice"), memory).replay(graph)
        assert replayed.attached == rows[graph.id].spliced_tokens
        assert replayed.tokens == {name: graph.transcript(name) for name in graph.nodes}


def test_a_wrong_token_in_a_recording_is_noticed(recorded: Path) -> None:
    """Negative control of the test above: with its prompt turned round the model writes something else."""
    graph = next(graph for graph in recorded_graphs(recorded) if len(graph.nodes) > 1)
    node = graph.nodes["root"]
    assert not isinstance(node.prompt, int)
    other = Graph(graph.id, {**graph.nodes, "root": Node(node.prompt[::-1], node.steps)}, graph.shared_prefix)
    memory = Memory(load_model("embedded"), blocks_needed(graph, 16))
    variant = parse_variant("pin")
    assert Ours(variant, memory).replay(other).sampled != Ours(variant, memory).replay(graph).sampled


def test_a_speed_up_is_split_by_replays_of_the_recorded_tokens(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors come from the direct run, and from the graph serially, without reuse, and as it was."""
    graphs = recorded_graphs(recorded)
    memory = Memory(load_model("embedded"), max(blocks_needed(graph, 16) for graph in graphs))
    seconds = {"direct/pin": 12.0, "rrm/serial+no-reuse": 10.0, "rrm/no-reuse": 4.0, "rrm/pin": 3.0}
    replay, seen = Ours.replay, []

    def timed(self: Ours, graph: Graph) -> Replayed:
        seen.append(f"{graph.id.split('/')[1]}/{self.name}")
        return replace(replay(self, graph), answer_s=seconds[seen[-1]])

    monkeypatch.setattr(Ours, "replay", timed)
    (found,) = split(memory, graphs, 1)
    assert (found.task, found.tokens, found.parallelism, found.reuse) == ("t0/0", 1.2, 2.5, 4 / 3)
    assert found.speedup == pytest.approx(12 / 3)
    assert "4.00x faster than direct = 2.50x by parallelism * 1.33x by KV reuse * 1.20x" in sentence([found])
    assert sorted(seen) == sorted(2 * list(seconds))
    with pytest.raises(ValueError, match="--modes direct,rrm"):
        split(memory, [graph for graph in graphs if "/direct/" not in graph.id], 1)


def test_a_run_that_cannot_be_read_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"--from .* holds no run\.json; pass the directory of a recorded run"):
        recorded_graphs(tmp_path)
    for name in ("run.json", "rows.jsonl"):
        (tmp_path / name).write_bytes((recorded / name).read_bytes())
    lines = (recorded / "trace.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trace.jsonl").write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(GraphError, match=r"--from .*: the trace of .* cannot be replayed: "):
        recorded_graphs(tmp_path)
