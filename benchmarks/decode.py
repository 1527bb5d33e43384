"""Decode speed: output tokens per second at several batch sizes, ours and others on the same weights.

    python benchmarks/decode.py --model DIR_OR_GGUF --batch 1,4,16,32 --compare hf,hf-batch --json OUT

Every contender decodes the same random prompts greedily for the same number of tokens, ends nowhere earlier, and all
take turns (ours, theirs, ours, ...), so that a drift of the machine hits all. What is quoted is the median over the
rounds of the time of the whole call, prefill included, and the ratio to ours round by round.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from begin import flags_first

from rrm_engine.command_line import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="as the bench's: embedded, random:Qwen3-0.6B ...")
    parser.add_argument("--batch", default="1,4,16,32", help="batch sizes")
    parser.add_argument(
        "--compare", default="hf", help="any of hf, hf-batch, vllm, llama, onednn, one-thread; empty for ours alone"
    )
    parser.add_argument("--gguf", help="for llama: the model as llama.cpp reads it; default: --model")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile, which takes it minutes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=96, help="tokens decoded for each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import numpy as np
import torch
from transformers import GenerationConfig

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.loading.engines import build_engine, build_runner
from rrm_engine.loading.load import load_pretrained, resolve_device
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.runs.environment import environment

Run = Callable[[list[list[int]], int], None]
PACKAGES = {"vllm": "vllm", "llama": "llama_cpp"}  # of contenders that may not be installed
HF_BLOCK = 256  # tokens of a KV block of transformers' continuous batching


def ours(model_name: str, dtype: str, device: str, longest: int, most: int) -> Run:
    return ours_run(load_model(model_name, dtype, device), longest, most)


def ours_on_onednn(model_name: str, dtype: str, device: str, longest: int, most: int) -> Run:
    """Our engine with oneDNN's matrix products in the place of our own: what is left of the gain without them."""
    from rrm_kernels.build import NativeUnavailable

    with mock.patch("rrm_engine.models.fuse.NativeLinear", side_effect=NativeUnavailable("not in this variant")):
        return ours(model_name, dtype, device, longest, most)


