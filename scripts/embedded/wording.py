"""Problem texts: several wordings per family, names and nouns known or made up."""

import random

from embedded.families import FAMILIES, IDS, Kind, Leaf, Part, Task, leaf_tokens, random_leaf

# {s} subject, {q} a quantity with its noun, {v} a bare quantity, {o} noun, {n} rounds; the rest are leaf numbers.
SENTENCES = {
    "grow": (
        "{s} starts with {q}, and {n} times over the number is multiplied by {m} and {c} more are added.",
        "{s} has {q} at first, and in each of {n} rounds there are {m} times as many plus {c} new ones.",
        "{s} holds {q}, and every day for {n} days the count becomes {m} times the old one plus {c}.",
        "{s} begins at {v} and repeats one step {n} times: multiply by {m}, then add {c}.",
    ),
    "pair": (
        "{s} writes {v} and {y}, then {n} more numbers, each the sum of the two before it.",
        "{s} counts {q} on day one and {y} on day two, and for {n} more days each count is the sum of the last two.",
        "{s} lists {v}, then {y}, and goes on {n} times by adding the last two entries.",
        "{s} sees {q}, next {y}, and {n} times more as many as the two times before together.",
    ),
    "mult": (
        "{s} starts with {q} and multiplies by {f} in each of {n} steps.",
        "{s} owns {q}, and {n} times in a row the number becomes {f} times as large.",
        "{s} takes {v} and applies the factor {f} exactly {n} times.",
        "{s} trades {q} in {n} turns, and every turn gives {f} for each one.",
    ),
}
QUANTITY_REFERENCES = ("as many {o} as {r} at the end", "the final {o} of {r}", "what {r} ends with")
VALUE_REFERENCES = ("the result of {r}", "the last number of {r}", "what {r} ends with")
RULES = (
    "Keep only the last three digits of every number.",
    "All numbers are taken modulo 1000.",
    "Work modulo 1000.",
    "Only the last three digits count.",
)
TOTAL_QUESTIONS = (
    "What is the sum of all results?",
    "Add up the final numbers.",
    "Find the total at the end.",
    "How many are there in total?",
)
SINGLE_QUESTIONS = ("What is the result?", "Find the final number.", "How many are there at the end?")
GROUPS = (
    "{s} keeps {k} boxes.",
    "{s} adds up {k} lists.",
    "{s} is the total of {k} counts.",
)
ORDINALS = ("The first", "The second", "The third")
NOUNS = (
    "apples", "bees", "birds", "books", "boxes", "cards", "cells", "coins", "cups", "eggs", "fish", "frogs",
    "grains", "keys", "lamps", "marbles", "plants", "points", "seeds", "shells", "stamps", "stones", "tiles", "trees",
)  # fmt: skip
NAMES = (
    "Ana", "Aldo", "Ben", "Bela", "Cora", "Chen", "Dana", "Dev", "Ema", "Egon", "Fay", "Finn", "Gita", "Gus", "Hana",
    "Hugo", "Ines", "Ivo", "Jana", "Joe", "Kira", "Karl", "Lea", "Luis", "Mara", "Mo", "Nina", "Noah", "Olga", "Omar",
    "Pia", "Paul", "Quin", "Rosa", "Ravi", "Sara", "Sven", "Tara", "Tom", "Uma", "Vera", "Viktor", "Wendy", "Will",
    "Xeno", "Yara", "Yusuf", "Zoe", "Zeno",
)  # fmt: skip
LOWER = "abcdefghijklmnopqrstuvwxyz"


def word_list() -> list[str]:
    """Every text whose words deserve a token of their own. Names are spelled letter by letter."""
    texts = [text for wordings in SENTENCES.values() for text in wordings]
    texts += [*QUANTITY_REFERENCES, *VALUE_REFERENCES, *RULES, *TOTAL_QUESTIONS, *SINGLE_QUESTIONS, *GROUPS]
    return [*texts, *ORDINALS, *NOUNS]


def random_names(rng: random.Random, count: int, *, invented: float) -> list[str]:
    """``count`` different names, a share ``invented`` of them random letters."""
    names: list[str] = []
    while len(names) < count:
        made_up = "".join(rng.choices(LOWER, k=rng.randint(3, 5))).capitalize()
        name = made_up if rng.random() < invented else rng.choice(NAMES)
        if name not in names:
            names.append(name)
    return names


