"""What several stages cost on one device: the time per token of a pipeline of virtual stages over that of one.

    python benchmarks/placement.py --model DIR_OR_GGUF --stages 4 --batch 4 --json OUT

On one device stages cannot run beside each other, so a pipeline can only lose, and what it loses is what launching,
collecting and scheduling several steps costs. Both arms run steps of ``--batch`` decodes, one stage ``--batch``
sequences at a time and the pipeline ``stages`` times as many; they take turns, and CPU time is what is quoted. The
time of a token on several devices cannot be measured so.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from begin import flags_first

from rrm_engine.command_line import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="decodes in a step")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded by each sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.loading.engines import build_engine, build_runner
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.runs.environment import environment

BLOCK = 16


class Arm:
    """An engine with ``stages`` stages over a model that several arms share."""

    def __init__(self, model: LoadedModel, stages: int, batch: int, prompt: int, tokens: int) -> None:
        self.stages, self.count, self.prompt, self.tokens = stages, stages * batch, prompt, tokens
        self.model = model
        self.settings = EngineSettings(
            blocks=self.count * -(-(prompt + tokens) // BLOCK),
            block_size=BLOCK,
            prefix_cache=False,
            max_sequences=self.count,
            step_tokens=4096,
            max_sequence_tokens=prompt + tokens,
            stages=stages,
        )
        self.runner = build_runner(model, self.settings)

    def run(self) -> tuple[float, float, int]:
        """CPU and wall seconds of one decoded token, and how many of them a step had at most."""
        engine = build_engine(self.model, self.settings, self.runner)
        prompts = torch.randint(100, (self.count, self.prompt), generator=torch.Generator().manual_seed(1)).tolist()
        for i, prompt in enumerate(prompts):
            engine.submit(f"s{i}", prompt, self.tokens, SamplingParams(), root=i)
        first, most, tokens = len(engine.step()), 0, 0
        assert first == self.count, "all prompts fit into the first step"
        cpu, wall = time.process_time(), time.perf_counter()
        while engine.has_work:
            found = len(engine.step())
            most, tokens = max(most, found), tokens + found
        return (time.process_time() - cpu) / tokens, (time.perf_counter() - wall) / tokens, most


def main() -> None:
    args = build_parser().parse_args()
    model = load_model(args.model, args.dtype, args.device)
    arms = [Arm(model, stages, args.batch, args.prompt, args.tokens) for stages in (1, args.stages)]
    rounds: list[dict[int, tuple[float, float, int]]] = []
    for turn in range(args.rounds + 1):  # the first one does not count
        found = {arm.stages: arm.run() for arm in (arms if turn % 2 else arms[::-1])}
        assert all(most == args.batch for _, _, most in found.values()), "the arms' steps are of one size"
        rounds += [found] if turn else []
    result = {"command": " ".join(["python", *sys.argv]), **environment(), "rounds": rounds}
    for index, clock in enumerate(("cpu", "wall")):
        ratios = [found[args.stages][index] / found[1][index] for found in rounds]
        one, several = (statistics.median(found[n][index] for found in rounds) for n in (1, args.stages))
        result[clock] = {"one_s": one, "several_s": several, "ratio": statistics.median(ratios), "ratios": ratios}
        print(
            f"{clock:<5}1 stage {1e3 * one:.3f} ms, {args.stages} stages {1e3 * several:.3f} ms a token: "
            f"{statistics.median(ratios):.3f}x (rounds {min(ratios):.3f}-{max(ratios):.3f})"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
