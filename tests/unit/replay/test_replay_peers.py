"""The other engines that replay our graphs: what they are asked for, and the benchmark that measures them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from replays import CONCLUSIONS, CONTINUATION, FLAT, PLAN, PREFIX, PROMPT

from rrm_engine.loading.load import load_pretrained
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.peers import Peer
from rrm_engine.replay.reader import parse_graph

pytest.importorskip("openai", reason="the client of the servers: pip install 'rrm-engine[servers]'")
import peers
from engines.over_http import OverHttp
from engines.plain import ContinuousBatching
from served import greedy, served

LENGTHS = {"root": PREFIX + PROMPT + PLAN + 1 + CONCLUSIONS + CONTINUATION, "a": PREFIX + PROMPT + 11, "b": 23}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return parse_graph(FLAT).drawn(400)


def check_greedy(graph: Graph, tokens: dict[str, list[int]]) -> None:
    """What was decoded is what plain transformers decodes after the same context, the conclusions apart."""
    assert {name: len(own) for name, own in tokens.items()} == LENGTHS
    start, pause = PREFIX + PROMPT, PREFIX + PROMPT + PLAN + 1
    phases = [("root", start, pause), ("root", pause + CONCLUSIONS, LENGTHS["root"])]
    for name, begin, end in [*phases, ("a", start, LENGTHS["a"]), ("b", start, LENGTHS["b"])]:
        own = tokens[name]
        assert own[begin:end] == list(greedy(own[:begin], end - begin, ignore_eos=True)), name
    assert tokens["root"][pause : pause + CONCLUSIONS] == graph.transcript("root")[pause : pause + CONCLUSIONS]


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_over_http_a_parent_goes_on_as_a_request_with_all_its_tokens(graph: Graph, per_chunk: int) -> None:
    with served(per_chunk=per_chunk) as server:
        requests = OverHttp(server.url, 8)
        replays = [Peer("http", requests).replay(graph) for _ in range(2)]
        requests.close()
    for replayed in replays:
        check_greedy(graph, replayed.tokens)
        assert len(replayed.resume_s) == 1 and 0 < replayed.resume_s[0] < replayed.answer_s


def test_every_replay_over_http_has_a_cache_of_its_own(graph: Graph) -> None:
    long = parse_graph(FLAT | {"nodes": {"root": {"prompt": 5, "steps": [{"decode": 20}]}}}).drawn(400)
    with served() as server:
        requests = OverHttp(server.url, 8)
        replays = [Peer("http", requests).replay(long) for _ in range(2)]
        requests.close()
        bodies = [asked.body for asked in server.habits.asked]
    assert len({body["cache_salt"] for body in bodies}) == len(bodies) == 2
    assert {(body["min_tokens"], body["max_tokens"], body["ignore_eos"]) for body in bodies} == {(20, 20, True)}
    assert [replayed.reused for replayed in replays] == [0, 0]  # as the server says: 16 for each 32 of the prompt
    assert replays[0].prefilled == PREFIX + 5


def test_continuous_batching_of_transformers(graph: Graph) -> None:
    plain: Any = load_pretrained("embedded", "float32", torch.device("cpu"))[0]
    replayed = Peer("generate-batch", ContinuousBatching(plain, 64, 4, 128)).replay(graph)
    check_greedy(graph, replayed.tokens)
    assert len(replayed.resume_s) == 1 and replayed.prefilled is None


def test_what_ends_early_is_no_replay(graph: Graph) -> None:
    """A server whose context is shorter than the graph's nodes ends them before they are as long as they should be."""
    with served(longest=PREFIX + PROMPT + PLAN) as server:
        requests = OverHttp(server.url, 8)
        with pytest.raises(RuntimeError, match="http did not end graph flat with the tokens that were asked for"):
            Peer("http", requests).replay(graph)
        requests.close()


def test_the_benchmark_measures_who_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.jsonl").write_text(json.dumps(FLAT) + "\n")
    options = ["--model", "embedded", "--graphs", str(tmp_path / "g.jsonl"), "--out", str(tmp_path / "out")]
    sizes = ["--batch", "1,2", "--prompt", "6", "--tokens", "3", "--repeats", "2"]
    nobody = ["--vllm-python", str(tmp_path / "none")]
    assert peers.main([*options, *sizes, *nobody]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert list(result["allowed"]) == ["ours", "generate-batch", "generate"]
    assert result["left_out"].keys() == {"vllm", "vllm-http"}
    assert all("--vllm-python" in why and why in " ".join(said.split()) for why in result["left_out"].values())
    names = {kind: [row["name"] for row in rows] for kind, rows in result["rows"].items()}
    assert names == {"side by side": ["ours", "generate-batch", "generate"] * 2, "shape": ["ours", "generate-batch"]}
    assert all(len(row["answer_s"]) == 2 for rows in result["rows"].values() for row in rows)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| generate |") == 2 and "| flat | generate-batch |" in table
    assert "Left out" in table and "What each was given" in table
    assert "Ours is" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "sglang"], "--peers sglang: it takes ours, vllm"),
        (["--repeats", "0"], "take at least 1"),
        (["--batch", "", "--graphs", ""], "there is nothing to replay"),
        (["--batch", "1,x"], "--batch 1,x: it takes numbers of sequences"),
        (["--batch", "0"], "--batch 0: it takes numbers of sequences"),
        (["--graphs", "/nowhere.jsonl"], "--graphs /nowhere.jsonl: there is no such file"),
        (["--from", "/nowhere"], "--from /nowhere"),
    ],
)
def test_the_benchmark_refuses_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert peers.main(["--model", "embedded", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_python_without_vllm_is_named(tmp_path: Path) -> None:
    """And one that has no such module is not mistaken for one whose start failed."""
    options = [
        "--model",
        "embedded",
        "--batch",
        "1",
        "--prompt",
        "4",
        "--tokens",
        "2",
        "--graphs",
        "",
        "--repeats",
        "1",
    ]
    assert not peers.main([*options, "--out", str(tmp_path), "--peers", "vllm", "--vllm-python", sys.executable])
    left_out = json.loads((tmp_path / "peers.json").read_text())["left_out"]
    if left_out:
        assert left_out == {"vllm": f"vLLM is not installed for {sys.executable}: name another one with --vllm-python"}
