"""Who wrote each token of a node's sequence."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, legible_key
from rrm_engine.loading.load import load_words
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.encode import Content
from rrm_engine.protocol.grammar import EventMatcher, ThinkingMatcher
from rrm_engine.runs.events import Began
from rrm_engine.runs.timeline import JobTrace
from rrm_engine.verify.grammars import RecordedGrammars

PROMPT = "prompt"  # what stands in front of the first phase
INJECTED = "injected"  # what a waiting node was given: the end of its turn, conclusions, the next beginning
PRESCRIBED = "prescribed"  # the style's beginning of an answer, and tokens to which a grammar left no alternative
MODEL = "model"


class Written(NamedTuple):
    """Tokens ``start`` to ``stop`` of a sequence."""

    start: int
    stop: int
    who: str


class Words:
    """The tokenizer, chat format and grammars of a run whose settings came out as ``used``."""

    def __init__(self, model: str, used: dict[str, Any], trust_remote_code: bool = False) -> None:
        self.model = model
        self.tokenizer, self.eos_ids, _ = load_words(model, trust_remote_code)
        self.chat = ChatFormat(self.tokenizer, self.eos_ids)
        self._grammars = RecordedGrammars(int(used["max_sibling_width"]), self.tokenizer, self.eos_ids)

    def spans(self, trace: JobTrace, path: str) -> list[Written]:
        """All tokens of a node that has token ids. Raises RrmError if they are not those of this tokenizer."""
        transcript = trace.end(path).transcript
        assert transcript is not None
        tokens, at, found = transcript.token_ids, 0, list[Written]()
        for stretch, (low, high) in zip(trace.real(path), transcript.sampled, strict=True):
            begin, text = trace.beginning(stretch), trace.pause(stretch).text
            opens = self.chat.opens(begin.opens)
            same = tokens[low - len(opens) : low] == opens and self._reads(tokens, low, high, text[len(begin.opens) :])
            who = self._chosen(begin, tokens[low:high]) if same else None
            if who is None:
                raise RrmError(
                    f"{legible(path)} of {legible_key(trace.key)} was not written with the tokenizer of {self.model}: "
                    f"--model says where the run's model is now"
                )
            given = Written(at, low - len(opens), INJECTED if found else PROMPT)
            found += [given, Written(low - len(opens), low, PRESCRIBED), *_runs(who, low)]
            at = high
        found.append(Written(at, len(tokens), INJECTED))
        return [span for span in found if span.start < span.stop]

    def _reads(self, tokens: Sequence[int], low: int, high: int, text: str) -> bool:
        """Whether the tokens ``low`` to ``high`` say ``text``. White space may follow it; where an event ended
        inside a token, the part of it that was kept comes after them.
        """
        if not all(0 <= token < len(self.tokenizer) for token in tokens):
            return False
        read = Detokenizer(self.tokenizer)
        said = "".join(read.step(token) for token in tokens[low:high] if token not in self.eos_ids) + read.end()
        if said.startswith(text):
            return not said[len(text) :].strip()
        kept = self.chat.encode([Content(text[len(said) :])], continues=True)
        return text.startswith(said) and list(tokens[high : high + len(kept)]) == kept

    def _chosen(self, begin: Began, tokens: Sequence[int]) -> list[str] | None:
        """For each token of a phase whether the model had a choice; None if its grammar does not take them."""
        matcher = self._grammars.matcher(begin.phase, begin.grammar)
        if matcher is None:
            return [MODEL] * len(tokens)
        texts, found = self._grammars.compiled.texts, []
        for token in tokens:
            found.append(PRESCRIBED if _no_choice(matcher, token, texts[token]) else MODEL)
            try:
                matcher.accept(token)
            except ValueError:
                return None
        return found


def _no_choice(matcher: EventMatcher | ThinkingMatcher, token: int, text: bytes) -> bool:
    """Whether all of the token must come next: another one that spells the same would not be another choice."""
    forced = matcher.forced_text()
    return (bool(text) and forced.startswith(text)) or int(np.bitwise_count(matcher.mask()).sum()) == 1


def _runs(who: Sequence[str], first: int) -> Iterator[Written]:
    """Equal neighbours as one span; the first is the token at ``first``."""
    for name, group in groupby(who):
        count = sum(1 for _ in group)
        yield Written(first, first + count, name)
        first += count