def ours_on_one_thread(model_name: str, dtype: str, device: str, longest: int, most: int) -> Run:
    """Our engine on one of the threads that the others have."""
    engine = ours(model_name, dtype, device, longest, most)

    def run(prompts: list[list[int]], count: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        engine(prompts, count)
        torch.set_num_threads(threads)

    return run


def ours_run(model: LoadedModel, longest: int, most: int) -> Run:
    """Our engine, with KV for ``most`` sequences of ``longest`` tokens."""
    settings = EngineSettings(
        blocks=most * -(-longest // 16) + 1,
        prefix_cache=False,
        max_sequences=most,
        step_tokens=4096,
        max_sequence_tokens=longest,
        lookahead=model.device.type == "cuda",
    )
    runner = build_runner(model, settings)

    def run(prompts: list[list[int]], count: int) -> None:
        engine = build_engine(model, settings, runner)
        sequences = [engine.submit(f"s{i}", list(p), count, SamplingParams(), root=i) for i, p in enumerate(prompts)]
        while engine.has_work:
            engine.step()
        assert all(len(s.tokens) == len(p) + count for s, p in zip(sequences, prompts, strict=True))

    return run


def hf_generate(model_name: str, dtype: str, device: str) -> Run:
    return generate_run(load_pretrained(model_name, dtype, resolve_device(device))[0])


def generate_run(model: Any) -> Run:
    """Plain ``generate`` with SDPA attention and a static batch."""
    model.generation_config = GenerationConfig()  # as ours: greedy, whatever else the checkpoint asks for
    model.set_attn_implementation("sdpa")
    model.eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        assert out.shape[1] == len(prompts[0]) + count

    return run


def hf_generate_batch(model_name: str, dtype: str, device: str, longest: int, most: int) -> Run:
    return generate_batch_run(load_pretrained(model_name, dtype, resolve_device(device))[0], longest, most)


def generate_batch_run(model: Any, longest: int, most: int) -> Run:
    """transformers' own continuous batching, with KV for ``most`` sequences of ``longest`` tokens.

    Left to itself it would set most of the free memory up anew in each call, which takes longer than the decoding.
    """
    from transformers import ContinuousBatchingConfig

    blocks = (most + 2) * -(-longest // HF_BLOCK)
    room = {"num_blocks": blocks, "max_batch_tokens": min(blocks * HF_BLOCK, 4096)}
    model.set_attn_implementation("sdpa")
    model.eval()

    def run(prompts: list[list[int]], count: int) -> None:
        config = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        with contextlib.redirect_stdout(sys.stderr):
            out = model.generate_batch(
                inputs=prompts,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(**room),
                progress_bar=False,
            )
        assert len(out) == len(prompts)
        assert all(len(o.generated_tokens) == count for o in out.values())

    return run


def vllm_engine(model_name: str, dtype: str, device: str, longest: int, most: int, eager: bool) -> Run:
    """vLLM in process, where it is installed: in this process's threads, with no cache of prefixes.

    vLLM chooses and pins threads only for worker processes; in process its kernels run in torch's own OpenMP pool, as
    many threads as all the other contenders have. It replaces ``torch.set_num_threads`` by a no-op for good.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without it vLLM takes 92% of the memory
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from vllm import LLM
    from vllm import SamplingParams as VllmSampling

    threads = torch.get_num_threads()
    engine: Any = LLM(
        model=model_name,
        dtype="auto" if dtype == "auto" else dtype,
        max_model_len=longest,
        max_num_seqs=most,
        enable_prefix_caching=False,
        enforce_eager=eager,
        disable_log_stats=True,
        seed=0,
    )
    assert torch.get_num_threads() == threads, "vLLM changed the number of threads"

    def run(prompts: list[list[int]], count: int) -> None:
        params = VllmSampling(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        out = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == count for o in out)

    return run


def llama_engine(gguf: str, longest: int, most: int) -> Run:
    """llama.cpp through llama-cpp-python, where it is installed: weights as in the file, all sequences in one batch."""
    import llama_cpp as llama

    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, None)
    threads, room = torch.get_num_threads(), max(512, longest)  # tokens in one call
    model = llama.llama_model_load_from_file(gguf.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot read {gguf}; name a GGUF file of the model in --gguf")
    settings = llama.llama_context_default_params()
    settings.n_ctx = most * -(-longest // 256) * 256  # each sequence has its part of it, a multiple of 256
    settings.n_seq_max = most
    settings.n_batch = settings.n_ubatch = room
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(room, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether its logits are needed)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a batch")

    def likeliest(row: int) -> int:
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), shape=(vocabulary,))
        return int(logits.argmax())

    def run(prompts: list[list[int]], count: int) -> None:
        assert silent is not None  # llama.cpp calls it as long as it runs
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        tokens, length = [], len(prompts[0])
        at_once = room // length  # prompts in one batch
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            rows = [
                (token, i, start + s, i == length - 1)
                for s, prompt in enumerate(part)
                for i, token in enumerate(prompt)
            ]
            decode(rows)
            tokens += [likeliest((s + 1) * length - 1) for s in range(len(part))]
        for step in range(count - 1):
            decode([(token, length + step, s, True) for s, token in enumerate(tokens)])
            tokens = [likeliest(s) for s in range(len(tokens))]

    return run


def measure(contenders: dict[str, Run], batch: int, prompt: int, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of each contender in each round, after one round that does not count."""
    generator = torch.Generator().manual_seed(batch)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        prompts = torch.randint(10, 400, (batch, prompt), generator=generator).tolist()
        for name, run in contenders.items():
            gc.collect()
            start = time.perf_counter()
            run(prompts, count)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"batch": batch}
    for name, times in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, seconds["ours"], strict=True)]
        row[name] = {
            "tokens_per_s": batch * count / statistics.median(times),
            "seconds": times,
            "ours_is_faster_by": statistics.median(ratios),
        }
    return row


def main() -> None:
    args = build_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batches = [int(b) for b in args.batch.split(",")]
    longest, most = args.prompt + args.tokens + 1, max(batches)
    model = (args.model, args.dtype, args.device)
    makers: dict[str, Callable[[], Run]] = {
        "hf": lambda: hf_generate(*model),
        "hf-batch": lambda: hf_generate_batch(*model, longest, most),
        "vllm": lambda: vllm_engine(*model, longest, most, args.vllm_eager),
        "llama": lambda: llama_engine(args.gguf or args.model, longest, most),
        "onednn": lambda: ours_on_onednn(*model, longest, most),
        "one-thread": lambda: ours_on_one_thread(*model, longest, most),
    }
    contenders = {"ours": ours(*model, longest, most)}
    for name in filter(None, args.compare.split(",")):
        package = PACKAGES.get(name)
        if package and find_spec(package) is None:
            print(f"{name} is left out: the package {package} is not installed", file=sys.stderr)
        else:
            contenders[name] = makers[name]()
    rows = []
    for batch in batches:
        rows.append(measure(contenders, batch, args.prompt, args.tokens, args.rounds))
        parts = [
            f"{name} {rows[-1][name]['tokens_per_s']:.0f} tok/s"
            + ("" if name == "ours" else f" (ours x{rows[-1][name]['ours_is_faster_by']:.2f})")
            for name in contenders
        ]
        print(f"batch {batch:3}: " + ", ".join(parts), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        **environment(),
        "vllm": version("vllm-cpu") if "vllm" in contenders else None,
        "llama": version("llama-cpp-python") if "llama" in contenders else None,
        "settings": {k: str(v) for k, v in vars(args).items()},
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
