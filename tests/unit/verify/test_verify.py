"""Recorded runs against plain transformers: what is right is found right, and whatever was changed is found out."""

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import chat_model, chat_tokenizer
from safetensors.torch import load_file, save_file
from traced import rewrite

from rrm_engine.bench.cli import main as bench
from rrm_engine.engine.rules import Rules, make_rules
from rrm_engine.engine.sampler import SamplingParams, noise_key
from rrm_engine.verify import NodeCheck, VerifyError, verify_run
from rrm_engine.verify.cli import main
from rrm_engine.verify.redraw import Draw, draw_all, settings_of

STYLE = """
name = "terse"
description = "For tests: as short as a style can be."
trained_on_events = false
thinking = { direct = false, graph = false, solver = false, continuation = false }
budgets = { direct = 40, planner = 260, solver = 24, continuation = 60 }
system = { direct = "Solve.", recursive = "Split or solve." }
[user]
direct = "{{ task }}"
graph = "{{ task }} Split?"
solver = "{{ task }} Solve!"
resume = "{% for c in conclusions %}{{ c.id }}={{ c.final }} {% endfor %}Go on."
solve = "Now solve it."
fork = "You are {{ id }}: {{ task }}"
"""
SAMPLED = ["--temperature", "1.0", "--top-k", "60", "--top-p", "0.97", "--min-p", "0.001", "--seed", "5"]
LEANINGS = {'"': 6.0, "{": 6.0, "c": 3.5, "F": 6.0, "<|im_end|>": 2.0}
Event = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a style and tasks."""
    folder = tmp_path_factory.mktemp("verify")
    tokenizer = chat_tokenizer()
    chat_model(tokenizer, LEANINGS).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "style.toml").write_text(STYLE)
    tasks = [{"problem": "Add 2 and 3.", "answer": 5}, {"problem": "How many days?", "answer": 7}]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> Callable[..., Path]:
    """Runs the bench, once for each set of flags."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*flags: str) -> Path:
        if flags not in done:
            out = folder / f"run{len(done)}"
            always = shlex.split("--constrain on --max-depth 1 --max-sibling-width 3 --kv-blocks 200 --quiet")
            paths = ["--model", str(folder / "model"), "--prompt-style", str(folder / "style.toml"), "--out", str(out)]
            assert bench([str(folder / "tasks.jsonl"), *paths, *always, *flags]) == 0
            done[flags] = out
        return done[flags]

    return run


@pytest.fixture(scope="module")
def sampled(record: Callable[..., Path]) -> Path:
    return record(*SAMPLED)


@pytest.fixture
def copied(sampled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sampled, tmp_path / "run"))


def broken(checks: list[NodeCheck]) -> list[NodeCheck]:
    return [check for check in checks if check.verdict == "broken"]


OWN = {  # a checkpoint's own settings, of which each is seen in a short text
    "do_sample": True,
    "top_k": 60,
    "typical_p": 0.6,
    "repetition_penalty": 1.3,
    "min_new_tokens": 12,
    "suppress_tokens": list(range(97, 105)),
    "watermarking_config": {"bias": 2.0},
}


@pytest.fixture(scope="module")
def opinionated(folder: Path) -> list[str]:
    """Flags for the same model with generation settings of its own."""
    path = Path(shutil.copytree(folder / "model", folder / "opinionated"))
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**config, **OWN}))
    return ["--model", str(path)]


def test_what_a_checkpoint_wants_is_drawn_again(record: Callable[..., Path], opinionated: list[str]) -> None:
    run = record(*opinionated)
    checks = verify_run(run, dtypes=["run"])
    assert {check.verdict for check in checks} <= {"exact", "near tie"} and sum(check.drawn for check in checks) > 100
    asked = {event["phase"]: event["sampling"] for event in events_of(run) if "sampling" in event}
    plain = [name for name in OWN if name not in ("do_sample", "watermarking_config")]
    assert [asked["direct"][name] for name in plain] == [OWN[name] for name in plain]
    assert (asked["direct"]["temperature"], asked["direct"]["watermarking_config"]["bias"]) == (1.0, 2.0)
    assert asked["graph"].keys() == asked["direct"].keys() - {"repetition_penalty"}, "it rests where a grammar holds"


