"""Families of serial computations modulo 1000, and the random tasks that are built from them.

A *leaf* is one long serial computation, a *part* is one named leaf or a group of leaves that are added up, and a
*task* asks for the sum of its parts. Every number is an integer in 0..999.

Scratchpads hold the state as three digits, least significant first, and write each product or sum digit after
its carry, so that every token depends on a few near ones only::

    grow 204 *4 +1 x2        pair 7 15 x2        mult 204 *37 x2
    02:04002                 ..:07000            02:4002
    01:17108                 02:05010            01:28104,121,8041
    00:...                   01:12002            00:...
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

MODULUS = 1000
FAMILIES = ("grow", "pair", "mult")
FACTORS = tuple(f for f in range(11, 100) if f % 2 and f % 5)  # units modulo 1000: a power never collapses to 0
RESERVED_CLASSES = 8  # one residue class in so many is kept out of training
LONGEST_LEAF = 195.0  # scratchpad tokens
IDS = "abcdefgh"  # of the parts of a task, and of the leaves of a group

Kind = Literal["flat", "depends", "nested", "atomic"]
NODE_WEIGHTS = {"leaf": 0.06, "root": 0.34, "direct": 0.56, "group": 0.04}  # shares of the transcripts to train on


def reversed_digits(value: int) -> str:
    """204 -> "402": three digits, least significant first."""
    return f"{value % MODULUS:03d}"[::-1]


def add_digits(x: int, y: int) -> str:
    """``x + y`` modulo 1000 as carry, digit, carry, digit, digit."""
    out, carry = "", 0
    for place, (p, q) in enumerate(zip(reversed_digits(x), reversed_digits(y), strict=True)):
        carry, digit = divmod(int(p) + int(q) + carry, 10)
        out += f"{carry}{digit}" if place < 2 else f"{digit}"
    return out


def multiply_digits(x: int, factor: int, extra: int, places: int) -> str:
    """``x * factor + extra`` modulo ``10**places``: a carry and a digit per place, the last place without carry."""
    out, carry = "", extra
    for place, p in enumerate(reversed_digits(x)[:places]):
        carry, digit = divmod(int(p) * factor + carry, 10)
        out += f"{carry}{digit}" if place < places - 1 else f"{digit}"
    return out


@dataclass(frozen=True, slots=True)
class Leaf:
    """One serial computation. ``start`` is a number or the id of the part whose result it starts from.

    ``numbers``: grow (multiplier, addend), pair (second number,), mult (two-digit factor,).
    """

    family: str
    start: int | str
    numbers: tuple[int, ...]
    rounds: int

    @property
    def depends_on(self) -> str | None:
        return self.start if isinstance(self.start, str) else None

    def canonical(self) -> str:
        """The short form a parent writes as its child's task."""
        first = self.numbers[0]
        match self.family:
            case "grow":
                middle = f"*{first} +{self.numbers[1]}"
            case "pair":
                middle = f"{first}"
            case _:
                middle = f"*{first}"
        return f"{self.family} {self.start} {middle} x{self.rounds}"

    def states(self, start: int) -> list[int]:
        """Every state from the first to the last; a pair's states begin with both of its numbers."""
        states = [start] if self.family != "pair" else [start, self.numbers[0]]
        for _ in range(self.rounds):
            match self.family:
                case "grow":
                    nxt = states[-1] * self.numbers[0] + self.numbers[1]
                case "pair":
                    nxt = states[-1] + states[-2]
                case _:
                    nxt = states[-1] * self.numbers[0]
            states.append(nxt % MODULUS)
        return states

    def result(self, start: int) -> int:
        return self.states(start)[-1]

    def scratchpad(self, start: int, mark: str = ":") -> str:
        """All lines, each after a countdown of the rounds left and ``mark``, and closed by a newline."""
        states = self.states(start)
        first = reversed_digits(start)
        padded = f"0{first[0]}0{first[1:]}"
        if self.family == "mult":
            lines = [f"{self.rounds:02d}{mark}{first[0]}0{first[1:]}"]
        elif self.family == "grow":
            lines = [f"{self.rounds:02d}{mark}{padded}"]
        else:
            second = reversed_digits(self.numbers[0])
            lines = [f"..{mark}{padded}", f"{self.rounds:02d}{mark}0{second[0]}0{second[1:]}"]
        begin = len(lines)
        for step in range(self.rounds):
            lines.append(f"{self.rounds - step - 1:02d}{mark}{self._step(states, begin + step)}")
        return "\n".join(lines) + "\n"

    def _step(self, states: list[int], index: int) -> str:
        """The digits that lead to ``states[index]``."""
        previous = states[index - 1]
        if self.family == "grow":
            return multiply_digits(previous, self.numbers[0], self.numbers[1], 3)
        if self.family == "pair":
            return add_digits(states[index - 2], previous)
        tens, ones = divmod(self.numbers[0], 10)
        low, high = previous * ones % MODULUS, previous * tens % 100 * 10
        total = add_digits(low, high)[1:]  # the first carry is always 0
        return f"{multiply_digits(previous, ones, 0, 3)},{multiply_digits(previous, tens, 0, 2)},{total}"

    def reserved(self) -> bool:
        """Whether these parameters belong to the residue class kept for held-out tasks."""
        start = self.start if isinstance(self.start, int) else "?"
        key = f"{self.family} {start} {self.numbers} {self.rounds}"
        return hashlib.sha256(key.encode()).digest()[0] % RESERVED_CLASSES == 0


