"""The header of a GGUF file: its metadata and tensor table, and whether the file is as long as they say.

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The readers in gguf and transformers take many
seconds for the vocabulary of a large model, and do not say that a file is cut.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from rrm_engine.errors import RrmError

MAGIC = b"GGUF"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NO_HEADER = "its header is cut off or overwritten"
MOST_DIMENSIONS = 8  # of a tensor; files have four at most


class Damaged(RrmError):
    """The file is no GGUF file, or not a whole one; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``metadata`` holds numbers and strings, and of arrays their lengths; ``tensors`` are names."""

    metadata: dict[str, Any]
    tensors: tuple[str, ...]


def read_header(path: Path) -> GgufHeader:
    """The header of the file at ``path``. Raises Damaged, or OSError if it cannot be read."""
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            return _Reader(file, size).header()
        except (struct.error, UnicodeDecodeError, RecursionError) as error:  # the file ends, or these are other bytes
            raise Damaged(NO_HEADER) from error


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def header(self) -> GgufHeader:
        if self.size == 0:
            raise Damaged("it is empty")
        if self.file.read(4) != MAGIC:
            raise Damaged("it does not begin with GGUF")
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise Damaged("it was written for a machine with the other byte order")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(entries):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        table = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise Damaged(NO_HEADER)
        start = -(-self.file.tell() // alignment) * alignment
        end = start + max((offset + size for _, offset, size in table), default=0)
        if end > self.size:
            raise Damaged(f"it has {self.size:,} bytes of {end:,}")
        return GgufHeader(metadata, tuple(name for name, *_ in table))

    def number(self, kind: str) -> Any:
        width = struct.calcsize("<" + kind)
        return struct.unpack("<" + kind, self.file.read(width))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def bytes(self, count: int) -> bytes:
        self.require(count)
        return self.file.read(count)

    def require(self, count: int) -> None:
        """A length that goes beyond the file's end is none: nothing is allocated or counted for it."""
        if count > self.size - self.file.tell():
            raise Damaged(NO_HEADER)

    def value(self, kind: int) -> Any:
        """A metadata value; an array's length in its place."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.bytes(self.number("Q")).decode("utf-8", "replace")
        if kind != ARRAY:
            raise Damaged(NO_HEADER)
        element, count = self.number("I"), self.number("Q")
        if element in NUMBERS:
            width = struct.calcsize("<" + NUMBERS[element])
            self.require(count * width)
            self.file.seek(count * width, 1)
        else:
            self.require(count)
            for _ in range(count):
                self.value(element)
        return count

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset from the end of the header, and bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, count = self.string(), self.number("I")
        if count > MOST_DIMENSIONS:
            raise Damaged(NO_HEADER)
        shape = [self.number("Q") for _ in range(count)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            elements, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:  # newer than the package: transformers will say so
            elements, width = 1, 0
        return name, offset, prod(shape) // elements * width
