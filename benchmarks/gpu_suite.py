"""Everything to be known about this engine on one GPU, in one command of at most eight minutes.

    python benchmarks/gpu_suite.py --out DIR
    python benchmarks/gpu_suite.py --out DIR --tiny                   # the same on a CPU, in tiny shapes

Sections are on their own: an error in one is recorded, the others run, and the exit code is 1 at the end. Each has a
time limit of its own; what it has measured until then is kept. Weights are random and of a published geometry, for the
time of a step does not depend on them; nothing is downloaded. Written to --out: result.json, result.md and plots.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.loading.geometry import GEOMETRIES

LIMIT_S = 470.0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the result")
    parser.add_argument("--only", default="", help="names of sections, joined by commas")
    parser.add_argument("--geometry", default="qwen3-14b", type=str.lower, choices=list(GEOMETRIES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for everything (default: 470)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all of it runs")
    return parser


if __name__ == "__main__":
    flags_first(build_parser, "triton")

import torch
from gpu import decode, graphs, kernels, logits, moves, peers, pipeline, report, sharing
from gpu.lab import Lab, Section

from rrm_engine.loading.load import resolve_device
from rrm_engine.runs.environment import environment


def sections() -> list[Section]:
    """In the order in which they run: first what says whether the rest means anything."""
    return [
        Section("kernels", "Every kernel against its reference", 90, kernels.run),
        Section("logits", "The engine against plain transformers", 75, logits.run),
        Section("decode", "Decoding: ms per step and bandwidth utilisation (MBU)", 150, decode.run),
        Section("sharing", "Shared-prefix attention: when it pays", 60, sharing.run),
        Section("moves", "Fork, pin, offload, resume, splice", 60, moves.run),
        Section("graphs", "Recursive graphs under every wait policy", 120, graphs.run),
        Section("peers", "transformers on the same model", 90, peers.run),
        Section("pipeline", "Four stages on one device", 30, pipeline.run),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; 1 if one of them had an error."""
    began = perf_counter()
    parser = build_parser()
    args = parser.parse_args(argv)
    chosen = sections()
    names = [name for name in args.only.split(",") if name]
    if unknown := set(names) - {section.name for section in chosen}:
        parser.error(f"--only {', '.join(unknown)}: the sections are {', '.join(s.name for s in chosen)}")
    chosen = [section for section in chosen if not names or section.name in names]
    try:
        device = resolve_device(args.device)
    except RrmError as error:
        parser.error(str(error))
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU here: --tiny runs the same in tiny shapes on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(device, "tiny" if args.tiny else args.geometry, args.attention, args.tiny)
    about = describe(args, lab)
    for section in chosen:
        left = args.limit - (perf_counter() - began)
        print(f"{section.name}: {section.title}", flush=True)
        section.carry_out(lab, min(section.limit_s, left))
        state = section.error or (f"left out: {section.skipped}" if section.skipped else "ok")
        print(f"  {section.seconds:.1f} s, {len(section.rows)} rows, {state}", flush=True)
        write(args.out, about | {"seconds": perf_counter() - began}, chosen)
    try:
        about["plots"] = report.plots(args.out, chosen)
    except ImportError as error:
        about["plots"] = f"left out: {error}"
    write(args.out, about | {"seconds": perf_counter() - began}, chosen)
    failed = [section.name for section in chosen if section.error]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} sections ok; written to {args.out}")
    return 1 if failed else 0


def describe(args: argparse.Namespace, lab: Lab) -> dict[str, Any]:
    """What ran where, when and how."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(lab.device) if lab.on_cuda else str(lab.device),
        "geometry": lab.geometry,
        "dtype": lab.dtype,
        "attention": args.attention,
        **environment(),
    }


def write(folder: Path, about: dict[str, Any], done: Sequence[Section]) -> None:
    """result.json and result.md, after every section, so that nothing is lost."""
    result = about | {"sections": {section.name: section.as_json() for section in done}}
    (folder / "result.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (folder / "result.md").write_text(report.markdown(about, done))


if __name__ == "__main__":
    sys.exit(main())