@dataclass(frozen=True, slots=True)
class Part:
    """A named summand: one leaf, or a group of two leaves that are added up."""

    id: str
    name: str
    leaves: tuple[Leaf, ...]

    @property
    def depends_on(self) -> str | None:
        return self.leaves[0].depends_on

    def canonical(self) -> str:
        text = "; ".join(leaf.canonical() for leaf in self.leaves)
        return text if len(self.leaves) == 1 else f"sum {text}"


@dataclass(frozen=True, slots=True)
class Task:
    """A problem text with the parts it was written from."""

    problem: str
    kind: Kind
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        return len(self.parts)

    @property
    def depth(self) -> int:
        """Levels of children below the root in the recursive solution."""
        return {"atomic": 0, "nested": 2}.get(self.kind, 1)

    @property
    def family(self) -> str:
        families = {leaf.family for part in self.parts for leaf in part.leaves}
        return families.pop() if len(families) == 1 else "mixed"

    def results(self) -> dict[str, int]:
        """Result of each part by id, in the order of the parts."""
        results: dict[str, int] = {}
        for part in self.parts:
            total = 0
            for leaf in part.leaves:
                total += leaf.result(leaf.start if isinstance(leaf.start, int) else results[leaf.start])
            results[part.id] = total % MODULUS
        return results

    def answer(self) -> int:
        return sum(self.results().values()) % MODULUS


def random_number(rng: random.Random) -> int:
    """0..999 with short numbers more frequent than a uniform draw would have them."""
    return rng.randrange(rng.choice((10, 100, MODULUS, MODULUS, MODULUS)))


def random_leaf(rng: random.Random, family: str, tokens: float, *, held_out: bool, start: str | None = None) -> Leaf:
    """A leaf of ``family`` whose scratchpad has about ``tokens`` tokens (between 65 % and 100 % of that)."""
    tokens *= rng.uniform(0.65, 1.0)
    while True:
        value = random_number(rng) if start is None else start
        match family:
            case "grow":
                leaf = Leaf(family, value, (rng.randint(2, 9), rng.randint(1, 9)), max(3, round(tokens / 9) - 1))
            case "pair":
                leaf = Leaf(family, value, (random_number(rng),), max(3, round(tokens / 9) - 2))
            case _:
                leaf = Leaf(family, value, (rng.choice(FACTORS),), max(2, round((tokens - 8) / 18)))
        if leaf.reserved() == held_out:
            return leaf
        tokens = min(tokens + rng.choice((-9, 9)), LONGEST_LEAF)


def leaf_tokens(leaves: int) -> float:
    """Scratchpad tokens per leaf so that a direct run of so many leaves stays under about 900 tokens."""
    return min(LONGEST_LEAF, (760 - 34 * leaves) / leaves)
