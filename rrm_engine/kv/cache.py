"""The KV tensors: one K and one V pool per layer, addressed by the block ids of ``BlockPool``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rrm_kernels.reference import copy_blocks
from rrm_kernels.rope import rerotate

from rrm_engine.kv.host import HostCopy
from rrm_engine.kv.table import BlockCopy
from rrm_engine.kv.transfer import integers


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores for a token, and where."""

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_width + self.value_width) * self.dtype.itemsize


class KVCache:
    """``num_blocks`` usable blocks and the null block, ``[num_blocks + 1, block_size, kv heads, width]`` a layer.

    Layers are created from ``shapes`` or, where a layer is unknown, from the first keys and values it stores:
    models of some families differ from layer to layer, or have no single head width in their config.
    """

    def __init__(self, num_blocks: int, block_size: int, shapes: Mapping[int, LayerShape] | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shapes: dict[int, LayerShape] = {}
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # for transfers to the host
        for index, shape in (shapes or {}).items():
            self._create(index, shape)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V pools of a layer that stores ``key`` and ``value`` ``[tokens, kv heads, width]``."""
        if index not in self._layers:
            shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device)
            self._create(index, shape)
        return self._layers[index]

    def pools(self, index: int, shape: LayerShape) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V pools of a layer of that shape."""
        if index not in self._layers:
            self._create(index, shape)
        return self._layers[index]

    def copy(self, copies: list[BlockCopy]) -> None:
        """Do the block copies of a step; every source is read before any destination is written."""
        sources, destinations = (_Index(numbers) for numbers in zip(*copies, strict=True))
        for pools in self._layers.values():
            for pool in pools:
                copy_blocks(pool, sources.on(pool.device), destinations.on(pool.device))

    def swap_out(self, copy: HostCopy, blocks: Sequence[int]) -> None:
        """Read ``blocks`` into host memory; on CUDA the transfer goes on beside the steps that follow."""
        taken = _Index(blocks)
        copy.payload = {
            index: [self._to_host(pool.index_select(0, taken.on(pool.device))) for pool in pools]
            for index, pools in self._layers.items()
        }

    def swap_in(self, copy: HostCopy, blocks: Sequence[int]) -> None:
        """Write what ``swap_out`` read into ``blocks``, as far as they go."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        given = _Index(blocks)
        for index, pools in self._layers.items():
            for pool, rows in zip(pools, copy.payload[index], strict=True):
                pool.index_copy_(0, given.on(pool.device), rows[: len(blocks)].to(pool.device, non_blocking=True))
        copy.payload = None

    def splice(
        self,
        sources: Sequence[int],
        destinations: Sequence[int],
        moves: Sequence[int],
        rotary: Mapping[int, torch.Tensor],
    ) -> None:
        """Copy the KV of token slots to others, each key re-rotated for a position that lies ``moves`` behind its own.

        ``rotary``: by layer index the frequencies fp32 ``[rotary / 2]`` with which its keys are rotated.
        """
        indices = _Index(sources), _Index(destinations), _Index(moves)
        for index, (keys, values) in self._layers.items():
            source, destination, delta = (numbers.on(keys.device) for numbers in indices)
            moved = rerotate(_rows(keys).index_select(0, source), delta, rotary[index])
            _rows(keys).index_copy_(0, destination, moved)
            _rows(values).index_copy_(0, destination, _rows(values).index_select(0, source))

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

    def _create(self, index: int, shape: LayerShape) -> None:
        # Zeros, not empty: the null block and unwritten slots are read under a mask, and NaN * 0 is NaN.
        rows = (self.num_blocks + 1, self.block_size, shape.kv_heads)
        key = torch.zeros(*rows, shape.key_width, dtype=shape.dtype, device=shape.device)
        value = torch.zeros(*rows, shape.value_width, dtype=shape.dtype, device=shape.device)
        self.shapes[index] = shape
        self._layers[index] = (key, value)


class _Index:
    """Numbers as int64 on the devices of layers, brought to each of them once."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._found: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._found:
            self._found[device] = integers(self._numbers, device)
        return self._found[device]


def _rows(pool: torch.Tensor) -> torch.Tensor:
    """A pool by token slots."""
    return pool.view(-1, *pool.shape[2:])


def bytes_per_block(shapes: Mapping[int, LayerShape], block_size: int) -> int:
    """Bytes of one block over all layers."""
    return sum(bytes_per_block_on_devices([shapes], block_size).values())


def bytes_per_block_on_devices(
    replicas: Iterable[Mapping[int, LayerShape]], block_size: int
) -> dict[torch.device, int]:
    """By device the bytes of one block in each of the replicas, over those of their layers that lie there."""
    found: dict[torch.device, int] = {}
    for shapes in replicas:
        for shape in shapes.values():
            found[shape.device] = found.get(shape.device, 0) + block_size * shape.bytes_per_token
    return found
