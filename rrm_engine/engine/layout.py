"""A step on the host: its tokens side by side, where each one's KV goes and what it attends to."""

from dataclasses import dataclass

from rrm_engine.engine.scheduler import Work


@dataclass(slots=True)
class Layout:
    """Decodes first, one token each, then chunks. Sequence i has ``query_lens[i]`` tokens, the last of its context."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sampled: list[int]  # rows whose logits are needed
    order: list[Work]  # the work items that sample, in the order of ``sampled``
    query_lens: list[int]
    context_lens: list[int]
    tables: list[list[int]]


def lay_out(work: tuple[Work, ...], block_size: int) -> Layout:
    """The layout of a step's work, in the scheduler's order within decodes and chunks."""
    items = [*(w for w in work if w.count == 1), *(w for w in work if w.count > 1)]
    layout = Layout([], [], [], [], [], [], [], [])
    for item in items:
        sequence, stop = item.sequence, item.start + item.count
        layout.token_ids += sequence.tokens[item.start : stop]
        layout.positions += range(item.start, stop)
        layout.slots += sequence.table.slots(item.start, stop)
        layout.query_lens.append(item.count)
        layout.context_lens.append(stop)
        layout.tables.append(sequence.table.blocks[: -(-stop // block_size)])
        if item.samples:
            layout.sampled.append(len(layout.token_ids) - 1)
            layout.order.append(item)
    return layout
