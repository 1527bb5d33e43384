"""What moving and recomputing KV cost on this machine, measured on the engine itself."""

from time import perf_counter

from rrm_engine.device.transfer import wait_for
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.kv.host import HostCopy, SwapCosts

REPEATS = 3  # the first one warms up; the fastest counts
MOST_BLOCKS = 64


def measure_swap_costs(engine: Engine) -> SwapCosts:
    """Time prefill chunks and block copies on an engine that nothing runs on. Its counters are left as they were."""
    if engine.sequences:
        raise ValueError("costs are measured before anything is submitted")
    steps, peak = engine.steps, engine.pool.peak_used
    tokens = min(engine.scheduler.step_tokens, engine.max_sequence_tokens - 1)
    prefill_s = min(_prefill_s(engine, first, tokens) for first in range(REPEATS))
    blocks = min(MOST_BLOCKS, engine.pool.num_blocks)
    copy_s = min(_round_trip_s(engine, blocks) for _ in range(REPEATS)) / 2
    engine.steps, engine.pool.peak_used = steps, peak
    return SwapCosts(copy_s / blocks, prefill_s / tokens)


def _prefill_s(engine: Engine, first: int, tokens: int) -> float:
    """One chunk; ``first`` begins it, so that no earlier one is found in the prefix cache."""
    began = perf_counter()
    sequence = engine.submit(f"costs{first}", [first, *[0] * (tokens - 1)], 1, SamplingParams())
    engine.step()
    elapsed = perf_counter() - began  # the sampled token was read, so the device has finished
    sequence.table.discard()
    engine.finish(sequence)
    return elapsed


def _round_trip_s(engine: Engine, blocks: int) -> float:
    """Blocks out and back in to where they were."""
    ids, copy = range(1, blocks + 1), HostCopy(blocks)
    began = perf_counter()
    engine.runner.cache.swap_out(copy, ids)
    engine.runner.cache.swap_in(copy, ids)
    wait_for(shape.device for shape in engine.runner.cache.shapes.values())
    return perf_counter() - began
