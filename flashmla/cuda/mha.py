"""Stage 01 on Hopper: dense prefill attention over sequences laid end to end.

Source: ``csrc/sm90/dense_prefill/``, ``csrc/sm90/dense_prefill_backward/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load

__all__ = ["backward", "forward"]

HEAD_DIMS = ((192, 128), (128, 128))
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-125, 2.0**125
ALIGNMENT = 8
"""What the copy engine wants of addresses and strides, in 16-bit elements (16 bytes)."""
TILE_QUERIES, COUNTERS = 64, 3  # in backward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out [total_q, h_q, 128], lse [total_q, h_q] float32); q, k and v bfloat16 or float16."""
    total_q, h_q, _ = q.shape
    if total_q == 0 or k.shape[0] == 0:
        out = q.new_zeros(total_q, h_q, v.shape[2])
        return out, q.new_full((total_q, h_q), float("inf"), dtype=torch.float32)
    out = q.new_empty(total_q, h_q, v.shape[2])
    lse = q.new_empty(total_q, h_q, dtype=torch.float32)
    tensors = _arguments(q, k, v, cu_seqlens_qo, cu_seqlens_kv, out, lse)
    load().mha_forward(*tensors, softmax_scale, causal)
    return out, lse


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, *results: Tensor
) -> tuple[Tensor, ...]:
    """What forward and backward begin with: these, as the kernels want them, then room for the
    plan of a call, 2 * batch + 4 numbers."""
    plain = (x.contiguous() for x in (cu_seqlens_qo, cu_seqlens_kv, *results))
    work = cu_seqlens_qo.new_empty(2 * cu_seqlens_qo.shape[0] + 2)
    return _fetchable(q), _fetchable(k), _fetchable(v), *plain, work


def _fetchable(x: Tensor) -> Tensor:
    """x itself if the copy engine takes its address and strides, as packed views have; or a copy.

    A stride of 0 says "the same again", which it does not take.
    """
    sizes = zip(x.shape[:-1], x.stride()[:-1])
    odd = any(size > 1 and (stride == 0 or stride % ALIGNMENT) for size, stride in sizes)
    if odd or x.stride(-1) != 1 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def supports_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; the kernel takes bfloat16 and float16"
    if (q.shape[2], v.shape[2]) not in HEAD_DIMS:
        return f"head sizes {q.shape[2]}/{v.shape[2]}; the kernel takes 192/128 and 128/128"
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return f"softmax_scale {softmax_scale}; the kernel takes 2^-125 to 2^125"
    return None


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), like q, k and v, from d_out [total_q, h_q, 128] and d_lse [total_q, h_q]."""
    total_q, h_q, d_qk = q.shape
    if total_q == 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tiles = total_q // TILE_QUERIES + cu_seqlens_qo.shape[0] + 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    per_query = q.new_empty(2, h_q, tiles, TILE_QUERIES, dtype=torch.float32)
    dq_sums = q.new_empty(h_q, tiles, TILE_QUERIES * d_qk, dtype=torch.float32)
    counters = q.new_empty(h_q, tiles, COUNTERS, dtype=torch.int32)
    load().mha_backward(
        *_arguments(q, k, v, cu_seqlens_qo, cu_seqlens_kv, out, lse),
        _fetchable(d_out),
        None if d_lse is None else d_lse.contiguous(),
        dq,
        dk,
        dv,
        per_query[0],
        per_query[1],
        dq_sums,
        counters,
        softmax_scale,
        causal,
        deterministic,
    )
    return _strided_like(q, dq), _strided_like(k, dk), _strided_like(v, dv)


def _strided_like(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides that torch.empty_like(x) has, as the operator promises."""
    like = torch.empty_like(x, device="meta")
    return gradient if like.is_contiguous() else torch.empty_like(x).copy_(gradient)


def supports_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    *rest: object,
) -> str | None:
    """None if the kernels take these arguments, else why not."""
    lengths = cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv
    return supports_forward(q, k, v, *lengths, softmax_scale, False)
