"""The comparison on composite problems, run as its users run it, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [
    "benchmarks/real_models.py",
    "embedded",
    "--measures",
    "accuracy",
    "--max-tokens",
    "30",
    "--kv-blocks",
    "600",
]
PROBLEMS = [
    {
        "id": f"p{n}",
        "problem": " ".join(["What is 3 + 4?"] * n),
        "answer": str(7 * n),
        "parts": ["7"] * n,
        "split": "dev",
    }
    for n in (1, 2)
]


def test_rows_tables_and_the_command_that_made_them(tmp_path: Path) -> None:
    tasks, out = tmp_path / "composite.jsonl", tmp_path / "out"
    tasks.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    command = [*COMMAND, "--tasks", str(tasks), "--out", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "accuracy, direct: 2 to run" in done.stdout
    for arm in ("direct", "reference"):
        rows = [json.loads(line) for line in (out / "accuracy" / arm / "rows.jsonl").read_text().splitlines()]
        assert {row["id"] for row in rows} == {"p1", "p2"}
        assert json.loads((out / "accuracy" / arm / "run.json").read_text())["command"] == " ".join(
            ["python", *command]
        )
    table = (out / "table.md").read_text()
    assert all(f"| {n} | {arm} |" in table for n in (1, 2) for arm in ("direct", "reference"))
