"""A problem for the packaged model: one of its own, as short as it still can do, of which it makes a graph."""

import json
import re
from pathlib import Path

from rrm_engine.bench.tasks import load_tasks

PARTS = (task.problem for task in load_tasks("embedded").tasks if task.problem.startswith("(a)"))
TASK = re.sub(r"(in each of|exactly) \d+", r"\1 4", min(PARTS, key=len))


def written(path: Path) -> str:
    """A file of tasks that holds it alone."""
    path.write_text(json.dumps({"problem": TASK, "answer": 1}) + "\n")
    return str(path)
