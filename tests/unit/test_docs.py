"""What the documents say of the program is what the program is: commands, flags, fields, places in the code, links."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import state_diagram

from rrm_engine.bench import flags
from rrm_engine.config import WaitPolicy
from rrm_engine.solver.result import JobResult

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WRAPPERS = {"scripts/bench": ["-m", "rrm_engine.bench"], "scripts/kv_ablation": ["benchmarks/kv_ablation.py"]}
INSTALLERS = ("pip", "git", ".")  # commands that are not ours


def blocks(page: Path, language: str = "") -> Iterator[str]:
    """The fenced blocks of a page in a language; those without one are shell commands."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if found[1] == language:
            yield found[2]


def commands() -> Iterator[Any]:
    for page in PAGES:
        lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
        for line in lines:
            for command in re.sub(r"\s{2,}#.*", "", line).split(" && "):
                yield pytest.param(command, id=f"{page.name}: {command}")


class Understood(BaseException):
    """The command line has been parsed; not an Exception, which commands report as a bug of theirs."""


@pytest.mark.parametrize("command", [*commands()])
def test_a_command_in_the_documents_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program is there and takes the flags and values; it is run as far as that."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] in INSTALLERS:
        return
    if words[0] in WRAPPERS:
        words = ["python", *WRAPPERS[words[0]], *words[1:]]
    if words[0] != "python":
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        existing = [word for word in words[1:] if word.startswith("tests/")]
        assert all((ROOT / word).exists() for word in existing)
        return
    if words[1:3] == ["-m", "venv"]:
        return
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)  # exits where it does not understand
        raise Understood

    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Understood):
        begin(module)


def begin(module: str) -> None:
    """Run a command up to its parser, in this process; scripts parse before they import torch."""
    if module.endswith(".py"):
        assert (ROOT / module).is_file(), f"there is no {module}"
        runpy.run_path(str(ROOT / module), run_name="__main__")
    elif module.startswith("rrm_engine"):
        importlib.import_module(f"{module}.cli").main()
    else:
        runpy.run_module(module, run_name="__main__")


def test_a_command_that_is_not_understood_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("python -m rrm_engine.bench --wait-police pin", "python benchmarks/soak.py --minutes soon"):
        with pytest.raises(SystemExit):
            test_a_command_in_the_documents_is_understood(command, monkeypatch)
    with pytest.raises(AssertionError):
        test_a_command_in_the_documents_is_understood("scripts/nonesuch", monkeypatch)


def test_the_flags_of_the_bench_are_those_on_their_page() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (ROOT / "docs/cli.md").read_text()))
    known = {
        flag for action in flags.build_parser()._actions for flag in action.option_strings if flag.startswith("--")
    }
    assert known - named == {"--version"}
    of_others = "plot jobs nodes out seed repeats node follow rows longest-text decode tasks print-completion help"
    assert named - known <= {f"--{name}" for name in shlex.split(of_others)}


def test_the_wait_policies_are_those_on_their_page() -> None:
    table = re.findall(r"^\| `(\w+)`", (ROOT / "docs/cli.md").read_text(), re.M)
    assert set(table) == set(get_args(WaitPolicy))


def test_the_fields_of_a_row_are_those_on_their_page() -> None:
    page = (ROOT / "docs/output.md").read_text()
    assert [f.name for f in fields(JobResult) if f"`{f.name}`" not in page and f.name not in ("job", "traceback")] == []


@cache
def names_in(file: Path) -> frozenset[str]:
    """Its classes, functions and methods, ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{part.name}" for part in ast.iter_child_nodes(node) if isinstance(part, ast.FunctionDef)
            }
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_places_and_links_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / link).exists()]
    for quoted in re.findall(r"`([^`\n]+)`", text):
        path, _, name = quoted.partition(":")
        if not re.fullmatch(r"[\w./-]+(\.py|\.cpp|\.toml|\.md|/)|(tests|benchmarks|docs|scripts)/[\w./-]+", path):
            continue
        places = [base / path for base in (ROOT, ROOT / "rrm_engine", page.parent) if (base / path).exists()]
        if not places or (name and name not in names_in(places[0])):
            missing.append(quoted)
    assert missing == []


def test_extras_that_are_named_can_be_installed() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for page in PAGES for extra in re.findall(r"rrm-engine\[(\w+)\]", page.read_text())}
    assert named and named <= known.keys()


def test_the_picture_of_the_states_is_that_of_the_table() -> None:
    assert state_diagram.PAGE.read_text() == state_diagram.page(), "run: python scripts/state_diagram.py"


def test_the_readme_is_short_and_the_guide_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 70
