"""Whole recursive runs whose conclusions are attached: what is marked, measured, exact up to there, and given back."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab import JOBS, SMALLEST, Lab, Recorded, idle, recorded, wrong_tokens
from traced import rewrite

from rrm_engine import RunConfig, Solver
from rrm_engine.backends.join import Kept, _locate
from rrm_engine.bench.cli import main as bench
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sequence import Sequence
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.verify import verify_run
from rrm_engine.verify.cli import main

ALL = 10_000  # boundary tokens


@pytest.fixture(scope="module")
def spliced(lab: Lab) -> Recorded:
    return recorded(lab, join="splice", seed=2)  # where it shows


@pytest.fixture(scope="module")
def transcripts(lab: Lab) -> Recorded:
    return recorded(lab, join="transcript")


def begins(run: Recorded) -> dict[str, int]:
    """By sequence the first attached token."""
    return {key: min(a for a, _ in end["spliced"]) for key, end in run.ends().items() if end["spliced"]}


def reports(run: Recorded) -> list[dict[str, Any]]:
    return [report for result in run.results.values() for report in result.splice_report]


def check_marked(plain: Any, run: Recorded) -> None:
    first = begins(run)
    wrong = wrong_tokens(plain, run)
    assert first and all(min(wrong[key]) > first[key] for key in wrong), "not exact up to what was attached"
    by_job = {
        key: sum(b - a for e in run.events if "token_ids" in e and e["job"] == key for a, b in e["spliced"])
        for key in run.results
    }
    assert {key: r.spliced_tokens for key, r in run.results.items()} == by_job
    assert all(r.splice_report for r in run.results.values() if r.spliced_tokens)


def test_rows_and_nodes_are_marked_and_exact_up_to_there(lab: Lab, spliced: Recorded) -> None:
    check_marked(lab.plain, spliced)
    assert max(report["kl_max"] for report in reports(spliced)) > 1e-4


def test_attached_tokens_are_the_childs_own(spliced: Recorded, transcripts: Recorded) -> None:
    for run, least in ((spliced, 1), (transcripts, 10)):
        ends = run.ends()
        sizes = []
        for event in run.events:
            if event["event"] != "resume" or not event["spliced"]:
                continue
            parent = ends[f"{event['job']}:{event['node']}"]["token_ids"]
            written = [ends[f"{event['job']}:{path}"]["token_ids"] for path in event["after"]]
            for start, stop in event["spliced"]:
                part = parent[start:stop]
                assert any(part == w[i : i + len(part)] for w in written for i in range(len(w)))
                sizes.append(len(part))
        assert max(sizes) >= least


def test_whole_answers(lab: Lab, transcripts: Recorded) -> None:
    check_marked(lab.plain, transcripts)
    assert max(r.spliced_tokens for r in transcripts.results.values()) > 20


def test_the_first_tokens_of_every_span_are_computed_again(lab: Lab) -> None:
    run = recorded(lab, join="transcript", boundary_tokens=5)
    check_marked(lab.plain, run)
    ends = run.ends()
    for event in [e for e in run.events if e["event"] == "resume"]:
        parent = ends[f"{event['job']}:{event['node']}"]["token_ids"]
        children = [ends[f"{event['job']}:{path}"] for path in event["after"]]
        answers = [child["token_ids"][child["sampled"][-1][0] :] for child in children]
        for start, stop in event["spliced"]:
            assert any(answer[: stop - start + 5] == parent[start - 5 : stop] for answer in answers)


def test_a_boundary_longer_than_every_span_is_the_text(lab: Lab, reference: Recorded) -> None:
    run = recorded(lab, join="splice", boundary_tokens=ALL)
    assert run.rows() == reference.rows()
    assert sum(r.spliced_tokens for r in run.results.values()) == 0
    assert sum(r.text_joins for r in run.results.values()) > 0


def test_what_is_computed_again_is_measured_as_no_difference(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that are lost between resume and step: the tokens are the child's, their KV is the text's."""
    resume = Engine.resume

    def losing(self: Engine, sequence: Sequence, *args: Any) -> None:
        resume(self, sequence, *args)
        sequence.give_up_spans()

    monkeypatch.setattr(Engine, "resume", losing)
    run = recorded(lab, join="splice")
    assert max(report["tokens"] for report in reports(run)) == 16
    assert all(r["kl_max"] < 1e-5 and r["first_difference"] is None and r["top1"] == 1 for r in reports(run))
    assert sum(r.spliced_tokens for r in run.results.values()) == 0
    assert wrong_tokens(lab.plain, run) == {}


@pytest.mark.parametrize("join", ["splice", "transcript"])
@pytest.mark.parametrize("policy", ["pin", "offload", "auto"])
def test_under_pressure_nothing_is_lost_and_all_is_still_marked(lab: Lab, join: str, policy: str) -> None:
    run = recorded(lab, join=join, kv_blocks=SMALLEST, wait_policy=policy, max_concurrency=5)
    first = begins(run)
    assert all(key in first and min(wrong) > first[key] for key, wrong in wrong_tokens(lab.plain, run).items())
    assert all(r.error is None for r in run.results.values())


