"""Imports go where docs/structure.md says: from a room to those above it, and never in a circle."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rrm_engine"
GROUND = {"data", "errors", "legible", "command", "command_line"}  # what any room may use
TOP = {"__init__", "__main__", "completion"}  # what may use any room
VERSION = "__version__"  # what any room may take from the top


def listed() -> list[str]:
    """The rooms of the table, in order."""
    table = (ROOT / "docs" / "structure.md").read_text().split("| room |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name.removesuffix("/").removesuffix(".py") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else VERSION


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rrm_engine":
            names = [f"rrm_engine.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "rrm_engine" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "rrm_engine"}
    return {room_of(module) for module in found} - {VERSION}


def test_every_room_is_listed() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))} | {"config"}
    assert rooms - GROUND == set(listed()) - {"../kernels/rrm_kernels"}


def test_rooms_import_only_rooms_above_them() -> None:
    order = listed()
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in TOP | GROUND:
            allowed = set(order) | GROUND | TOP if room in TOP else GROUND
        else:
            allowed = {*order[: order.index(room) + 1], *GROUND}
        wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in imported(path) - allowed]
    assert not wrong
