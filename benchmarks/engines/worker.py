"""The other side of elsewhere.py, run by the Python that has vLLM: graphs come in as lines, figures go out."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed in this process goes to the log
    sys.path.insert(0, str(ROOT))
    try:
        serve(settings, out)
    except Exception as error:
        say(out, {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        raise


def serve(settings: dict[str, Any], out: TextIO) -> None:
    import torch

    from rrm_engine.replay.peers import Peer
    from rrm_engine.replay.reader import parse_graph
    from rrm_engine.replay.vllm import VllmEngine

    torch.set_num_threads(settings.pop("threads"))
    engine = VllmEngine(**settings)
    peer = Peer("vllm", engine)
    say(out, engine.about())
    for line in sys.stdin:
        say(out, asdict(peer.replay(parse_graph(json.loads(line)))))


def say(out: TextIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
