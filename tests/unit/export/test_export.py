"""What ``export`` writes of a run: rendered again it is what each model saw, and its masks say who wrote what."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import traced
from recorded_runs import both, save
from traced import rewrite

from rrm_engine.bench.cli import main as bench
from rrm_engine.export.cli import main
from rrm_engine.loading.load import load_words
from rrm_engine.runs.events import Grammar
from rrm_engine.runs.reader import read_jobs, timeline
from rrm_engine.runs.rows import row_key
from rrm_engine.runs.trust import Label
from rrm_engine.verify.grammars import RecordedGrammars

Line = dict[str, Any]
ALL = ",".join(Label)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "embedded"
    assert bench(["--limit", "2", "--quiet", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model held to a grammar, whose tokens go across the ends of events; children fork their parents."""
    folder = tmp_path_factory.mktemp("export")
    traced.save_model(folder / "model")
    tasks = [{"problem": task.problem, "answer": task.expected} for task in traced.TASKS[:2]]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    flags = (
        "--planner-max-tokens 500 --direct-max-tokens 30 --solver-max-tokens 90 --continuation-max-tokens 300 --quiet "
        "--prompt-style embedded --constrain on --temperature 1 --top-k 0 --child-context parent --modes rrm"
    )
    out, model = ["--out", str(folder / "run")], ["--model", str(folder / "model")]
    bench([str(folder / "tasks.jsonl"), *model, *flags.split(), *out])
    return folder / "run"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, which is not trained to, under a grammar."""
    path = tmp_path_factory.mktemp("export") / "held"
    assert bench(["--limit", "1", "--modes", "rrm", "--constrain", "on", "--quiet", "--out", str(path)]) == 0
    return path


def exported(out: Path, *argv: object) -> list[Line]:
    assert main([*map(str, argv), "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """What the template makes of a conversation, without the end of its last turn and what may follow an event."""
    return closed(tokenizer.apply_chat_template(messages, tokenize=False))


def closed(text: str) -> str:
    return re.sub(r"\s*(<\|im_end\|>\s*)\Z", "", re.sub(r"\s+<\|im_end\|>", "<|im_end|>", text)).rstrip()


def check(run: Path, model: str, lines: list[Line]) -> None:
    """Rendered and tokenised again, a line is what the trace says that the node was given and sampled."""
    tokenizer, *_ = load_words(model)
    traces = {job.key: timeline(job) for job in read_jobs(run)}
    for line in lines:
        trace = traces[f"{line['id']}/{line['mode']}/{line['sample']}"]
        transcript, ids = trace.end(line["node"]).transcript, line["input_ids"]
        assert transcript is not None and ids == transcript.token_ids
        assert [span[0] for span in line["spans"]] == [0, *(span[1] for span in line["spans"])][:-1]
        assert line["spans"][-1][1] == len(ids) == len(line["assistant_masks"])
        sampled = {i for start, stop in transcript.sampled for i in range(start, stop)}
        by = {who: {i for a, b, w in line["spans"] if w == who for i in range(a, b)} for _, _, who in line["spans"]}
        assert by["model"] == {i for i, mask in enumerate(line["assistant_masks"]) if mask} <= sampled
        assert not sampled & (by["prompt"] | by.get("injected", set()))
        assert rendered(tokenizer, line["messages"]) == closed(tokenizer.decode(ids))
        if (first := min(sampled)) and [m["role"] for m in line["messages"]][:3] == ["system", "user", "assistant"]:
            prompt = tokenizer.apply_chat_template(line["messages"][:2], tokenize=False, add_generation_prompt=True)
            again = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert again == ids[: len(again)] and len(again) <= first


def test_headline_rows_are_what_the_model_saw_and_wrote(embedded: Path, tmp_path: Path) -> None:
    lines = exported(tmp_path / "x.jsonl", embedded)
    assert {line["label"] for line in lines} == {"headline"} and {line["mode"] for line in lines} == {"rrm"}
    check(embedded, "embedded", lines)
    rows = {row_key(json.loads(row)): json.loads(row) for row in (embedded / "rows.jsonl").read_text().splitlines()}
    for id in {line["id"] for line in lines}:
        own = [line for line in lines if line["id"] == id]
        assert sum(sum(line["assistant_masks"]) for line in own) == rows[f"{id}/rrm/0"]["total_tokens"]
        assert own[0]["node"] == "root" and own[0]["answer"] == rows[f"{id}/rrm/0"]["answer"]
        roles = [message["role"] for message in own[0]["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_a_conclusion_that_is_another_is_noticed(embedded: Path, tmp_path: Path) -> None:
    """Negative control of `check`: a changed text, a changed token, a mask that is moved."""
    lines = exported(tmp_path / "x.jsonl", embedded, "--nodes", "planner")
    changes: list[Callable[[Line], Any]] = [
        lambda line: line["messages"][3].update(content=line["messages"][3]["content"] + "1"),
        lambda line: line["input_ids"].__setitem__(5, line["input_ids"][5] + 1),
        lambda line: line["assistant_masks"].reverse(),
    ]
    for change in changes:
        (copy,) = json.loads(json.dumps(lines[:1]))
        change(copy)
        with pytest.raises(AssertionError):
            check(embedded, "embedded", [copy])


def test_forks_and_tokens_that_events_end_in(tiny: Path, tmp_path: Path) -> None:
    lines = exported(tmp_path / "x.jsonl", tiny, "--labels", ALL)
    check(tiny, str(tiny.parent / "model"), lines)
    forks = [line for line in lines if "." in line["node"]]
    assert forks and all(len(line["messages"]) > 3 for line in forks)


def test_what_a_grammar_left_no_choice_of(held: Path, tmp_path: Path) -> None:
    lines = exported(tmp_path / "x.jsonl", held, "--labels", ALL)
    check(held, "embedded", lines)
    traces = {job.key: timeline(job) for job in read_jobs(held)}
    tokenizer, eos, _ = load_words("embedded")
    grammars = RecordedGrammars(8, tokenizer, eos)
    texts, prescribed = grammars.compiled.texts, 0
    for line in lines:
        trace = traces[f"{line['id']}/{line['mode']}/{line['sample']}"]
        transcript, who = trace.end(line["node"]).transcript, [w for a, b, w in line["spans"] for _ in range(a, b)]
        assert transcript is not None
        for stretch, (start, stop) in zip(trace.real(line["node"]), transcript.sampled, strict=True):
            begin = trace.beginning(stretch)
            matcher = grammars.matcher(begin.phase, begin.grammar)
            if matcher is None:
                assert set(who[start:stop]) <= {"model"}
                continue
            assert isinstance(begin.grammar, Grammar)
            for at in range(start, stop):
                token, mask = transcript.token_ids[at], matcher.mask()
                if who[at] == "prescribed":  # whatever else may come here spells the same
                    prescribed += 1
                    allowed = [t for t in range(len(texts)) if mask[t // 32] >> t % 32 & 1]
                    own = texts[token]
                    assert len(allowed) == 1 or all(
                        texts[t].startswith(own) or own.startswith(texts[t]) for t in allowed
                    )
                matcher.accept(token)
    assert prescribed > 50


def test_what_is_chosen(embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = exported(tmp_path / "all.jsonl", embedded, "--labels", "headline, direct")
    assert {line["mode"] for line in every} == {"rrm", "direct"}
    assert {line["mode"] for line in exported(tmp_path / "d", embedded, "--labels", "direct", "--modes", "direct")} == {
        "direct"
    }
    planners = exported(tmp_path / "p", embedded, "--nodes", "planner")
    assert [line["node"] for line in planners] == ["root"] * len({line["id"] for line in planners})
    assert "nodes of 2 rows" in capsys.readouterr().out
    twice = exported(tmp_path / "t", embedded, embedded)
    assert len(twice) == len([line for line in every if line["label"] == "headline"])


def test_marked_rows_can_be_left_out(embedded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(embedded, tmp_path / "run")
    rows = [json.loads(row) for row in (copy / "rows.jsonl").read_text().splitlines()]
    for row, repairs in zip([row for row in rows if row["mode"] == "rrm"], ({"prose": 1}, {}), strict=True):
        row["repairs"] = repairs
    (copy / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, clean = exported(tmp_path / "a", copy), exported(tmp_path / "b", copy, "--clean")
    assert {tuple(line["marks"]) for line in kept} == {("repaired events",), ()}
    assert {tuple(line["marks"]) for line in clean} == {()} and len({line["id"] for line in clean}) == 1


def test_servers_that_gave_no_token_ids(embedded: Path, tmp_path: Path) -> None:
    """Then there are the messages, and no tokenizer is needed."""
    copy = shutil.copytree(embedded, tmp_path / "run")

    def without(event: dict[str, Any]) -> None:
        if "token_ids" in event:
            event["token_ids"] = []

    rewrite(copy, without)
    manifest = json.loads((copy / "run.json").read_text())
    manifest["resolved"]["model"] = "/nowhere"
    (copy / "run.json").write_text(json.dumps(manifest))
    lines = exported(tmp_path / "x.jsonl", copy)
    assert lines and all("input_ids" not in line and "spans" not in line for line in lines)
    assert [line["messages"] for line in lines] == [
        line["messages"] for line in exported(tmp_path / "y.jsonl", embedded)
    ]


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    try:
        assert main([str(arg) for arg in argv]) == 2
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err


def test_refusals(embedded: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.jsonl"
    said = refused(capsys, embedded, "--labels", "wrong", "--out", out)
    assert "--labels wrong chooses none" in said and "headline 2" in said
    assert "takes failed, untimed" in refused(capsys, embedded, "--labels", "good", "--out", out)
    assert "cannot be written" in refused(capsys, embedded, "--out", tmp_path / "no" / "x.jsonl")
    assert "holds no run.json" in refused(capsys, tmp_path, "--out", out)
    model = tiny.parent / "model"
    assert "was not written with the tokenizer of" in refused(capsys, embedded, "--model", model, "--out", out)
    assert "holds no trace.jsonl" in refused(capsys, save(tmp_path / "rows", both("a")), "--out", out)
    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "is not whole": lambda event: event.update(node="root.x") if event["event"] == "first_token" else None,
        "record the run again": lambda event: event.pop("prompt", None),
        "was not written with": lambda event: event.get("token_ids", []).reverse(),
    }
    for number, (wanted, damage) in enumerate(damages.items()):
        changed = shutil.copytree(embedded, tmp_path / str(number))
        rewrite(changed, damage)
        said = refused(capsys, changed, "--out", out)
        assert wanted in said and said.count("\n") == 1
    assert not out.exists()
