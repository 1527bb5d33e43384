"""What a model's thinking stands between, and text without it."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final


@dataclass(frozen=True)
class Marks:
    """A thinking block begins with ``open`` and ends with ``close``. ``always``: the model's text begins inside of one,
    whatever the prompt ends with.
    """

    open: str
    close: str
    always: bool = False

    def left_open(self, prompt: str) -> bool:
        """Whether text after ``prompt`` begins inside a block."""
        return self.always or prompt.rfind(self.open) > prompt.rfind(self.close)

    @property
    def ending(self) -> str:
        """What ends a block that would not end by itself."""
        return f"<|end|><|start|>assistant{self.close}" if self.always else f"\n{self.close}"

    @cached_property
    def block(self) -> re.Pattern[str]:
        """A block, to its end or that of the text."""
        return re.compile(rf"{re.escape(self.open)}[\s\S]*?(?:{re.escape(self.close)}|\Z)")

    def visible(self, text: str, thinking: bool = False) -> str:
        """``text`` without its blocks, of which an unclosed one hides the rest; ``thinking``: it begins inside one."""
        if thinking:
            _, closed, text = text.partition(self.close)
            if not closed:
                return ""
        return self.block.sub("", text)

    def unfinished(self, text: str, thinking: bool = False) -> bool:
        """Whether ``text`` ends inside a block."""
        return (thinking and self.close not in text) or text.rfind(self.open) > text.rfind(self.close)


@dataclass(frozen=True, slots=True)
class Thought:
    """Thinking that a phase begins with, in front of what a grammar holds.

    ``opened``: the prompt opened the block; otherwise the model has to. At ``limit`` tokens the block is ended.
    """

    marks: Marks
    opened: bool
    limit: int


# ASCII only: of a run of SentencePiece's byte tokens other characters are known only at its end. Models whose template
# writes in channels (gpt-oss) think in all of them but the last.
KNOWN: Final = (
    Marks("<think>", "</think>"),
    Marks("<|channel|>analysis", "<|channel|>final<|message|>", always=True),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<thought>", "</thought>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
)
DEFAULT: Final = KNOWN[0]


def find_marks(template: str) -> Marks:
    """The marks that a chat template knows, judging by its source; ``<think>`` if it names none."""
    for marks in KNOWN:
        if marks.close in template or (marks.always and "<|channel|>" in template):
            return marks
    return DEFAULT