def random_noun(rng: random.Random, *, invented: float) -> str:
    if rng.random() < invented:
        return "".join(rng.choices(LOWER, k=rng.randint(3, 6)))
    return rng.choice(NOUNS)


def leaf_sentence(rng: random.Random, leaf: Leaf, subject: str, noun: str, names: dict[str, str]) -> str:
    """One sentence that states ``leaf``; ``names`` maps the ids of the parts to their names."""
    if isinstance(leaf.start, str):
        label = f"({leaf.start})"
        slots = {"o": noun, "r": label if rng.random() < 0.5 else f"{names[leaf.start]} {label}"}
        quantity = rng.choice(QUANTITY_REFERENCES).format(**slots)
        value = rng.choice(VALUE_REFERENCES).format(**slots)
    else:
        quantity, value = f"{leaf.start} {noun}", str(leaf.start)
    keys = {"grow": "mc", "pair": "y", "mult": "f"}[leaf.family]
    numbers = dict(zip(keys, leaf.numbers, strict=True))
    template = rng.choice(SENTENCES[leaf.family])
    return template.format(s=subject, q=quantity, v=value, o=noun, n=leaf.rounds, **numbers)


def problem_text(rng: random.Random, parts: tuple[Part, ...], noun: str) -> str:
    """The task in words: rule, the parts with their ids as labels such as ``(a)``, question."""
    names = {part.id: part.name for part in parts}
    sentences = []
    for part in parts:
        subject = part.name if len(parts) == 1 else f"({part.id}) {part.name}"
        if len(part.leaves) == 1:
            sentences.append(leaf_sentence(rng, part.leaves[0], subject, noun, names))
            continue
        sentences.append(rng.choice(GROUPS).format(s=subject, k=len(part.leaves)))
        for ordinal, leaf in zip(ORDINALS, part.leaves, strict=False):
            sentences.append(leaf_sentence(rng, leaf, ordinal, noun, names))
    question = rng.choice(SINGLE_QUESTIONS if len(parts) == 1 else TOTAL_QUESTIONS)
    rule = rng.choice(RULES)
    return " ".join([rule, *sentences, question] if rng.random() < 0.7 else [*sentences, rule, question])


def random_task(
    rng: random.Random,
    kind: Kind,
    *,
    width: int | None = None,
    family: str | None = None,
    held_out: bool = False,
    invented: float = 0.5,
    scale: float = 1.0,
) -> Task:
    """A task of ``kind``; ``family`` "mixed" or None draws one per leaf or per task.

    ``scale`` shortens the leaves, for the first part of training. ``held_out`` takes every leaf from the
    reserved residue class, otherwise none is.
    """
    if width is None:
        width = {"flat": rng.randint(2, 8), "depends": rng.randint(3, 6), "nested": rng.randint(2, 4)}.get(kind, 1)
    if family is None:
        family = rng.choice((*FAMILIES, "mixed"))
    sizes = group_sizes(rng, width) if kind == "nested" else [1] * width
    targets = dependencies(rng, width) if kind == "depends" else {}
    tokens = leaf_tokens(sum(sizes)) * scale
    names = random_names(rng, width, invented=invented)

    def leaf(index: int) -> Leaf:
        chosen = rng.choice(FAMILIES) if family == "mixed" else family
        start = IDS[targets[index]] if index in targets else None
        return random_leaf(rng, chosen, tokens, held_out=held_out, start=start)

    parts = tuple(
        Part(IDS[index], name, tuple(leaf(index) for _ in range(size)))
        for index, (name, size) in enumerate(zip(names, sizes, strict=True))
    )
    return Task(problem_text(rng, parts, random_noun(rng, invented=invented)), kind, parts)


def group_sizes(rng: random.Random, width: int) -> list[int]:
    """Leaves per part of a nested task: one or two, at least one group, three to six leaves in all."""
    while True:
        sizes = [rng.choice((1, 2, 2)) for _ in range(width)]
        if max(sizes) > 1 and 3 <= sum(sizes) <= 6:
            return sizes


def dependencies(rng: random.Random, width: int) -> dict[int, int]:
    """Part index -> index of the earlier part it starts from; no chain is longer than two parts."""
    dependents = set(rng.sample(range(1, width), 1 if width < 4 else rng.randint(1, 2)))
    return {i: rng.choice([j for j in range(i) if j not in dependents]) for i in sorted(dependents)}
