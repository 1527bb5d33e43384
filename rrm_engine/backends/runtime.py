"""What the jobs of a run have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerFast

from rrm_engine.backends.join import Join
from rrm_engine.engine.replicas import AnyEngine
from rrm_engine.graph.types import Limits, Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import Style
from rrm_engine.solver.node import PhasePlan


@dataclass(frozen=True, slots=True)
class Runtime:
    """What all jobs of a run share."""

    engine: AnyEngine
    tokenizer: PreTrainedTokenizerFast
    chat: ChatFormat
    style: Style
    plans: Mapping[Phase, PhasePlan]
    limits: Limits
    child_context: Literal["task", "parent"]
    join: Join = field(default_factory=Join)
