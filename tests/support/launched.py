"""Models on emulated GPUs, and kernels that are launched as Triton's are and computed by the torch references.

Triton's interpreter runs the real ones, a hundred times slower; ``test_emulated_cuda`` does so once.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_cuda import Emulation
from oracle import engine_for
from rrm_kernels.batch import PagedBatch, Scores
from rrm_kernels.reference_layer import ReferenceLayer, ReferenceRagged
from rrm_kernels.triton_attention import TritonAttention

from rrm_engine.engine.engine import Engine
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.models import attention, lean


def launch_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA use these kernels from now on."""
    monkeypatch.setattr(lean, "load_triton_layer", lambda device: LaunchedLayer())
    monkeypatch.setattr(attention, "load_triton", lambda device: TritonAttention(launched_attention, None))


class LaunchedLayer:
    """The kernels of a layer, launched: what they compute is what the torch references do."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: Emulation.current.kernel(getattr(ReferenceLayer(), name), *given)


def launched_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, scores: Scores
) -> torch.Tensor:
    names = ("query_start", "context_len", "num_seqs", "block_table")
    arrays = {name: getattr(batch, name) for name in names}
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    Emulation.current.kernel(reference_attention, out, query, keys, values, arrays, scores)
    return out


def reference_attention(out: torch.Tensor, query: Any, keys: Any, values: Any, arrays: Any, scores: Scores) -> None:
    batch: Any = SimpleNamespace(**arrays)
    out.copy_(ReferenceRagged()(query, keys, values, batch, scores))


def on_cuda(plain: Any, devices: int = 1, first: int = 0) -> LoadedModel:
    """``plain`` with its layers spread evenly over devices."""
    count = plain.config.num_hidden_layers
    layers = [torch.device("cuda", first + i * devices // count) for i in range(count)]
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    return prepare_model(copy.deepcopy(plain), tokenizer, plain.config.model_type, layers[0], "auto", layers)


def engine_on(model: LoadedModel, eager: bool = False, **changes: Any) -> Engine:
    return engine_for(model, eager=eager, **changes)
