"""Task sets: every format, every field name, and a sentence for everything that cannot be read."""

import builtins
import csv
import datetime
import gzip
import json
import os
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrm_engine.bench.readers import TaskError, read_csv, read_json, read_jsonl
from rrm_engine.bench.tasks import Task, TaskSet, build_tasks, load_tasks, packaged_sets
from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError

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
        ("t.jsonl", '{"problem": "p", "answer": [1, 2]}\n', ["line 1", "the answer is neither"]),
        ("t.jsonl", '{"problem": "p", "answer": {}}\n', ["line 1", "the answer is neither"]),
        ("t.jsonl", '{"problem": "p\\ud800"}\n', ["line 1", "'problem'", "\\ud800", "surrogate"]),
        ("t.jsonl", '{"problem": "p"}\n{"problem": "p", "id": "\\udc00"}\n', ["line 2", "'id'", "\\udc00"]),
        ("t.jsonl", '{"problem": "p", "answer": "\\ud835 "}\n', ["line 1", "the answer", "\\ud835"]),
        ("t.jsonl", '{"problem": "p", "solution": "\\\\boxed{\\ud835}"}\n', ["line 1", "the solution", "\\ud835"]),
        ("t.jsonl", '{"problem": "p"}\n' + "[" * 100_000 + "]" * 100_000, ["line 2", "nested too deeply"]),
        (
            "t.jsonl",
            '{"problem": "p", "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
            ["line 1", "nested too deeply"],
        ),
        ("t.json", "[" * 100_000 + "]" * 100_000, ["t.json", "nested too deeply"]),
        ("t.jsonl", '{"problem": "p", "Problem": "q"}', ["line 1", "two fields 'problem'"]),
        ("t.jsonl", '{"answer": 1, "problem": "p", "answer": 2}', ["line 1", "two fields 'answer'"]),
        ("t.csv", "problem,answer,Answer\np,1,2\n", ["line 2", "two fields 'answer'"]),
        ("t.csv", "", ["holds no tasks"]),
        ("t.json", "", ["holds no tasks"]),
        ("t.json", "[]", ["holds no tasks"]),
        ("t.csv", "\n\nproblem;answer\n\np;1\n\nq\n", ["line 7", "number of cells", "semicolons"]),
        ("t.jsonl.gz", "plain", ["not a whole gzip file"]),
        ("t.parquet.gz", "", ["unknown kind of file"]),
        ("t.jsonl", '{"problem": null}', ["line 1", "no problem text"]),
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

    monkeypatch.setattr(hub.HfApi, "repo_info", offline)
    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = refusal("aime-2024")
    assert "aime-2024: HuggingFaceH4/aime_2024 is not on this machine, and the hub cannot be reached" in message
    assert "aime.jsonl" in message


