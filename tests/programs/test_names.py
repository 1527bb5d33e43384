"""The folder ``kernels`` beside Hugging Face's package of the same name.

Transformers imports that package while it starts. A ``kernels/__init__.py`` in the repository would be found first by
everything that runs from the repository's root, and no model could be loaded. Transformers does so only for a range of
versions; the processes here skip that check, so that they see what a user with such a version sees.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTS = """
import sys
assert sys.path[0] in ("", {where!r}), sys.path
from transformers.utils import import_utils
import_utils.is_kernels_available = lambda *args, **kwargs: True
from transformers import LlamaForCausalLM
import kernels, rrm_kernels.reference, rrm_engine.loading.load
print(kernels.__file__)
"""


def run_in(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Import transformers and this project in a new process whose sys.path begins with ``folder``."""
    script = IMPORTS.format(where=str(folder))
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def hub_kernels() -> str:
    try:
        return version("kernels")
    except PackageNotFoundError:
        pytest.skip("Hugging Face's package kernels is not installed: scripts/setup.sh test")


def test_the_folder_is_no_package() -> None:
    assert (ROOT / "kernels" / "rrm_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_models_load_from_the_repository_root(hub_kernels: str) -> None:
    process = run_in(ROOT)
    assert process.returncode == 0, process.stderr
    found = Path(process.stdout.strip())
    assert found.name == "__init__.py"
    assert ROOT / "kernels" not in found.parents


def test_a_package_of_that_name_breaks_it(hub_kernels: str, tmp_path: Path) -> None:
    """Negative control: the same import from a folder that holds a package named kernels."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    process = run_in(tmp_path)
    assert process.returncode != 0
    assert "from 'kernels'" in process.stderr.splitlines()[-1]
