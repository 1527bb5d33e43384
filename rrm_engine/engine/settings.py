"""Settings of an engine."""

import sys
from dataclasses import dataclass

from rrm_engine.config import WaitPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """``loading/engines.py`` builds an engine from these and a model.

    A step runs one token of each decoding sequence, of which there are at most ``max_sequences``, and chunks of
    prompts, up to ``step_tokens`` tokens in all.
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
    stages: int = 1  # devices that the layers are spread over in a pipeline; as many steps are in flight
    lookahead: bool = False  # launch one more step, with tokens that the host has not read yet
    eager: bool = False  # launch kernels one by one, even where a whole step could be captured and replayed
    splices: bool = False  # KV may be attached at other positions than those it was computed for
    drafts: int = 0  # most tokens guessed at once
    weigh_drafts: bool = False  # run only guesses that are likely to save time on this machine
    vocabulary: int = sys.maxsize  # number of tokens that the model knows
