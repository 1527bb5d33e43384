"""What more rows in a step cost on this machine, measured on an engine's own runner."""

from math import inf
from time import perf_counter

from rrm_engine.device.transfer import wait_for
from rrm_engine.engine.draft import RowCosts
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams, choose
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.scratch import Scratch

ROWS = (1, 4, 8, 16, 32)
ROUNDS = 8  # at most: the fastest of them counts, for whatever else runs on a machine makes a step slower
PATIENCE_S = 1.0  # after the first round that is over later none begins, and sizes that are reached later are left out
SHORTEST_S = 0.005  # of a step of one row; to guess, hand out and check tokens takes the host some 0.4 ms a step
LONG = 1024  # tokens of the context over which a row's attention is measured


def measure_row_costs(runner: ModelRunner, most: int) -> RowCosts | None:
    """Time steps of decodes, a token drawn from each, over KV that nothing uses, in contexts of ``most`` tokens at
    most. What the rows attend to is whatever lies in the pool: only the time counts.

    None where one row takes so little time that the host's part in drafts costs more than they save.
    """
    if min(_seconds(runner, 1, 1) for _ in range(3)) < SHORTEST_S:
        return None
    shapes = [(rows, rows) for rows in ROWS if rows <= max(most, 4)]
    few = shapes[min(2, len(shapes) - 1)][0]
    shapes.insert(shapes.index((few, few)) + 1, (few, max(few, min(LONG, most))))
    found: dict[tuple[int, int], float] = {}
    began = perf_counter()
    for turn in range(ROUNDS):
        if turn > 1 and perf_counter() - began > PATIENCE_S:
            break
        for shape in shapes:
            if len(found) < 3 or shape in found or perf_counter() - began < PATIENCE_S:
                found[shape] = min(found.get(shape, inf), _seconds(runner, *shape))
    rows = [rows for rows, context in shapes if rows == context and (rows, context) in found]
    # More rows never take less time: a size that seems slower than a larger one was disturbed.
    seconds = [min(found[more, more] for more in rows if more >= count) for count in rows]
    long = next(((r, c, s) for (r, c), s in found.items() if c > r), None)
    key = 0.0 if long is None else max(0.0, long[2] - found[long[0], long[0]]) / (long[0] * (long[1] - long[0]))
    return RowCosts(tuple(rows), tuple(seconds), key)


def _seconds(runner: ModelRunner, rows: int, context: int) -> float:
    """The time of a step that runs the last ``rows`` of ``context`` tokens as single decodes."""
    scratch = Scratch(runner.cache)
    sequence = scratch.sequence([0] * context, context - rows)
    work = tuple(scratch.next(sequence, 1) for _ in range(rows))
    began = perf_counter()
    logits, order = runner.run(SchedulerOutput(work, ()))
    choose(logits, SamplingParams(), [0] * len(order), [0] * len(order))
    wait_for(runner.devices)
    return perf_counter() - began
