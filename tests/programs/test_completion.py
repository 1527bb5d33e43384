"""What ``rrm --print-completion bash`` prints completes commands, flags, values and paths in a real bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
source "$1"
function=$(complete -p rrm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
shift
COMP_WORDS=(rrm "$@"); COMP_CWORD=$#; COMPREPLY=()
"$function" rrm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def rrm(*argv: str, without: str = "") -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.modules[{without!r}] = None; from rrm_engine.__main__ import console; console()"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    done = rrm("--print-completion", "bash")
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "rrm.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ex"], ["export"]),
        (["re"], ["render", "replay"]),
        (["bench", "--wait-p"], ["--wait-policy"]),
        (["bench", "--wait-policy", "o"], ["offload"]),
        (["export", "--nodes", "p"], ["planner"]),
        (["trace", "--perf"], ["--perfetto"]),
        (["show", "x", "--fol"], ["--follow"]),
    ],
    ids=str,
)
def test_words_are_completed(script: Path, words: list[str], wanted: list[str]) -> None:
    done = subprocess.run(["bash", "--norc", "-c", ASK, "bash", str(script), *words], capture_output=True, text=True)
    assert sorted(done.stdout.split()) == wanted, done.stderr


def test_directories_of_runs_are_completed(script: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "ruins.txt").touch()
    ask = ["bash", "--norc", "-c", ASK, "bash", str(script), "show", "ru"]
    done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["runs"], done.stderr


def test_refusals() -> None:
    done = rrm("--print-completion", "tea")
    assert done.returncode == 2 and "takes bash, zsh, tcsh, not 'tea'" in done.stderr
    done = rrm("--print-completion", "zsh", without="shtab")
    assert done.returncode == 2 and "pip install 'rrm-engine[completion]'" in done.stderr
