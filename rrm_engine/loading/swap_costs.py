"""What moving and recomputing KV cost on this machine, measured on an engine's own runner."""

from time import perf_counter

from rrm_engine.device.transfer import wait_for
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.scratch import Scratch
from rrm_engine.kv.host import HostCopy, SwapCosts

REPEATS = 3  # the first one warms up; the fastest counts
MOST_BLOCKS = 64


def measure_swap_costs(runner: ModelRunner, tokens: int) -> SwapCosts:
    """Time prefill chunks of so many ``tokens``, and block copies, over KV that nothing uses."""
    prefill_s = min(_prefill_s(runner, tokens) for _ in range(REPEATS))
    blocks = min(MOST_BLOCKS, runner.cache.num_blocks)
    copy_s = min(_round_trip_s(runner, blocks) for _ in range(REPEATS)) / 2
    return SwapCosts(copy_s / blocks, prefill_s / tokens)


def _prefill_s(runner: ModelRunner, tokens: int) -> float:
    scratch = Scratch(runner.cache)
    work = scratch.next(scratch.sequence([0] * tokens), tokens)
    began = perf_counter()
    runner.run(SchedulerOutput((work,), ()))
    wait_for(runner.devices)
    return perf_counter() - began


def _round_trip_s(runner: ModelRunner, blocks: int) -> float:
    """Blocks out and back in to where they were."""
    ids, copy = range(1, blocks + 1), HostCopy(blocks)
    began = perf_counter()
    runner.cache.swap_out(copy, ids)
    runner.cache.swap_in(copy, ids)
    wait_for(runner.devices)
    return perf_counter() - began