@pytest.mark.parametrize("kind", ["resume", "concluded", "first_token"])
def test_an_interrupt_frees_kept_spans_and_shadows(lab: Lab, kind: str) -> None:
    solver, seen = lab.solver(join="transcript"), 0

    def interrupt(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == kind
        if event["event"] == kind and seen == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(solver.run(JOBS, interrupt, concurrency=4))
    assert idle(solver)


def test_the_embedded_model() -> None:
    solver = Solver.load(RunConfig(join="splice", attention="sdpa"))
    task = "(a) Zeno begins at 227 and repeats one step 5 times: multiply by 9, then add 8. "
    result = solver.solve(
        task + "(b) Ada begins at 31 and repeats one step 4 times: multiply by 3, then add 5. "
        "Find the total at the end."
    )
    assert result.error is None
    assert result.status != "graph" or result.spliced_tokens > 0
    solver.close()


def test_a_model_whose_keys_cannot_be_moved_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrm_engine.loading.rotary.TOLERANCE", {})
    monkeypatch.setattr("rrm_engine.loading.rotary.LOW_PRECISION_TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"^tiny: KV of layer 0 cannot be moved.*use --join text$"):
        lab.solver(join="splice")
    lab.solver()


# finding and rendering


def node(*pieces: str) -> Any:
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    written = SimpleNamespace(tokens=[0] * 3 + list(range(10, 10 + len(pieces))))
    return SimpleNamespace(pieces=list(pieces), ends=ends, first=3, sequence=written)


def test_where_a_conclusion_stands_in_the_tokens() -> None:
    assert _locate(node("FINAL: ", "4", "2", '"}'), "42") == (4, Kept("", [11, 12], ""))
    assert _locate(node("42 FINAL:", " 4", "2", '3"}'), "423") == (5, Kept("4", [12], "3"))
    assert _locate(node("42", " FINAL: ", "42"), "42") == (5, Kept("", [12], ""))  # the last one
    assert _locate(node("FINAL: ", "", "é", "", "ü"), "é") == (4, Kept("", [11, 12], ""))  # bytes of a character
    assert _locate(node("FINAL: 4", '2"}'), "42") is None  # no whole token
    assert _locate(node("FINAL: ", "1\\n2"), "1\n2") is None  # escaped


def test_a_turn_around_tokens_has_the_turns_text(lab: Lab) -> None:
    tokenizer = lab.model.tokenizer
    chat = ChatFormat(tokenizer)
    parts = chat.turn_around("a=\U000f0001, b=\U000f0000.", "\U000f0000\U000f0001", closed=True)
    assert [p for p in parts if isinstance(p, str)] == ["\U000f0001", "\U000f0000"]
    text = "".join(p if isinstance(p, str) else tokenizer.decode(p) for p in parts)
    assert text.replace("\U000f0001", "1").replace("\U000f0000", "0") == tokenizer.decode(
        chat.turn("a=1, b=0.", closed=True)
    )


# recorded runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("joined") / "run"
    assert bench(["--limit", "1", "--modes", "rrm", "--join", "transcript", "--out", str(out), "--quiet"]) == 0
    return out


def test_verification_promises_what_comes_before_a_splice(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = {check.key: check for check in verify_run(run)}
    assert {check.verdict for check in checks.values()} == {"exact", "spliced"}
    assert main([str(run), "--quiet"]) == 0
    assert "KV was attached" in " ".join(capsys.readouterr().out.split())
    key = next(key for key, check in checks.items() if check.verdict == "spliced" and check.splice_kl)
    for after in (True, False):
        copied = Path(shutil.copytree(run, tmp_path / str(after)))

        def change(event: dict[str, Any], after: bool = after) -> None:
            if f"{event['job']}:{event['node']}" == key and "token_ids" in event:
                event["token_ids"][event["sampled"][-1 if after else 0][0]] ^= 1

        rewrite(copied, change)
        found = {check.key: check for check in verify_run(copied)}[key]
        assert found.verdict == ("spliced" if after else "broken")
        assert found.spliced == checks[key].spliced > 0
        if not after:
            assert found.divergence is not None
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert any(
        row["spliced_tokens"] and row["splice_report"] and row["settings"]["join"] == "transcript" for row in rows
    )


def test_a_run_that_hides_what_was_attached_fails(run: Path, tmp_path: Path) -> None:
    """Control: a wrong token after a splice is forgiven, but not in a node that is said to be exact."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))

    def hide(event: dict[str, Any]) -> None:
        if event.get("spliced") and "token_ids" in event:
            event["spliced"] = []
            event["token_ids"][event["sampled"][-1][0]] ^= 1

    rewrite(copied, hide)
    assert any(check.verdict == "broken" for check in verify_run(copied))
