"""A decoder's forward pass without modules, for layers built like Llama's: four matrix products and five kernels each.

transformers' own forward spends more time in Python than a small model's matrix products take. This runs the same
operations on the same (fused) weights, in the same order and with the same roundings. The check at load compares it
with the plain model, and models that are not recognised keep transformers' forward.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from rrm_kernels.batch import PagedAttention, Scores
from rrm_kernels.native import DTYPES, NativeAttention, NativeLayer, NativeUnavailable, load_native_layer
from rrm_kernels.native_decoder import DecoderLayer, NativeDecoder, Norm
from rrm_kernels.products import NativeLinear
from rrm_kernels.triton_attention import TritonAttention, TritonUnavailable, load_triton_layer
from torch import nn

from rrm_engine.device.transfer import hand_over
from rrm_engine.kv.cache import KVCache, LayerShape
from rrm_engine.models.attention import PagedForward
from rrm_engine.models.fuse import FusedRMSNorm, MergedPart, PackedLinear

if TYPE_CHECKING:
    from rrm_kernels.triton_layer import TritonLayer

# Models whose layers are: norm, attention, add, norm, gated SiLU MLP, add; with one RoPE, half-split.
MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LEAST_POSITIONS = 256  # that the RoPE tables are made for at first

Linear = PackedLinear | nn.Linear
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights; ``norms`` are the weights of its query and key norms, if it has any."""

    index: int
    shape: LayerShape
    heads: int
    scores: Scores
    input_norm: FusedRMSNorm
    qkv: Linear
    norms: tuple[torch.Tensor, torch.Tensor] | None
    norm_eps: float
    output: Linear
    mlp_norm: FusedRMSNorm
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class Stage:
    """Consecutive layers on one device. ``norms`` are the layers' input norms, in the last stage also the model's final
    norm. The first stage has the ``embedding``, the last one the ``head``.

    ``in_one_call``: the compiled kernels run all layers of a step of decodes in one call. Without it they are called
    one by one, so that a profile can name them.
    """

    in_one_call: ClassVar[bool] = True

    device: torch.device
    kernels: "NativeLayer | TritonLayer"
    layers: list[Layer] = field(default_factory=list)
    norms: list[FusedRMSNorm] = field(default_factory=list)
    tables: Tables = (torch.empty(0), torch.empty(0))
    embedding: torch.Tensor | None = None
    head: Linear | None = None
    decoders: WeakKeyDictionary[KVCache, NativeDecoder | None] = field(default_factory=WeakKeyDictionary)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        sampled: torch.Tensor,
        hidden: torch.Tensor | None,
        paged: PagedForward,
    ) -> torch.Tensor:
        """The logits of the rows ``sampled``, or for the next stage the hidden states ``[tokens, hidden]``.

        All tensors are on its device. ``hidden`` is what the stage before returned, and is overwritten.
        """
        hidden = self.embedding[token_ids] if self.embedding is not None else hidden
        assert hidden is not None
        normed = self._run(hidden, positions, paged)
        return hidden if self.head is None else self.head(normed[sampled])

    def _run(self, residual: torch.Tensor, positions: torch.Tensor, paged: PagedForward) -> torch.Tensor:
        kernels, slots = self.kernels, paged.batch.slots
        normed = torch.empty_like(residual)
        if (decoder := self._decoder(len(residual), paged)) is not None:
            kernels.norm(residual, self.norms[0].weight, self.norms[0].eps, normed)
            decoder(residual, normed, self.tables, positions, paged.batch)
            return normed
        query = residual.new_empty(len(residual), self.layers[0].heads, self.layers[0].shape.key_width)
        gated = residual.new_empty(len(residual), self.layers[0].down.in_features)
        if paged.exchange is not None:
            residual.copy_(paged.exchange("inputs", self.layers[0].index, residual[None])[0])
        kernels.norm(residual, self.norms[0].weight, self.norms[0].eps, normed)
        for layer, norm in zip_longest(self.layers, self.norms[1:]):
            keys, values = paged.cache.pools(layer.index, layer.shape)
            qkv = layer.qkv(normed)
            kernels.rope_store(qkv, layer.norms, layer.norm_eps, self.tables, positions, slots, query, keys, values)
            mixed = paged.attention(layer.index, query, keys, values, layer.scores)
            kernels.add_norm(
                layer.output(mixed.flatten(1)), residual, layer.mlp_norm.weight, layer.mlp_norm.eps, normed
            )
            kernels.silu_mul(layer.gate_up(normed), gated)
            if norm is None:  # the next stage has it
                residual += layer.down(gated)
            else:
                kernels.add_norm(layer.down(gated), residual, norm.weight, norm.eps, normed)
                if paged.exchange is not None:
                    residual.copy_(paged.exchange("inputs", layer.index + 1, residual[None])[0])
                    kernels.norm(residual, norm.weight, norm.eps, normed)
        return normed

    def _decoder(self, rows: int, paged: PagedForward) -> NativeDecoder | None:
        """What runs all layers of this step in one call; None where it has prompts, or the kernels lack a part."""
        one_by_one = not self.in_one_call or paged.exchange is not None or paged.batch.decodes < rows
        if one_by_one or not isinstance(paged.attend, NativeAttention):
            return None
        if paged.cache not in self.decoders:
            self.decoders[paged.cache] = _native_decoder(self, paged.cache)
        return self.decoders[paged.cache]


