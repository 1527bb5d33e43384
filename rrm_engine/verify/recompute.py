"""The logits of a transcript, twice: from plain transformers, and from the engine's own paged path."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from rrm_engine.engine.packing import pack
from rrm_engine.engine.scratch import Scratch, run_packed
from rrm_engine.kv.cache import KVCache
from rrm_engine.loading.load import load_pretrained
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.verify.recording import NodeRecord


class Plain:
    """A model as transformers loads it: nothing fused, its own attention, one sequence at a time."""

    def __init__(self, name: str, dtype: str, device: torch.device, trust_remote_code: bool = False) -> None:
        """Raises RrmError with one sentence if the model cannot be loaded."""
        model, tokenizer = load_pretrained(name, dtype, device, trust_remote_code=trust_remote_code)
        self.attention = _attention(model)
        model.set_attn_implementation(self.attention)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.tokenizer: PreTrainedTokenizerFast = tokenizer
        self.device = device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def text(self, token: int) -> str:
        """What a token stands for."""
        return self.tokenizer.decode([token])

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()
    def logits(self, record: NodeRecord) -> torch.Tensor:
        """``[positions, vocabulary]``: row i is what the token at the i-th of ``record.positions`` is drawn from."""
        rows = torch.tensor(record.positions, device=self.device) - 1
        tokens = torch.tensor([record.tokens], device=self.device)
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=rows).logits[0]


def _attention(model: Any) -> str:
    """sdpa, or eager for a model that has soft-caps or sinks, which sdpa would leave out."""
    config = model.config.get_text_config()
    exact = model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None
    return "sdpa" if exact else "eager"


class Paged:
    """The engine's path: its forward pass and paged attention, a transcript in prefill chunks.

    Chunks end where segments end, and after ``step_tokens`` tokens. The engine itself ran the tokens of a segment
    one by one, in whatever batch they met.
    """

    def __init__(self, loaded: LoadedModel, block_size: int, step_tokens: int) -> None:
        self.loaded = loaded
        self.block_size = block_size
        self.step_tokens = step_tokens

    @torch.inference_mode()
    def logits(self, record: NodeRecord) -> torch.Tensor:
        """Same rows as ``Plain.logits``."""
        loaded, length = self.loaded, len(record.tokens) - 1
        blocks = -(-length // self.block_size)
        cache = KVCache(blocks, self.block_size, loaded.shapes)
        scratch = Scratch(cache)
        sequence = scratch.sequence(record.tokens)
        wanted = [i - 1 for i in record.positions]
        found = []
        for start, stop in self._chunks(record, length):
            rows = [i - start for i in wanted if start <= i < stop]
            step = pack([scratch.next(sequence, stop - start)], self.block_size, loaded.device)
            step.sampled = torch.tensor(rows, dtype=torch.int64, device=loaded.device)
            found.append(run_packed(step, cache, loaded.forward, loaded.attend))
        return torch.cat(found)

    def _chunks(self, record: NodeRecord, length: int) -> list[tuple[int, int]]:
        edges = {edge for segment in record.segments for edge in (segment.start, segment.stop)}
        chunks, start = [], 0
        while start < length:
            edge = min((e for e in edges if start < e), default=length)
            stop = min(edge, start + self.step_tokens, length)
            chunks.append((start, stop))
            start = stop
        return chunks
