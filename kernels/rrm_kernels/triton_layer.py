"""A decoder layer's operations between its matrix products, in Triton: the counterpart of ``native.NativeLayer``.

Intermediate results are rounded to the tensors' dtype where transformers rounds them.
"""

import torch
import triton
import triton.language as tl

CHUNK = 1024  # elements that one program of an element-wise kernel computes


class TritonLayer:
    """The methods of ``native.NativeLayer`` for contiguous tensors in fp32, bf16 or fp16. Arguments are not checked.

    Nothing is stored for a negative slot, which marks padding.
    """

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """``out = rms_norm(x) * weight``; ``x`` and ``out`` ``[rows, width]``."""
        self._norm(x, None, weight, eps, out)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """``residual += x``, then ``out = rms_norm(residual) * weight``; all ``[rows, width]``."""
        self._norm(x, residual, weight, eps, out)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        rows, width = x.shape
        line = triton.next_power_of_2(width)
        warps = min(16, max(1, line // 512))
        _norm_kernel[(rows,)](
            x=x, residual=residual, weight=weight, out=out, eps=eps, WIDTH=width, LINE=line, num_warps=warps
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = silu(gate) * up``; ``gate_up`` ``[rows, 2 * width]``, ``out`` ``[rows, width]``."""
        rows, width = out.shape
        grid = (rows, triton.cdiv(width, CHUNK))
        _silu_kernel[grid](gate_up=gate_up, out=out, WIDTH=width, CHUNK=CHUNK)

    def rope_store(
        self,
        qkv: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> None:
        """Rotate queries into ``query`` and store rotated keys, and values, at ``slots`` of the caches.

        ``qkv`` ``[rows, (heads + 2 * kv heads) * width]``, ``query`` ``[rows, heads, width]``; ``norms`` the weights
        ``[width]`` of a per-head RMS norm of queries and keys, ``tables`` cos and sin, fp32 ``[positions, rotary / 2]``
        (half-split layout), ``positions`` and ``slots`` int64 ``[rows]``.
        """
        rows, heads, width = query.shape
        kv_heads, half = key_cache.shape[2], tables[0].shape[1]
        _rope_store_kernel[(rows, kv_heads)](
            qkv=qkv,
            q_norm=norms[0] if norms else None,
            k_norm=norms[1] if norms else None,
            cos=tables[0],
            sin=tables[1],
            positions=positions,
            slots=slots,
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            eps=eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            HALF=half,
            PADDED_PER_KV=triton.next_power_of_2(heads // kv_heads),
            PADDED_WIDTH=triton.next_power_of_2(width),
            PADDED_HALF=triton.next_power_of_2(half),
            PADDED_REST=triton.next_power_of_2(max(1, width - 2 * half)),
        )


@triton.jit
def _norm_kernel(x, residual, weight, out, eps, WIDTH: tl.constexpr, LINE: tl.constexpr):
    at = tl.arange(0, LINE)
    inside = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    line = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        line += tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
        total = line.to(residual.dtype.element_ty)
        tl.store(residual + row + at, total, mask=inside)
        line = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(line * line, 0) / WIDTH + eps)
    normed = (line * scale).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (normed * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_kernel(gate_up, out, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_store_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    query,
    key_cache,
    value_cache,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_PER_KV: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
):
    """The query heads of one kv head, its key and its value, of one token."""
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    line = qkv + token * (HEADS + 2 * KV_HEADS) * WIDTH
    dim = tl.arange(0, PADDED_HALF)
    position = tl.load(positions + token)
    c = tl.load(cos + position * HALF + dim, mask=dim < HALF, other=0.0)
    s = tl.load(sin + position * HALF + dim, mask=dim < HALF, other=0.0)

    nth = tl.arange(0, PADDED_PER_KV)
    head = kv_head * PER_KV + nth
    to = query + token * HEADS * WIDTH
    _norm_rotate(line, to, head, nth < PER_KV, q_norm, eps, c, s, WIDTH, HALF, PADDED_HALF, PADDED_REST)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    line += HEADS * WIDTH
    to = key_cache + slot * (KV_HEADS * WIDTH)
    one = tl.arange(0, 1)
    _norm_rotate(line, to, kv_head + one, one == 0, k_norm, eps, c, s, WIDTH, HALF, PADDED_HALF, PADDED_REST)
    at = tl.arange(0, PADDED_WIDTH)
    value = tl.load(line + (KV_HEADS + kv_head) * WIDTH + at, mask=at < WIDTH, other=0.0)
    tl.store(value_cache + (slot * KV_HEADS + kv_head) * WIDTH + at, value, mask=at < WIDTH)


@triton.jit
def _norm_rotate(
    source,
    destination,
    head,
    live,
    weight,
    eps,
    c,
    s,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
):
    """Normalise each head over its width if there is a ``weight``, rotate its first 2 * HALF, copy the rest."""
    dtype = destination.dtype.element_ty
    dim = tl.arange(0, PADDED_HALF)
    rest = 2 * HALF + tl.arange(0, PADDED_REST)
    at = head[:, None] * WIDTH + dim[None, :]
    at_rest = head[:, None] * WIDTH + rest[None, :]
    inside = live[:, None] & (dim < HALF)[None, :]
    inside_rest = live[:, None] & (rest < WIDTH)[None, :]
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(source + at_rest, mask=inside_rest, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(x * x, 1) + tl.sum(y * y, 1) + tl.sum(z * z, 1)
        scale = (1.0 / tl.sqrt(squares / WIDTH + eps))[:, None]
        wx = tl.load(weight + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        wy = tl.load(weight + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        wz = tl.load(weight + rest, mask=rest < WIDTH, other=0.0).to(tl.float32)[None, :]
        x = ((x * scale).to(dtype).to(tl.float32) * wx).to(dtype).to(tl.float32)
        y = ((y * scale).to(dtype).to(tl.float32) * wy).to(dtype).to(tl.float32)
        z = (z * scale).to(dtype).to(tl.float32) * wz
    first = (x * c[None, :]).to(dtype).to(tl.float32) - (y * s[None, :]).to(dtype).to(tl.float32)
    second = (y * c[None, :]).to(dtype).to(tl.float32) + (x * s[None, :]).to(dtype).to(tl.float32)
    tl.store(destination + at, first.to(dtype), mask=inside)
    tl.store(destination + at + HALF, second.to(dtype), mask=inside)
    tl.store(destination + at_rest, z.to(dtype), mask=inside_rest)
