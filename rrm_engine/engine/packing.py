"""A step on the host: its tokens side by side, where each one's KV goes and what it attends to."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rrm_engine.engine.scheduler import Work
from rrm_engine.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens int64 ``[rows]`` that a step in flight samples, on the device, and the row of each sequence."""

    tokens: torch.Tensor
    rows: dict[Sequence, int]

    def fill(self, token_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Put ``tokens[rows[i]]`` into ``token_ids[i]`` wherever that row is not negative; both int64 ``[n]``."""
        token_ids.copy_(torch.where(rows < 0, token_ids, self.tokens[rows.clamp(min=0)]))


@dataclass(slots=True)
class Layout:
    """The work items of a step one behind the other. Item i has ``query_lens[i]`` tokens, the last of its context."""

    token_ids: list[int] = field(default_factory=list)
    ahead: list[tuple[int, Sequence]] = field(default_factory=list)  # rows of tokens that are not known yet, and whose
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # rows whose logits are needed
    order: list[Work] = field(default_factory=list)  # the work items that sample, in the order of ``sampled``
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def drawn_rows(self, drawn: Drawn | None, count: int) -> list[int]:
        """By row of the first ``count`` the row in ``drawn`` of its token, -1 where the token is known."""
        rows = [-1] * count
        for row, sequence in self.ahead:
            assert drawn is not None
            rows[row] = drawn.rows[sequence]
        return rows


def lay_out(work: Iterable[Work], block_size: int) -> Layout:
    """The layout of work items, in their order."""
    layout = Layout()
    token_ids, slots = layout.token_ids, layout.slots
    for item in work:
        sequence, start, count = item.sequence, item.start, item.count
        stop, blocks = start + count, sequence.table.blocks
        if item.ahead and sequence.probe.forced:
            token_ids.append(sequence.probe.forced[0])
        elif item.ahead:
            layout.ahead.append((len(token_ids), sequence))
            token_ids.append(0)
        else:
            token_ids += sequence.tokens[start:stop]
        if count == 1:
            slots.append(blocks[start // block_size] * block_size + start % block_size)
        else:
            slots += sequence.table.slots(start, stop)
        layout.positions += range(start, stop)
        layout.query_lens.append(count)
        layout.context_lens.append(stop)
        layout.tables.append(blocks[: -(-stop // block_size)])
        if item.samples:
            layout.sampled.append(len(token_ids) - 1)
            layout.order.append(item)
    return layout
