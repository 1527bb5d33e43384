"""What an engine is made with."""

import sys
from dataclasses import dataclass

from rrm_engine.config import WaitPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one engine; ``loading/engines.py`` makes it of them and a model.

    A step runs one token of every decoding sequence, of which there are ``max_sequences`` at most, and chunks of
    prompts up to ``step_tokens`` tokens.
    """

    blocks: int  # in the pool
    max_sequence_tokens: int
    block_size: int = 16  # tokens
    prefix_cache: bool = True
    max_sequences: int = 64
    step_tokens: int = 512
    wait_policy: WaitPolicy = "pin"  # what becomes of a waiting sequence's KV
    host_blocks: int = 0  # room in host memory for what is offloaded
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0  # of the sampling noise
    stages: int = 1  # steps in flight: as many as the model has devices that run one after the other
    lookahead: bool = False  # one step more, with tokens that the host does not know yet
    eager: bool = False  # launch each kernel where a whole step could be captured and replayed
    splices: bool = False  # KV may be attached at other positions than it was computed for
    drafts: int = 0  # tokens that are guessed at once, at most
    weigh_drafts: bool = False  # run only guesses that are likely to be worth their time on this machine
    vocabulary: int = sys.maxsize  # tokens that the model knows