@pytest.mark.parametrize("left_out", ["RepetitionPenalty", "SuppressTokens", "Typical", "Watermark", "TopK"])
def test_a_processor_left_out_is_noticed(
    folder: Path, opinionated: list[str], left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_one(*args: Any, **kwargs: Any) -> Rules:
        rules = make_rules(*args, **kwargs)
        kept = [
            [p for p in chain if not type(p).__name__.startswith(left_out)] for chain in (rules.before, rules.after)
        ]
        return Rules(*kept)

    with monkeypatch.context() as patched:
        patched.setattr("rrm_engine.engine.processors.make_rules", short_of_one)
        paths = ["--prompt-style", str(folder / "style.toml"), "--out", str(tmp_path / "run"), "--kv-blocks", "100"]
        flags = [*opinionated, *paths, "--modes", "direct", "--samples", "3", "--quiet"]
        assert bench([str(folder / "tasks.jsonl"), *flags]) == 0
    assert broken(verify_run(tmp_path / "run", dtypes=["run"])) != []


def events_of(run: Path) -> list[Event]:
    return [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]


GREEDY = ["--temperature", "0"]
RUNS = {"sampled": SAMPLED, "forked": [*SAMPLED, "--child-context", "parent"], "greedy": GREEDY}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_what_was_recorded_is_exact(record: Callable[..., Path], flags: list[str]) -> None:
    checks = verify_run(record(*flags))
    assert {check.verdict for check in checks} == {"exact"}
    assert all(check.agreement == 1.0 and check.logit_difference_share < 1e-4 and check.kl < 1e-8 for check in checks)
    assert {check.reference for check in checks} == {"float32"}
    assert all(check.drawn == (check.written if flags != GREEDY else 0) for check in checks)
    if flags == GREEDY:
        assert all(check.greedy_agreement == 1.0 for check in checks)
    else:  # the run tests something: graphs with conclusions, sampled beside the likeliest token
        assert any("." in check.node for check in checks)
        assert any(check.greedy_agreement < 1.0 for check in checks)


def test_every_node_that_wrote_is_checked(sampled: Path) -> None:
    events = [json.loads(line) for line in (sampled / "trace.jsonl").read_text().splitlines()]
    over = [e for e in events if e["event"] in ("concluded", "cancelled") and e.get("sampled")]
    expected = {f"{e['job']}:{e['node']}": sum(b - a for a, b in e["sampled"]) for e in over}
    assert {c.key: c.written for c in verify_run(sampled)} == {key: n for key, n in expected.items() if n}
    assert any(len(e["sampled"]) > 1 for e in over)  # among them nodes that went on after a pause
    assert any(e["event"] == "start" and e["grammar"] for e in events)


def test_half_precision_is_close(record: Callable[..., Path]) -> None:
    checks = verify_run(record(*SAMPLED, "--dtype", "bfloat16"))
    own, other = [c for c in checks if c.promised], [c for c in checks if not c.promised]
    assert {c.reference for c in own} == {"bfloat16"} and {c.verdict for c in own} == {"close"}
    assert {c.reference for c in other} == {"float32"} and {c.verdict for c in other} == {"reported"}
    assert sum(c.agree for c in own) > 0.9 * sum(c.written for c in own)


def test_command(sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sampled), "--json", str(tmp_path / "out.json"), "--jobs", "line-1/rrm", "--nodes", "root"]) == 0
    out, err = capsys.readouterr()
    assert "Kept: every one of" in out and "exact" in out and "\x1b" not in out + err
    assert all(len(line) <= 80 for line in out.splitlines())
    (check,) = json.loads((tmp_path / "out.json").read_text())["checks"]
    assert (check["job"], check["node"], check["verdict"]) == ("line-1/rrm/0", "root", "exact")
    assert check["agreement"] == 1.0 and check["divergence"] is None


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_token_that_was_changed(copied: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    def change(event: Event) -> None:
        if event["event"] == "concluded" and (event["job"], event["node"]) == ("line-2/direct/0", "root"):
            low, high = event["sampled"][-1]
            changed.append({"first": low, "middle": (low + high) // 2, "last": high - 1}[place])
            event["token_ids"][changed[0]] ^= 1

    changed: list[int] = []
    rewrite(copied, change)
    assert main([str(copied)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "line-2/direct/0:root (fp32): broken" in out and f"position {changed[0]} (direct): recorded" in out
    assert "Broken: 1 of" in out and "the model or the trace was changed" in out


def test_a_token_that_the_grammar_rules_out(copied: Path) -> None:
    def change(event: Event) -> None:
        if event["event"] == "concluded" and (event["job"], event["node"]) == ("line-1/rrm/0", "root"):
            event["token_ids"][event["sampled"][0][0] + 3] = 0

    rewrite(copied, change)
    (found,) = broken(verify_run(copied))
    assert found.key == "line-1/rrm/0:root" and found.divergence and found.divergence.gap == math.inf


def test_a_prompt_that_was_changed(copied: Path) -> None:
    def change(event: Event) -> None:
        if event["event"] == "concluded" and (event["job"], event["node"]) == ("line-1/direct/0", "root"):
            event["token_ids"][event["sampled"][0][0] - 1] ^= 1

    rewrite(copied, change)
    assert [check.key for check in broken(verify_run(copied))] == ["line-1/direct/0:root"]


def test_another_seed(copied: Path) -> None:
    manifest = json.loads((copied / "run.json").read_text())
    manifest["resolved"]["seed"] += 1
    (copied / "run.json").write_text(json.dumps(manifest))
    assert broken(verify_run(copied, limit=2))


def test_other_weights(folder: Path, sampled: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder / "model", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.05
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert main([str(sampled), "--model", str(other), "--quiet"]) == 1


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which the command refuses."""
    assert main([*argv, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_trace_that_was_cut_short(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = (copied / "trace.jsonl").read_bytes()
    for length in (len(trace) - 40, len(trace) * 2 // 3):
        (copied / "trace.jsonl").write_bytes(trace[:length])
        assert "is not whole" in refusal(capsys, str(copied))
    lines = trace.splitlines(keepends=True)
    (copied / "trace.jsonl").write_bytes(b"".join([*lines[:9], lines[9][:20] + b"\n", *lines[10:]]))
    assert "line 10: not what a run writes there" in refusal(capsys, str(copied))


def test_refusals(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(copied)
    assert "holds no run.json" in refusal(capsys, str(tmp_path))
    assert "is not a directory" in refusal(capsys, str(tmp_path / "nothing"))
    assert "--nodes root.x: there is no such node; there are root" in refusal(capsys, run, "--nodes", "root.x")
    assert "--jobs x: there is no such job; there are line-1/" in refusal(capsys, run, "--jobs", "x")
    assert "--model ./nothing: there is no such directory" in refusal(capsys, run, "--model", "./nothing")
    rewrite(copied, lambda event: event.get("token_ids", [0] * 3).__setitem__(2, 100_000))
    assert "token 100000 at position 2" in refusal(capsys, run)
    rewrite(copied, lambda event: event.pop("sampling", None))
    assert "does not say how root was sampled" in refusal(capsys, run)
    for name in ("rows.jsonl", "trace.jsonl"):
        (copied / name).write_text("")
    with pytest.raises(VerifyError, match="no finished job"):
        verify_run(copied)


FILTERS = [
    SamplingParams(0.7),
    SamplingParams(0.7, 5),
    SamplingParams(1.3, 0, 0.9),
    SamplingParams(0.6, 20, 0.95, 0.02),
]


@pytest.mark.parametrize("params", [*FILTERS, SamplingParams(0.0)], ids=str)
def test_what_an_error_explains(params: SamplingParams) -> None:
    """A draw from disturbed logits is always explained by the disturbance, and its gap is no larger than that."""
    generator = torch.Generator().manual_seed(0)
    moved, error, settings = 0, 0.05, settings_of(params, 60)
    for position in range(200):
        logits = torch.randn(60, generator=generator)
        disturbed = logits + error * (2 * torch.rand(60, generator=generator) - 1)
        draw = Draw(logits, position, settings, noise_key(1, "a"))
        (token,) = draw_all([draw])
        (other,) = draw_all([Draw(disturbed, position, settings, noise_key(1, "a"))])
        assert draw.explains(token, 1e-6) and draw.explains(other, error)
        moved += other != token
        assert draw.gap(other) <= 2 * error * 1.001
    assert moved
