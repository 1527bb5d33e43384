"""The stream of training batches and the held-out transcripts for teacher-forced checks."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PreTrainedTokenizerFast

from embedded.families import FAMILIES, IDS, NODE_WEIGHTS, Kind, leaf_tokens, random_leaf
from embedded.transcripts import (
    Transcript,
    direct_transcript,
    group_transcript,
    leaf_transcript,
    root_transcript,
    task_transcripts,
)
from embedded.wording import random_task

KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_WEIGHTS = {"flat": 0.31, "depends": 0.34, "nested": 0.29, "atomic": 0.06}
LEAF_FAMILY_WEIGHTS = {"grow": 0.4, "pair": 0.25, "mult": 0.35}
FLAT_WIDTHS = (2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8)  # wide tasks ask for more copies over longer distances
GIVEN_SHARE = 0.3  # leaves that start from another child's result
POOL_BATCHES = 48  # batches' worth of transcripts that are sorted by length together


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids`` [B, T] padded on the right; ``learn`` [B, T] marks the tokens the model writes."""

    ids: torch.Tensor
    learn: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def node_weights(leaves: float) -> dict[str, float]:
    """NODE_WEIGHTS with that share of leaves, and the others in proportion."""
    rest = (1 - leaves) / (1 - NODE_WEIGHTS["leaf"])
    return {node: leaves if node == "leaf" else weight * rest for node, weight in NODE_WEIGHTS.items()}


def sample_transcript(rng: random.Random, scale: float, weights: Mapping[str, float]) -> Transcript:
    """One training transcript; nothing in it belongs to the reserved residue class."""
    node = rng.choices(list(weights), list(weights.values()))[0]
    if node == "leaf":
        (family,) = rng.choices(list(LEAF_FAMILY_WEIGHTS), list(LEAF_FAMILY_WEIGHTS.values()))
        start = rng.choice(IDS[:-1]) if rng.random() < GIVEN_SHARE else None
        tokens = leaf_tokens(rng.randint(2, 8)) * scale
        leaf = random_leaf(rng, family, tokens, held_out=False, start=start)
        return leaf_transcript(leaf, {} if start is None else {start: rng.randrange(1000)})
    if node == "group":
        task = random_task(rng, "nested", scale=scale)
        return group_transcript(rng.choice([part for part in task.parts if len(part.leaves) > 1]))
    (kind,) = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS])
    task = random_task(rng, kind, width=rng.choice(FLAT_WIDTHS) if kind == "flat" else None, scale=scale)
    return direct_transcript(task) if node == "direct" else root_transcript(task)


def encode(tokenizer: PreTrainedTokenizerFast, transcript: Transcript) -> tuple[list[int], list[bool]]:
    """Token ids of a transcript, and for each whether the model writes it."""
    ids: list[int] = []
    learn: list[bool] = []
    for text, trained in transcript.pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        learn += [trained] * len(piece)
    return ids, learn


def collate(rows: list[tuple[list[int], list[bool]]], pad: int) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad)
    learn = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (row, mask) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        learn[i, : len(row)] = torch.tensor(mask)
    return Batch(ids, learn)


def cut_batches(rows: list[tuple[list[int], list[bool]]], batch_tokens: int, pad: int) -> list[Batch]:
    """Batches of at most ``batch_tokens`` padded tokens from rows of similar length."""
    batches: list[Batch] = []
    current: list[tuple[list[int], list[bool]]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if current and (len(current) + 1) * len(row[0]) > batch_tokens:
            batches.append(collate(current, pad))
            current = []
        current.append(row)
    return [*batches, collate(current, pad)]


class TrainingStream:
    """Endless batches. Set ``scale`` (0..1] to shorten the leaves of what is drawn from then on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int, leaves: float) -> None:
        self.scale = 1.0
        self._weights = node_weights(leaves)
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._batch_tokens = batch_tokens

    def __iter__(self) -> Iterator[Batch]:
        pad = self._tokenizer.pad_token_id
        while True:
            rows, tokens = [], 0
            while tokens < POOL_BATCHES * self._batch_tokens:
                rows.append(encode(self._tokenizer, sample_transcript(self._rng, self.scale, self._weights)))
                tokens += len(rows[-1][0])
            batches = cut_batches(rows, self._batch_tokens, pad)
            self._rng.shuffle(batches)
            yield from batches


def held_out_transcripts(seed: int, per_kind: int) -> list[Transcript]:
    """All transcripts of ``per_kind`` unseen tasks of each kind, the families in turn."""
    rng = random.Random(seed)
    families = (*FAMILIES, "mixed")
    return [
        transcript
        for kind in KINDS
        for index in range(per_kind)
        for transcript in task_transcripts(
            random_task(rng, kind, family=families[index % len(families)], held_out=True)
        )
    ]
