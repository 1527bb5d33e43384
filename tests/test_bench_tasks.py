"""Task sets: every format, every field name, and a sentence for everything that cannot be read."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from rrm_engine.bench.readers import TaskError, read_jsonl
from rrm_engine.bench.tasks import Task, build_tasks, load_tasks, packaged_sets

TASKS: list[dict[str, Any]] = [
    {"id": "a", "problem": "What is 1 + 1?", "answer": 2},
    {"id": "b", "problem": 'Say "x, y",\nplease.', "answer": "x, y"},
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def refusal(spec: str) -> str:
    with pytest.raises(TaskError) as caught:
        load_tasks(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def all_formats(folder: Path) -> dict[str, str]:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{**task, "answer": str(task["answer"])} for task in TASKS])
    parquet.write_table(table, folder / "t.parquet")
    return {
        "jsonl": jsonl(folder / "t.jsonl", *TASKS),
        "json": write(folder / "t.json", json.dumps(TASKS)),
        "csv": write(folder / "t.csv", 'id,problem,answer\na,What is 1 + 1?,2\nb,"Say ""x, y"",\nplease.","x, y"\n'),
        "parquet": str(folder / "t.parquet"),
    }


def test_every_format_gives_the_same_tasks(tmp_path: Path) -> None:
    sets = [load_tasks(path) for path in all_formats(tmp_path).values()]
    assert sets[0].tasks == (Task("a", "What is 1 + 1?", "2"), Task("b", 'Say "x, y",\nplease.', "x, y"))
    assert all(other.tasks == sets[0].tasks for other in sets)
    assert len({other.sha256 for other in sets}) == 1
    assert sets[0].name == "t"
    assert Path(sets[0].source).is_absolute()


def test_the_hash_sees_every_field(tmp_path: Path) -> None:
    variants = [TASKS[:1]] + [[{**TASKS[0], name: "other"}] for name in ("id", "problem", "answer")]
    hashes = {load_tasks(jsonl(tmp_path / "t.jsonl", *variant)).sha256 for variant in variants}
    assert len(hashes) == len(variants)


@pytest.mark.parametrize("problem", ["problem", "Question", "TASK", " prompt "])
@pytest.mark.parametrize("answer", ["answer", "Expected"])
def test_field_names(tmp_path: Path, problem: str, answer: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", {problem: "p", answer: "7", "solution": "long"})
    assert load_tasks(path).tasks == (Task("line-1", "p", "7"),)


def test_problem_is_preferred_to_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"prompt": "q", "problem": "p"})
    assert load_tasks(path).tasks[0].problem == "p"


@pytest.mark.parametrize(("answer", "expected"), [(204.0, "204"), (0.5, "0.5"), (0, "0"), ("", None), (None, None)])
def test_answers_as_text(tmp_path: Path, answer: object, expected: str | None) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"problem": "p", "answer": answer})
    assert load_tasks(path).tasks[0].expected == expected


def test_ids_from_lines_skip_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '\ufeff{"problem": "p"}\n\n  \n{"problem": "q"}')
    assert [task.id for task in load_tasks(path).tasks] == ["line-1", "line-4"]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("t.jsonl", '{"problem": "p"}\n{"problem": \n', ["t.jsonl, line 2", "not valid JSON", "one JSON object per"]),
        ("t.jsonl", '["p"]\n', ["line 1", "not a JSON object"]),
        ("t.jsonl", '{"text": "p"}\n', ["line 1", "no problem text", "problem, question, task, prompt"]),
        ("t.jsonl", '{"problem": " "}\n', ["line 1", "'problem' is not a text"]),
        ("t.jsonl", '{"problem": 3}\n', ["line 1", "'problem' is not a text"]),
        ("t.jsonl", '{"problem": "p", "answer": [1]}\n', ["line 1", "the answer is neither"]),
        ("t.jsonl", '{"problem": "p", "id": {}}\n', ["line 1", "'id' is neither"]),
        ("t.jsonl", "\n", ["holds no tasks"]),
        ("t.jsonl", '{"id": 1, "problem": "p"}\n\n{"id": "1", "problem": "q"}', ["'1'", "line 1", "line 3"]),
        ("t.json", '[{"problem": "p"},\n', ["t.json, line 2", "not valid JSON"]),
        ("t.json", '{"problem": "p"}', ["not a list"]),
        ("t.csv", "problem,answer\np,1\nq\n", ["t.csv, line 3", "number of cells"]),
        ("t.csv", "problem,answer\np,1,2\n", ["line 2", "number of cells"]),
        ("t.csv", 'problem,answer\n"p,1\n', ["not valid CSV"]),
        ("t.parquet", "PAR?", ["not a readable Parquet file"]),
        ("t.txt", "p", ["unknown kind of file", ".jsonl"]),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, parts: list[str]) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    message = refusal(write(tmp_path / name, text))
    for part in parts:
        assert part in message


def test_a_multiline_csv_record_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'problem,answer\n"p\np\np",1\n"q\nq"\n')
    assert "line 5" in refusal(path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"problem": "\xff"}')
    assert "not UTF-8" in refusal(str(tmp_path / "t.jsonl"))


def test_unknown_name_and_directory(tmp_path: Path) -> None:
    message = refusal("no-such-set")
    assert "no-such-set" in message and "aime-2024" in message and ".jsonl" in message
    assert "is a directory" in refusal(str(tmp_path))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", "")
    original = builtins.__import__

    def without_pyarrow(name: str, *rest: object, **more: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "pip install rrm-engine[parquet]" in refusal(path)


def test_hub_set_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = refusal("aime-2024")
    assert "aime-2024 could not be fetched" in message and "aime.jsonl" in message


def test_hub_set_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    jsonl(tmp_path / "test.jsonl", {"id": "0", "problem": "p", "answer": "70"})
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load_tasks("aime-2025").tasks == (Task("0", "p", "70"),)


def test_every_packaged_set_loads_and_has_answers() -> None:
    for name in packaged_sets():
        tasks = load_tasks(name)
        assert tasks.source == name
        assert all(task.expected is not None for task in tasks.tasks)


def test_records_of_several_files_share_one_space_of_ids() -> None:
    records = [*read_jsonl('{"problem": "p"}', "one"), *read_jsonl('{"problem": "q"}', "two")]
    with pytest.raises(TaskError, match="line-1"):
        build_tasks(records, "both")