class LeanForward:
    """A ``Forward``: packed tokens in, logits of the sampled rows out. On CUDA it never waits for the device.

    With Triton's kernels (``skips_padding``) a row with a negative slot and no sequence is padding: it stores nothing,
    and its output is undefined. ``stages`` are the forward's parts, one for each device.
    """

    def __init__(self, model: Any, stages: list[Stage]) -> None:
        inner = model.model
        self.stages = stages
        self._rotary = inner.rotary_emb
        for stage in stages:
            stage.norms = [layer.input_norm for layer in stage.layers]
        stages[-1].norms.append(inner.norm)
        stages[-1].head = model.lm_head
        self._embedding = stages[0].embedding = inner.embed_tokens.weight.detach()
        self._reserved = 0
        self.reserve(LEAST_POSITIONS)
        self.skips_padding = not any(isinstance(stage.kernels, NativeLayer) for stage in stages)

    def reserve(self, positions: int) -> None:
        """Make the stages' ``tables``, cos and sin of RoPE, cover at least that many positions."""
        if positions > self._reserved:
            self._reserved = max(positions, 2 * self._reserved)
            tables = self._rotation(self._reserved)
            for stage in self.stages:
                stage.tables = tables[0].to(stage.device), tables[1].to(stage.device)

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, paged: PagedForward
    ) -> torch.Tensor:
        assert paged.batch.longest > 0  # else the RoPE tables might not cover all positions
        self.reserve(paged.batch.longest)
        out = None
        for stage in self.stages:
            device = stage.device
            out = out if out is None else hand_over(out, device)
            there = replace(paged, batch=paged.batch_on(device)) if len(self.stages) > 1 else paged
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                out = stage(token_ids, paged.bring(positions, device), paged.bring(sampled, device), out, there)
        assert out is not None
        return out

    def _rotation(self, count: int) -> Tables:
        """cos and sin of the first ``count`` positions, fp32 ``[count, rotary / 2]``, rounded as in the model."""
        cos, sin = self._rotary(self._embedding, torch.arange(count, device=self._embedding.device)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def lean_forward(model: Any, devices: Sequence[torch.device], attend: PagedAttention) -> LeanForward | None:
    """The lean forward of a fused model, or None where its class, dtype or a device is not supported.

    ``devices`` are those of its layers. Kernels are the compiled ones on CPU, and Triton's on CUDA and where the
    attention is Triton's.
    """
    if type(model).__name__ not in MODELS or model.dtype not in (*DTYPES, torch.float16):
        return None
    if model.dtype == torch.float16 and any(device.type == "cpu" for device in devices):
        return None
    stages: list[Stage] = []
    for index, (module, device) in enumerate(zip(model.model.layers, devices, strict=True)):
        layer = _layer(index, module, model, device)
        if layer is None:
            return None
        if not stages or stages[-1].device != device:
            try:
                stages.append(Stage(device, _kernels(device, attend)))
            except (NativeUnavailable, TritonUnavailable):
                return None
        stages[-1].layers.append(layer)
    ends_known = _rounds_before_weight(model.model.norm, model.dtype) and _plain(model.lm_head)
    return LeanForward(model, stages) if ends_known else None


def _kernels(device: torch.device, attend: PagedAttention) -> "NativeLayer | TritonLayer":
    """Raises NativeUnavailable or TritonUnavailable."""
    on_triton = device.type != "cpu" or isinstance(attend, TritonAttention)
    return load_triton_layer(device) if on_triton else load_native_layer()


def _native_decoder(stage: Stage, cache: KVCache) -> NativeDecoder | None:
    """The stage's layers over that cache, if the model ends with them and all their products are compiled ones."""
    if not isinstance(stage.kernels, NativeLayer) or len(stage.norms) == len(stage.layers):
        return None
    layers = []
    for layer, norm in zip(stage.layers, stage.norms[1:], strict=True):
        linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
        products = [linear.product for linear in linears if isinstance(linear, PackedLinear)]
        native = [p for p in products if isinstance(p, NativeLinear) and p.library is stage.kernels.library]
        if len(native) < len(linears):
            return None
        qkv, output, gate_up, down = native
        norms = layer.norms and (Norm(layer.norms[0], layer.norm_eps), Norm(layer.norms[1], layer.norm_eps))
        mlp_norm, next_norm = Norm(layer.mlp_norm.weight, layer.mlp_norm.eps), Norm(norm.weight, norm.eps)
        pools = cache.pools(layer.index, layer.shape)
        layers.append(
            DecoderLayer(
                qkv, norms, layer.heads, layer.scores, *pools, output, mlp_norm, gate_up, down, next_norm=next_norm
            )
        )
    return NativeDecoder(stage.kernels.library, layers)


def _plain(module: Any) -> bool:
    """A linear layer without hooks."""
    return isinstance(module, PackedLinear) or (type(module) is nn.Linear and not hasattr(module, "_hf_hook"))


def _rounds_before_weight(norm: Any, dtype: torch.dtype) -> bool:
    """Whether the kernels compute this norm: see ``FusedRMSNorm``."""
    return isinstance(norm, FusedRMSNorm) and norm.weight.dtype == dtype


def _layer(index: int, module: Any, model: Any, device: torch.device) -> Layer | None:
    attention, mlp, config = module.self_attn, module.mlp, model.config
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    parts = (module.input_layernorm, module.post_attention_layernorm, *norms)
    linears = (attention.o_proj, mlp.down_proj)
    merged = (attention.q_proj, mlp.gate_proj)
    whole = (
        all(_rounds_before_weight(part, model.dtype) for part in parts)
        and all(map(_plain, linears))
        and all(isinstance(part, MergedPart) for part in merged)
        and config.hidden_act == "silu"
    )
    if not whole:
        return None
    width = attention.head_dim
    kv_heads = attention.k_proj.out_features // width
    mistral = "Mistral" in type(model).__name__
    window = config.sliding_window if mistral else getattr(attention, "sliding_window", None)
    return Layer(
        index=index,
        shape=LayerShape(kv_heads, width, width, model.dtype, device),
        heads=attention.q_proj.out_features // width,
        scores=Scores(attention.scaling, window),
        input_norm=module.input_layernorm,
        qkv=attention.q_proj.merged,
        norms=(norms[0].weight, norms[1].weight) if norms else None,
        norm_eps=norms[0].eps if norms else 0.0,
        output=attention.o_proj,
        mlp_norm=module.post_attention_layernorm,
        gate_up=mlp.gate_proj.merged,
        down=mlp.down_proj,
    )