def test_hub_set_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    jsonl(tmp_path / "test.jsonl", {"id": "0", "problem": "p", "answer": "70"})
    monkeypatch.setattr(hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
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


def test_numbers_of_every_kind(tmp_path: Path) -> None:
    digits = "7" * 5000
    lines = [
        (f'{{"problem": "p", "answer": {digits}}}', digits),
        (f'{{"problem": "p", "answer": "7", "unused": {digits}}}', "7"),
        ('{"problem": "p", "answer": 0.10}', "0.1"),
        ('{"problem": "p", "answer": 12345678901234567890.5}', "12345678901234567890.5"),
        ('{"problem": "p", "answer": 1e3}', "1000"),
        ('{"problem": "p", "answer": 1e-400}', "1e-400"),
        ('{"problem": "p", "answer": 1e999999999999999999999}', "1e999999999999999999999"),
        ('{"problem": "p", "answer": true}', "True"),
        ('{"problem": "p", "answer": ["7"]}', "7"),
        ('{"problem": "p", "answer": NaN}', None),
        ('{"problem": "p", "answer": -Infinity}', None),
        ('{"problem": "p", "answer": " nan "}', None),
        ('{"problem": "p", "answer": []}'.replace("[]", "null"), None),
    ]
    tasks = load_tasks(write(tmp_path / "t.jsonl", "\r\n".join(line for line, _ in lines)))
    assert [task.expected for task in tasks.tasks] == [expected for _, expected in lines]
    assert "4 of 13 tasks have no answer" in tasks.ungraded() and "line-10, line-11, line-12 ..." in tasks.ungraded()
    assert tasks.ungraded(limit=9) == ""


def test_worked_solutions(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl",
        {"question": "q", "Answer": "She has 9 * 8 = <<9*8=72>>72.\n#### 72"},
        {"Problem": "q", "solution": r"Hence $x = \\boxed{\\frac{1}{2}}$.".replace("\\\\", "\\")},
        {"PROBLEM": "q", "solution": "no box"},
        {"problem": "q", "answer": r"\\boxed{3}".replace("\\\\", "\\"), "ID": 5.0},
        {"problem": "q", "final_answer": ["1,2"], "answer": None, "id": float("nan")},
    )
    tasks = load_tasks(path).tasks
    assert [task.expected for task in tasks] == ["72", r"\frac{1}{2}", None, "3", "1,2"]
    assert [task.id for task in tasks] == ["line-1", "line-2", "line-3", "5", "line-5"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_every_kind(tmp_path: Path, delimiter: str, encoding: str) -> None:
    long = "x" * 140_000
    lines = [
        ["id", "Problem", "note", "answer"],
        ["a", "\u03c0?", long, "nan"],
        ["b", '"p, q;\n|\tr"', "", "-inf"],
        ["", "s", "", "3,1"],
    ]
    lines = [[f'"{cell}"' if delimiter in cell and cell[0] != '"' else cell for cell in line] for line in lines]
    path = tmp_path / "t.tsv"
    path.write_text("\r\n".join(delimiter.join(line) for line in lines), encoding=encoding, newline="")
    limit = csv.field_size_limit()
    assert load_tasks(str(path)).tasks == (
        Task("a", "\u03c0?", None),
        Task("b", "p, q;\n|\tr", None),
        Task("line-5", "s", "3,1"),
    )
    assert csv.field_size_limit() == limit


def test_gzip(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.GZ").write_bytes(gzip.compress(b'{"problem": "p", "answer": 1}'))
    assert load_tasks(str(tmp_path / "t.jsonl.GZ")).tasks == (Task("line-1", "p", "1"),)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"problem\np\n" * 1000)[:-9])
    assert "not a whole gzip file" in refusal(str(tmp_path / "cut.csv.gz"))


def test_parquet_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "ID": pyarrow.array([1.0, float("nan"), None, 4.0]),
        "question": pyarrow.array(["p", "q", "p", "q"]).dictionary_encode(),
        "answer": pyarrow.array([Decimal("72.00"), Decimal("-0.50"), None, Decimal("7.25")], pyarrow.decimal128(9, 2)),
        "when": pyarrow.array([1, 2, 3, 4], pyarrow.timestamp("ns", "Nowhere/Else")),
        "messages": pyarrow.array([[{"a": 1}]] * 4),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert load_tasks(str(tmp_path / "t.parquet")).tasks == (
        Task("1", "p", "72"),
        Task("row-2", "q", "-0.5"),
        Task("row-3", "p", None),
        Task("4", "q", "7.25"),
    )
    for answer, expected in [
        (pyarrow.array([float("nan")]), None),
        (pyarrow.array([float("-inf")], pyarrow.float32()), None),
        (pyarrow.array([0.5], pyarrow.float32()), "0.5"),
        (pyarrow.array([1e300]), "1e+300"),
        (pyarrow.array([["7"]]), "7"),
        (pyarrow.array([True]), "True"),
        (pyarrow.array([2**63], pyarrow.uint64()), str(2**63)),
    ]:
        table = pyarrow.table({"problem": ["p"], "answer": answer})
        parquet.write_table(table, tmp_path / "t.parquet")
        assert load_tasks(str(tmp_path / "t.parquet")).tasks[0].expected == expected
    for answer in [[b"7"], [datetime.date(2024, 1, 2)], [{"a": 1}], [["1", "2"]]]:
        parquet.write_table(pyarrow.table({"problem": ["p"], "answer": pyarrow.array(answer)}), tmp_path / "t.parquet")
        assert "row 1: the answer is neither" in refusal(str(tmp_path / "t.parquet"))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["p"]), pyarrow.array(["q"])], names=["problem", "Problem"])
    parquet.write_table(twice, tmp_path / "t.parquet")
    assert "two fields 'problem'" in refusal(str(tmp_path / "t.parquet"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes as a file's name")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_path_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix.encode())
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        with open(path, "wb") as file:
            parquet.write_table(pyarrow.table({"problem": ["p"]}), file)
    else:
        write(Path(path), '{"problem": "p"}')
    tasks = load_tasks(path)
    assert tasks.tasks[0].problem == "p" and tasks.source == path
    write(Path(path), "broken")
    assert path in refusal(path)


@pytest.mark.parametrize("spec", ["x" * 5000, "~nobody-has-this-name/t.jsonl", "a\0b.jsonl"])
def test_names_that_no_file_can_have(spec: str) -> None:
    assert "no task set or file" in refusal(spec)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(["id", "ID", "problem", "Question", "answer", "Expected", "solution", "x"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(NAMES, JSON, max_size=4) | JSON, max_size=3))
def test_whatever_json_holds_is_read_or_refused_in_a_sentence(values: list[Any]) -> None:
    for read, text in [(read_jsonl, "\n".join(map(json.dumps, values))), (read_json, json.dumps(values))]:
        try:
            tasks = build_tasks(read(text, "file"), "file")
        except TaskError as error:
            assert str(error).startswith("file") and "\n" not in str(error)
        else:
            assert TaskSet("t", "t", tasks).sha256


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='problem,answer;\t|"\n\r\0 1xé', max_size=60))
def test_whatever_a_table_holds_is_read_or_refused_in_a_sentence(text: str) -> None:
    for body in (text, f"problem,answer\n{text}"):
        try:
            build_tasks(read_csv(body, "file"), "file")
        except TaskError as error:
            assert str(error).startswith("file") and "\n" not in str(error)


def test_shards_are_all_tasks_once() -> None:
    tasks = TaskSet("t", "t", tuple(Task(str(i), "p", "1") for i in range(10)))
    shares = [tasks.chosen(7, f"{i}/3") for i in (1, 2, 3)]
    assert [[task.id for task in share] for share in shares] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert tasks.chosen() == tasks.tasks and tasks.chosen(3) == tasks.tasks[:3]
    with pytest.raises(RrmError, match="--shard 3/3: no task is left for it of 2"):
        tasks.chosen(2, "3/3")
    for wrong in ("0/3", "4/3", "1", "1/", "/3", "a/b", "1/3/5", "-1/3", "\u0663/4"):
        with pytest.raises(RrmError, match="--shard takes I/N, as in 2/4"):
            RunConfig(shard=wrong)
