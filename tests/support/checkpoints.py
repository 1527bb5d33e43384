"""What cannot be loaded, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rrm_engine.errors import RrmError
from rrm_engine.loading.load import load_pretrained

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 3429016\n"


def refusal(path: Path | str, dtype: str = "auto", **options: Any) -> str:
    with pytest.raises(RrmError) as caught:
        load_pretrained(str(path), dtype, torch.device("cpu"), **options)
    message = str(caught.value)
    assert message.startswith(f"--model {path}") and "\n" not in message
    return message
