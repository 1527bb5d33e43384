"""The example in the documents runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_example_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    torch.set_num_threads(1)
    exec(code, {})
    answer, status, latency, tokens = capsys.readouterr().out.rsplit(maxsplit=3)
    assert answer and status in ("graph", "atomic", "fallback", "invalid") and float(latency) > 0 and int(tokens) > 0
