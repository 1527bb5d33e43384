"""One packed forward for everything a step runs: prefill chunks and decodes of all sequences together."""

from collections.abc import Callable, Mapping

import torch
from rrm_kernels.batch import PagedAttention
from rrm_kernels.reference import paged_attention

from rrm_engine.engine.packing import Drawn
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.scheduler import SchedulerOutput, Splice, Work
from rrm_engine.engine.static_steps import static_steps
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import Forward

Observer = Callable[[torch.Tensor, list[Work]], None]


class ModelRunner:
    """Runs a model over one cache; ``device`` is that of its first layer.

    Nothing here waits for a device. Steps are launched in order, so on each device a step's writes come after all reads
    of earlier steps. Therefore the blocks of a step in flight may be released, cached, forked, offloaded and given to
    other sequences as soon as it has been launched.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        device: torch.device,
        attend: PagedAttention = paged_attention,
        eager: bool = False,
        rotary: Mapping[int, torch.Tensor] | None = None,
        observe: Observer | None = None,
    ) -> None:
        """``eager``: launch kernels one by one, even where a whole step could be captured and replayed. ``rotary``:
        by layer the frequencies that splices rotate keys with (loading/rotary.py). ``observe`` is called with what each
        step's ``run`` returns.
        """
        self.static = static_steps(forward, attend, cache, device, eager)
        self.cache = cache
        self.device = device
        self.ranges = Ranges()
        self.rotary = rotary or {}
        self.observe = observe

    @property
    def devices(self) -> set[torch.device]:
        """The devices that its layers are on."""
        return {shape.device for shape in self.cache.shapes.values()}

    @torch.inference_mode()
    def run(self, step: SchedulerOutput, drawn: Drawn | None = None) -> tuple[torch.Tensor, list[Work]]:
        """Logits ``[rows, vocabulary]`` of the work items that sample, and those items in row order.

        A step without work only moves blocks. ``drawn``: tokens of earlier steps that the host has not read yet.
        """
        if step.swap_outs:
            with self.ranges("offload", step.swapped):
                for copy, blocks in step.swap_outs:
                    self.cache.swap_out(copy, blocks)
        if step.copies:
            copied = {destination for _, destination in step.copies}
            with self.ranges("fork copy", (w for w in step.work if copied & {*w.sequence.table.blocks})):
                self.cache.copy(list(step.copies))
        if step.swap_ins:
            with self.ranges("offload", step.swapped):
                for copy, blocks in step.swap_ins:
                    self.cache.swap_in(copy, blocks)
        if step.splices:
            with self.ranges("splice", (s.sequence for s in step.splices)):
                self._splice(step.splices)
        if not step.work:
            return torch.empty(0, 0), []
        with self.ranges("pack", step.work):
            packed = self.static.pack(step.work, drawn)
        with self.ranges.forward(step.work):
            logits = self.static.run(packed)
        if self.observe is not None:
            self.observe(logits, packed.order)
        return logits, packed.order

    def _splice(self, splices: tuple[Splice, ...]) -> None:
        sources, destinations, moves = [], [], []
        for splice in splices:
            span, position = splice.span, splice.position
            sources += span.slots
            destinations += splice.sequence.table.slots(position, position + len(span))
            moves += [position - span.start] * len(span)
        self.cache.splice(sources, destinations, moves, self.rotary)
