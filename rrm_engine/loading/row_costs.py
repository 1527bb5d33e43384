"""What more rows in a step cost on this machine, measured on the engine itself."""

from math import inf
from time import perf_counter

from rrm_engine.device.transfer import wait_for
from rrm_engine.engine.draft import RowCosts
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams, choose
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.table import BlockTable

ROWS = (1, 4, 8, 16, 32)
ROUNDS = 8  # at most: the fastest of them counts, for whatever else runs on a machine makes a step slower
PATIENCE_S = 1.0  # after the first round that is over later none begins, and sizes that are reached later are left out
LONG = 1024  # tokens of the context over which a row's attention is measured


def measure_row_costs(engine: Engine) -> RowCosts:
    """Time steps of decodes, a token drawn from each, on an engine that nothing runs on; it is left as it was.

    What the rows attend to is whatever lies in the pool: only the time counts.
    """
    if engine.sequences:
        raise ValueError("costs are measured before anything is submitted")
    peak, most = engine.pool.peak_used, engine.max_sequence_tokens
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
                found[shape] = min(found.get(shape, inf), _seconds(engine, *shape))
    engine.pool.peak_used = peak
    rows = [rows for rows, context in shapes if rows == context and (rows, context) in found]
    # More rows never take less time: a size that seems slower than a larger one was disturbed.
    seconds = [min(found[more, more] for more in rows if more >= count) for count in rows]
    long = next(((r, c, s) for (r, c), s in found.items() if c > r), None)
    key = 0.0 if long is None else max(0.0, long[2] - found[long[0], long[0]]) / (long[0] * (long[1] - long[0]))
    return RowCosts(tuple(rows), tuple(seconds), key)


def _seconds(engine: Engine, rows: int, context: int) -> float:
    """The time of a step that runs the last ``rows`` of ``context`` tokens as single decodes."""
    table = BlockTable(engine.pool)
    table.append(context)
    sequence = Sequence("row costs", [0] * context, table, SamplingParams(), 0, rows)
    work = tuple(Work(sequence, at, 1, True) for at in range(context - rows, context))
    began = perf_counter()
    logits, order = engine.runner.run(SchedulerOutput(work, ()))
    choose(logits, sequence.sampling, [0] * len(order), [0] * len(order))
    wait_for({shape.device for shape in engine.runner.cache.shapes.values()})
    elapsed = perf_counter() - began
    table.discard()
    return elapsed
