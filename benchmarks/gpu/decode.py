"""Decoding with random weights: time of a step by batch and context, and how much of the copy bandwidth it uses."""

import statistics
from time import perf_counter

import torch

from gpu.lab import BLOCK_SIZE, Lab, Row, random_tokens
from rrm_engine.device.memory import free_memory
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.kv.cache import bytes_per_block
from rrm_engine.loading.engines import build_engine, build_runner
from rrm_engine.loading.prepare import LoadedModel

# The host's work: overlapped with the device's, or not, and then with few kernel launches or with all of them.
HOST_WORK = {"lookahead": (False, True), "graphs": (False, False), "eager": (True, False)}
BATCHES, CONTEXTS = (1, 4, 16, 32, 64, 128), (512, 2048, 8192)
WARM, TIMED = 4, 16
MEMORY_SHARE = 0.85


def copy_bandwidth(lab: Lab) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty((1 << 20) if lab.tiny else (4 << 30), dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / lab.seconds(lambda: target.copy_(source))


def run(lab: Lab, rows: list[Row]) -> None:
    lab.copy_bytes_per_s = copy_bandwidth(lab)
    lab.tidy()
    rows.append({"copy_gb_per_s": lab.copy_bytes_per_s / 1e9})
    model = lab.model()
    batches, contexts = ((1, 4), (32,)) if lab.tiny else (BATCHES, CONTEXTS)
    room = int(free_memory(lab.device) * MEMORY_SHARE / bytes_per_block(model.shapes, BLOCK_SIZE))
    wanted = [(context, batch) for context in contexts for batch in batches]
    points = [point for point in wanted if _blocks(*point) <= room]
    left_out = [f"{batch} x {context}" for context, batch in wanted if (context, batch) not in points]
    if left_out:
        rows.append({"left_out": left_out, "reason": f"KV of more than {room} blocks"})
    for host_work in HOST_WORK:
        _measure(lab, model, points, host_work, rows)
        lab.tidy()  # the next one's KV takes the place of this one's


def _measure(lab: Lab, model: LoadedModel, points: list[tuple[int, int]], host_work: str, rows: list[Row]) -> None:
    eager, lookahead = HOST_WORK[host_work]
    settings = EngineSettings(
        blocks=max(_blocks(*point) for point in points),
        block_size=BLOCK_SIZE,
        prefix_cache=False,
        max_sequences=max(batch for _, batch in points),
        step_tokens=4096,
        max_sequence_tokens=max(context for context, _ in points) + WARM + TIMED + 2,
        eager=eager,
        lookahead=lookahead,
    )
    runner = build_runner(model, settings)
    for index, shape in runner.cache.shapes.items():
        for pool in runner.cache.pools(index, shape):
            pool.normal_()
    for context, batch in points:
        row = _point(lab, model, build_engine(model, settings, runner), context, batch)
        rows.append({**row, "host_work": host_work})


def _blocks(context: int, batch: int) -> int:
    """Of the pool: a step's headroom of one block for each sequence included."""
    return batch * (-(-(context + WARM + TIMED + 2) // BLOCK_SIZE) + 1)


def _point(lab: Lab, model: LoadedModel, engine: Engine, context: int, batch: int) -> Row:
    """Sequences whose KV is there already decode greedily; whole steps of the engine are timed."""
    for i in range(batch):
        tokens = random_tokens(context + 1, model.vocabulary, i)
        engine.submit(f"s{i}", tokens, WARM + TIMED, SamplingParams(), root=i).table.append(context)
    times = []
    while engine.has_work:
        began = perf_counter()
        sampled = engine.step()
        times.append(perf_counter() - began)
        assert len(sampled) == batch
    step_s = statistics.median(times[WARM:])
    moved = weight_bytes(model) + batch * context * sum(s.bytes_per_token for s in model.shapes.values())
    return {
        "context": context,
        "batch": batch,
        "graphs": bool(engine.runner.static.shares[0].replays),
        "ms_per_step": 1e3 * step_s,
        "ms_spread": [1e3 * min(times[WARM:]), 1e3 * max(times[WARM:])],
        "tokens_per_s": batch / step_s,
        "bytes": moved,
        "mbu": moved / step_s / lab.copy_bytes_per_s,
    }


def weight_bytes(model: LoadedModel) -> int:
    """What a step reads of the weights: all, but of an embedding that is not the head too only a few rows."""
    config = model.model.config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (model.parameters - embedding) * model.dtype.itemsize
