"""The KV tensors: one K and one V pool per layer, addressed by the block ids of ``BlockPool``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from rrm_kernels.rope import rerotate

from rrm_engine.device.transfer import integers
from rrm_engine.kv.host import HostCopy
from rrm_engine.kv.table import BlockCopy


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one layer's KV for a token, its type and its device."""

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize


Stack = tuple[list[int], torch.Tensor, torch.Tensor]  # layers, their keys and their values


class KVCache:
    """``num_blocks`` usable blocks and the null block: keys and values ``[num_blocks + 1, block_size, kv heads,
    width]`` for each layer.

    A layer that is not in ``shapes`` is created from the first keys and values it stores, because some families' layers
    differ and their configs name no single head width. Layers known from the start that have one shape, type and device
    are slices of one tensor, so that blocks are moved in all of them at once.
    """

    def __init__(self, num_blocks: int, block_size: int, shapes: Mapping[int, LayerShape] | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shapes: dict[int, LayerShape] = {}
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacks: list[Stack] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # for transfers to the host
        self._create(shapes or {})

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V pools of a layer that stores ``key`` and ``value`` ``[tokens, kv heads, width]``."""
        if index not in self._layers:
            shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device)
            self._create({index: shape})
        return self._layers[index]

    def pools(self, index: int, shape: LayerShape) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V pools of a layer of that shape."""
        if index not in self._layers:
            self._create({index: shape})
        return self._layers[index]

    def copy(self, copies: list[BlockCopy]) -> None:
        """Do the block copies of a step; every source is read before any destination is written."""
        sources, destinations = (_Index(numbers) for numbers in zip(*copies, strict=True))
        for pools in self._pools():
            pools.index_copy_(1, destinations.on(pools.device), pools.index_select(1, sources.on(pools.device)))

    def swap_out(self, copy: HostCopy, blocks: Sequence[int]) -> None:
        """Read ``blocks`` into host memory; on CUDA the transfer overlaps with the steps that follow."""
        taken = _Index(blocks)
        copy.payload = [self._to_host(pools.index_select(1, taken.on(pools.device))) for pools in self._pools()]

    def swap_in(self, copy: HostCopy, blocks: Sequence[int]) -> None:
        """Write what ``swap_out`` read into ``blocks``. If they are fewer than were read, the rest is dropped."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        given = _Index(blocks)
        for pools, rows in zip(self._pools(), copy.payload, strict=True):
            # Transferred whole: the host would have to copy a part of it together, maybe before it has arrived.
            back = rows.to(pools.device, non_blocking=True)
            pools.index_copy_(1, given.on(pools.device), back[:, : len(blocks)])
        copy.payload = None

    def splice(
        self,
        sources: Sequence[int],
        destinations: Sequence[int],
        moves: Sequence[int],
        rotary: Mapping[int, torch.Tensor],
    ) -> None:
        """Copy the KV of ``sources`` to the slots ``destinations``, keys rotated on by ``moves`` positions.

        ``rotary``: by layer index the frequencies fp32 ``[rotary / 2]`` that its keys were rotated with.
        """
        indices = _Index(sources), _Index(destinations), _Index(moves)
        for layers, keys, values in self._stacks:
            source, destination, delta = (numbers.on(keys.device) for numbers in indices)
            keys, values = _rows(keys), _rows(values)
            values.index_copy_(1, destination, values.index_select(1, source))
            for _, run in groupby(enumerate(layers), lambda layer: id(rotary[layer[1]])):
                (first, layer), *others = run
                pools = keys[first : first + 1 + len(others)]
                pools.index_copy_(1, destination, rerotate(pools.index_select(1, source), delta, rotary[layer]))

    def _pools(self) -> Iterator[torch.Tensor]:
        """All tensors ``[layers, blocks, block_size, kv heads, width]``, keys and values alternating."""
        for _, keys, values in self._stacks:
            yield keys
            yield values

    def _to_host(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.device.type != "cuda":
            return rows
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        stream = self._streams.setdefault(rows.device, torch.cuda.Stream(rows.device))
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            host.copy_(rows, non_blocking=True)
        rows.record_stream(stream)
        return host

    def _create(self, shapes: Mapping[int, LayerShape]) -> None:
        for shape in dict.fromkeys(shapes.values()):
            layers = [index for index, other in shapes.items() if other == shape]
            rows = (len(layers), self.num_blocks + 1, self.block_size, shape.kv_heads)
            # Zeros, not empty: the null block and unwritten slots are read under a mask, and NaN * 0 is NaN.
            keys = torch.zeros(*rows, shape.key_width, dtype=shape.dtype, device=shape.device)
            values = torch.zeros(*rows, shape.value_width, dtype=shape.dtype, device=shape.device)
            self._stacks.append((layers, keys, values))
            self._layers |= dict(zip(layers, zip(keys, values, strict=True), strict=True))
        self.shapes |= shapes


class _Index:
    """Integers as int64 tensors on the layers' devices, transferred to each device once."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._found: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._found:
            self._found[device] = integers(self._numbers, device)
        return self._found[device]


def _rows(pools: torch.Tensor) -> torch.Tensor:
    """Stacked pools ``[layers, slots, kv heads, width]``."""
    return pools.flatten(1, 2)


def bytes_per_block(shapes: Mapping[int, LayerShape], block_size: int) -> int:
    """Bytes of one block over all layers."""
    return sum(bytes_per_block_on_devices([shapes], block_size).values())


def bytes_per_block_on_devices(
    replicas: Iterable[Mapping[int, LayerShape]], block_size: int
) -> dict[torch.device, int]:
    """By device the bytes of one block, summed over the layers of all replicas on that device."""
    found: dict[torch.device, int] = {}
    for shapes in replicas:
        for shape in shapes.values():
            found[shape.device] = found.get(shape.device, 0) + block_size * shape.bytes_per_token
    return found
