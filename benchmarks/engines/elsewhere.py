"""vLLM in a Python of its own: a contender whose replays are run by worker.py there."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.replay.contender import Replayed
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.reader import as_json

WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 30.0  # for its end


class Elsewhere:
    """A process that says one line for each line it is told. It sleeps while others are measured."""

    def __init__(self, name: str, python: str, settings: dict[str, Any], log: Path) -> None:
        """Start it and wait until its model is loaded. Raises RrmError, with what it says, if that fails."""
        self.name = name
        self.log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, str(WORKER), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            )
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def replay(self, graph: Graph) -> Replayed:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(as_json(graph)) + "\n")
        self._process.stdin.flush()
        return Replayed(**self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it has ended with {self._process.wait()}"}
        if "error" in answer:
            raise RrmError(f"{answer['error']}; see {self.log}")
        return dict(answer)
