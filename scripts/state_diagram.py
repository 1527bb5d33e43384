"""Write docs/graph-states.md, the states of a node as a picture, from the table in rrm_engine/graph/states.py."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "graph-states.md"
HEAD = """# The states of a node

Made by `python scripts/state_diagram.py` from the table in `rrm_engine/graph/states.py`; the machine takes no other
transition, and the tests take each of these.

```mermaid
stateDiagram-v2
"""


def page() -> str:
    sys.path.append(str(ROOT))
    from rrm_engine.graph.states import INITIAL, OVER, TRANSITIONS

    # A colon or semicolon in a label would end it.
    assert not any(set(why) & set(":;") for why in TRANSITIONS.values())
    lines = [f"    [*] --> {INITIAL}: declared"]
    lines += [f"    {before} --> {after}: {why}" for (before, after), why in TRANSITIONS.items()]
    lines += [f"    {state} --> [*]" for state in sorted(OVER)]
    return HEAD + "\n".join(lines) + "\n```\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
