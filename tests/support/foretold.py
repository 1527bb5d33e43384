"""Drafts that are right as often as one likes: guesses from what a run without drafts wrote."""

from collections.abc import Mapping

from rrm_engine.engine.draft import MOST, SIZES, Drafting, Guess
from rrm_engine.engine.sequence import Sequence

RIGHT = (MOST, 0, 1, 3)  # of the drafts of a sequence by turns: so many tokens, and then a wrong one


class Foretold(Drafting):
    """Knows what sequences, by their keys, come to have."""

    def __init__(
        self, tokens: Mapping[str, list[int]], eos_ids: frozenset[int], right: tuple[int, ...] = RIGHT
    ) -> None:
        super().__init__(MOST, eos_ids)
        self.tokens = tokens
        self.right = right

    def guess(self, sequence: Sequence) -> list[Guess]:
        length = len(sequence.tokens)
        right = self.right[length % len(self.right)]
        known = self.tokens.get(sequence.key, [])[length : length + max(self.room(sequence), 0)]
        guess = [token if i != right else 2 + token % 7 for i, token in enumerate(known)]
        matcher = sequence.matcher.copy() if sequence.matcher is not None else None
        return [(token, SIZES[0]) for token in self._allowed(matcher, guess)]
