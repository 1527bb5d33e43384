"""``runs.load``: rows, nodes and events as data frames, against what the files say; and how a run shows itself."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import by_hand
import pytest
from recorded_runs import both, row, save
from scripted import Scripted, Text, pieces, solve

from rrm_engine import runs
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Status
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.events import Cancelled, Concluded
from rrm_engine.runs.reader import read_jobs, read_rows
from rrm_engine.runs.rows import row_key
from rrm_engine.solver.result import Job

pytest.importorskip("pandas")

PAGE = Path(__file__).parents[3] / "docs" / "output.md"
HALF = "\ud800<script>alert(1)"
PLAN = '{"type":"child","id":"a","task":"one"}\n{"type":"child","id":"b","task":"two"}\n{"type":"await"}\n'
SCRIPT = {
    "root": [Text(pieces(PLAN)), Text(pieces('{"type":"atomic","answer":"FINAL: 3"}'))],
    "root.a": [Text(pieces('{"type":"atomic","answer":"FINAL: 1"}'))],
    "root.b": [Text(pieces("\x1b<b>FINAL: 2"))],
}


def with_events(path: Path, events: list[dict[str, Any]]) -> None:
    (path / "trace.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture(scope="module")
def recorded(calm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model in both modes."""
    path = save(tmp_path_factory.mktemp("frames") / "runs" / "mine", list(read_rows(calm)))
    shutil.copy(calm / "trace.jsonl", path)
    return path


def test_frames_say_what_the_files_say(recorded: Path) -> None:
    found, jobs = runs.load(recorded, tokens=True), read_jobs(recorded)
    rows = list(read_rows(recorded))
    assert list(found.rows["job"]) == list(map(row_key, rows))
    for name in ("latency_s", "total_tokens", "correct", "answer", "finish_reasons", "nodes"):
        assert list(found.rows[name]) == [one[name] for one in rows]
    assert set(found.rows["label"]) <= {"wrong", "invalid graph", "fallback", "control", "direct"}
    assert len(found.events) == sum(len(job.events) for job in jobs)
    ends = [event for job in jobs for event in job.events if isinstance(event, Concluded | Cancelled)]
    by_node = found.nodes.set_index(["job", "node"])
    assert len(ends) > 8
    for end in ends:
        node = by_node.loc[(end.job, end.node)]
        assert node["end"] == end.EVENT and end.transcript is not None and node["token_ids"] == end.transcript.token_ids
        assert node["tokens"] == sum(stop - start for start, stop in node["sampled"])
    per_row = found.nodes.groupby("job")["tokens"].sum()
    assert dict(per_row) == {row_key(one): one["total_tokens"] for one in rows}
    assert "token_ids" not in runs.load(recorded).nodes and "token_ids" not in found.events


def test_columns_keep_their_types_whatever_is_missing(tmp_path: Path) -> None:
    full = save(tmp_path / "full", both("a", ttft_s=1.0, drafted=3))
    bare = {name: value for name, value in row("b", "rrm", right=None).items() if name not in ("drafted", "servers")}
    old = save(tmp_path / "old", [bare])
    empty = save(tmp_path / "empty", [])
    frames = [runs.load(path) for path in (full, old, empty)] + [runs.load(full, old, empty)]
    types = [dict(found.rows.dtypes.astype(str)) for found in frames]
    assert all(one == types[0] for one in types) and types[0]["drafted"] == "Int64"
    assert types[0]["correct"] == "boolean" and types[0]["ttft_s"] == "float64"
    assert frames[1].rows["drafted"].isna().all() and frames[1].rows["correct"].isna().all()
    assert frames[3].rows["run"].nunique() == 2 and len(frames[2].rows) == 0
    newer = save(tmp_path / "newer", [{**row("c", "rrm"), "of_tomorrow": 5}])
    assert list(runs.load(newer).rows["of_tomorrow"]) == [5]


