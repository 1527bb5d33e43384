"""What it costs to fork, pin, offload, bring back and splice KV."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from gpu.lab import BLOCK_SIZE, Lab, Row, random_tokens
from rrm_engine.config import WaitPolicy
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.cache import bytes_per_block
from rrm_engine.kv.host import HostCopy
from rrm_engine.loading.engines import build_engine, build_runner
from rrm_engine.loading.prepare import LoadedModel

GREEDY = SamplingParams()


def run(lab: Lab, rows: list[Row]) -> None:
    model = lab.model()
    contexts = (64,) if lab.tiny else (512, 4096, 16384)
    blocks = 3 * -(-max(contexts) // BLOCK_SIZE) + 64
    settings = EngineSettings(
        blocks=blocks,
        block_size=BLOCK_SIZE,
        prefix_cache=False,
        max_sequences=8,
        step_tokens=4096,
        max_sequence_tokens=max(contexts) + 200,
        host_blocks=blocks,
        splices=True,
    )
    runner = build_runner(model, settings)
    for context in contexts:
        rows += _block_moves(lab, runner, context)
        rows += _lives(lab, model, runner, settings, context)


def _block_moves(lab: Lab, runner: ModelRunner, context: int) -> list[Row]:
    """Calls of the cache itself, the device's work included."""
    cache, count = runner.cache, context // BLOCK_SIZE
    ids, others = list(range(1, count + 1)), list(range(count + 1, 2 * count + 1))
    size = count * bytes_per_block(cache.shapes, BLOCK_SIZE)
    copies: list[HostCopy] = []

    def out() -> None:
        copies.append(HostCopy(count))
        cache.swap_out(copies[-1], ids)

    def back() -> None:
        cache.swap_in(copies.pop(), ids)

    sources = [block * BLOCK_SIZE + i for block in ids for i in range(BLOCK_SIZE)]
    targets = [block * BLOCK_SIZE + i for block in others for i in range(BLOCK_SIZE)]
    moves: list[tuple[str, Callable[[], None], int]] = [
        ("copy one block", lambda: cache.copy([(1, 2)]), 2 * size // count),
        ("copy the context's blocks", lambda: cache.copy(list(zip(ids, others, strict=True))), 2 * size),
        ("offload", out, size),
        ("bring back", back, size),
        ("splice", lambda: cache.splice(sources, targets, [7] * len(sources), runner.rotary), 2 * size),
    ]
    rows = []
    for name, move, moved in moves:
        seconds = lab.seconds(move, repeats=3, warm=1)
        rows.append({"what": name, "tokens": context, "us": 1e6 * seconds, "gb_per_s": moved / seconds / 1e9})
    return rows


def _lives(lab: Lab, model: LoadedModel, runner: ModelRunner, settings: EngineSettings, context: int) -> list[Row]:
    """Steps of the engine: a decode, a fork's first step, and a resume under each of the wait policies."""
    rows = []
    policies: tuple[WaitPolicy, ...] = ("pin", "offload", "drop")
    for policy in policies:
        engine = build_engine(model, replace(settings, wait_policy=policy), runner)
        tokens = random_tokens(context + 1, model.vocabulary, context)
        root = engine.submit("root", tokens, 8, GREEDY)
        root.table.append(context)
        decode = [_step(lab, engine) for _ in range(8)]
        if policy == "pin":
            rows.append({"what": "decode step", "tokens": context, "us": 1e6 * statistics.median(decode[3:])})
            rows += _fork(lab, engine, root, context)
        times = []
        for _ in range(3):  # the first ones compile and capture
            engine.wait(root)
            lab.synchronize()
            began = perf_counter()
            engine.resume(root, [5] * 16, 1)
            while engine.has_work:
                engine.step()
            lab.synchronize()
            times.append(perf_counter() - began)
        rows.append({"what": f"{policy}: resume with 16 tokens", "tokens": context, "us": 1e6 * times[-1]})
        engine.finish(root)
        engine.check()
    return rows


def _fork(lab: Lab, engine: Engine, root: Sequence, context: int) -> list[Row]:
    """The host's part, and the step in which the child has its first token."""
    submits, firsts = [], []
    for i in range(6):
        began = perf_counter()
        tokens = [*root.tokens[:context], 3, 4]
        child = engine.submit(f"root.{i}", tokens, 1, GREEDY, depth=1, fork_of=(root, context))
        submits.append(perf_counter() - began)
        firsts.append(_step(lab, engine))
        engine.finish(child)
    return [
        {"what": "fork: share the blocks", "tokens": context, "us": 1e6 * statistics.median(submits)},
        {"what": "fork: the child's first step", "tokens": context, "us": 1e6 * statistics.median(firsts[3:])},
    ]


def _step(lab: Lab, engine: Engine) -> float:
    began = perf_counter()
    engine.step()
    lab.synchronize()
    return perf_counter() - began
