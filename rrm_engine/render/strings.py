"""Long texts of a page, each of them once."""

LEFT_OUT = "\n[... {:,} characters left out of this page ...]\n"


class Strings:
    """Texts by number; what is longer than ``longest`` characters loses its middle."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def put(self, text: str | None) -> int | None:
        """The number of a text; None of nothing."""
        if not text:
            return None
        text = self.cut(text)
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]

    def cut(self, text: str) -> str:
        """``text``, or its two ends and how much was between them."""
        if len(text) <= self.longest:
            return text
        half = self.longest // 2
        return text[:half] + LEFT_OUT.format(len(text) - 2 * half) + text[len(text) - half :]