def test_labels_are_those_of_the_analysis(tmp_path: Path) -> None:
    """A recursive row and its direct one may lie in two directories."""
    one, other = both("a", direct={"latency_s": 3.0}, latency_s=1.5)
    paths = [save(tmp_path / "direct", [one], modes=["direct"]), save(tmp_path / "rrm", [other], modes=["rrm"])]
    assert set(runs.load(*paths).rows["label"]) == {"direct", "headline"}
    assert set(runs.load(paths[1]).rows["label"]) == {"unpaired"}
    (line,) = runs.load(*paths).summary.query("mode == 'rrm'").to_dict("records")
    assert (line["tasks"], line["accuracy"], line["ratio"], line["trust"]) == (1, 1.0, 2.0, "headline 1")


def test_a_run_shows_itself_and_obeys_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "<script>x" / "run", both(HALF, answer=HALF), model="<img src=x>")
    _, events = solve(Scripted({HALF[1:]: SCRIPT}), [Job(HALF[1:], "t")], concurrency=1)
    with_events(path, events)
    found = runs.load(path)
    html, text = found._repr_html_(), repr(found)
    assert "headline 1" in html and "<td>2</td>" in html and "NaN" not in html and "headline 1" in text
    for shown in (html, found.rows._repr_html_(), found.nodes._repr_html_(), found.events._repr_html_()):
        assert not re.search(r"<(script|img|b)\b", shown)
    assert found.rows["id"][0] == HALF and "\x1b" not in html + text
    assert list(found.nodes["node"]) == ["root", "root.a", "root.b"]
    assert list(found.nodes["depth"]) == [0, 1, 1] and list(found.nodes["parent"])[1:] == ["root", "root"]


def test_a_run_that_goes_on_or_broke_off(tmp_path: Path) -> None:
    _, events = solve(Scripted({"t": SCRIPT}), [Job("t", "Add.")], concurrency=1)
    path = save(tmp_path / "run", [])
    for kept in range(0, len(events), 3):
        with_events(path, events[:kept])
        found = runs.load(path)
        assert len(found.events) == kept and len(found.rows) == 0 and "0 rows" in found._repr_html_()
        assert list(found.nodes["node"]) == list(dict.fromkeys(e["node"] for e in events[1:kept]))[: len(found.nodes)]
        assert list(found.nodes.dtypes.astype(str)) == list(runs.load(path).nodes.dtypes.astype(str))


def test_a_job_that_ran_again_is_there_once(tmp_path: Path) -> None:
    _, events = solve(Scripted({"t": SCRIPT}), [Job("t", "Add.")], concurrency=1)
    path = tmp_path / "run"
    first = RunDir.create(path)
    first.write_manifest(by_hand.manifest())
    for event in events[:9]:
        first.event(event)
    first.close()
    again = RunDir.resume(path)
    again.session = 1
    for event in events:
        again.event(event)
    again.add({**row("t", "rrm", status=Status.GRAPH), "session": 1})
    again.close()
    manifest = json.loads((path / "run.json").read_text())
    manifest["resolved"] |= {"model": "m", "dtype": "float32", "device": "cpu"}
    (path / "run.json").write_text(json.dumps({**manifest, "settings": {"model": "m"}}))
    found = runs.load(path)
    assert len(found.events) == len(events) and set(found.events["session"]) == {1} and len(found.nodes) == 3


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RrmError, match="takes the directories of recorded runs"):
        runs.load()
    with pytest.raises(RrmError, match=r"holds no run\.json"):
        runs.load(tmp_path)
    with pytest.raises(RrmError, match=r"holds no trace\.jsonl"):
        runs.load(save(tmp_path / "run", both("a"))).nodes  # noqa: B018
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RrmError, match=r"pip install 'rrm-engine\[pandas\]'"):
        runs.load(tmp_path / "run")


def test_nobody_else_needs_pandas() -> None:
    code = "import sys; sys.modules['pandas'] = None; import rrm_engine.runs, rrm_engine.show.cli, rrm_engine.runs.arms"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_in_the_documents_runs(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    monkeypatch.chdir(recorded.parents[1])
    exec(code, {})
    out = capsys.readouterr().out
    assert "1 run (runs/mine), 8 rows" in out and "root" in out and "waited_s" in out
