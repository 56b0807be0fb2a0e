"""Stage 06 on Hopper: prefill over the tokens that indices name.

Source: ``csrc/sm90/sparse_prefill/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.cuda.mla import LARGEST_SCALE, SMALLEST_SCALE
from flashmla.cuda.results import HEAD_DIM_V

__all__ = ["sparse_prefill", "supports_sparse_prefill"]

MOST_HEADS = 128

KV_SPAN = 16 << 32
"""Bytes of kv that a token's 32-bit offset in units of 16 can reach."""

MOST_ROWS = 1 << 30
"""Query rows, s_q * h_q, that a call may have."""


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    lse_base_2: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [s_q, h_q, 512], max_logits and lse [s_q, h_q] float32) from q [s_q, h_q, 576 or 512],
    kv [s_kv, 1, d_qk] and indices [s_q, 1, topk]."""
    s_q, h_q, _ = q.shape
    out = q.new_empty(s_q, h_q, d_v)
    max_logits = q.new_empty(s_q, h_q, dtype=torch.float32)
    lse = torch.empty_like(max_logits)
    none = indices.new_empty(0)
    load().sparse_prefill(
        _aligned(q),
        kv[:, 0],
        indices[:, 0] if indices.stride(2) == 1 else indices[:, 0].contiguous(),
        none if topk_length is None else topk_length.contiguous(),
        none if attn_sink is None else attn_sink.contiguous(),
        out,
        max_logits,
        lse,
        sm_scale,
        lse_base_2,
    )
    return out, max_logits, lse


def _aligned(q: Tensor) -> Tensor:
    """q where 16 bytes can be read at once: as it is, or else a copy."""
    aligned = q.data_ptr() % 16 == 0 and q.stride(2) == 1 and not any(s % 8 for s in q.stride()[:2])
    return q if aligned else q.clone(memory_format=torch.contiguous_format)


def supports_sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    lse_base_2: bool,
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; the kernel takes bfloat16 and float16"
    if d_v != HEAD_DIM_V:
        return f"d_v is {d_v}; the kernel takes 512"
    if not 1 <= q.shape[1] <= MOST_HEADS:
        return f"{q.shape[1]} heads; the kernel takes 1 to {MOST_HEADS}"
    if not SMALLEST_SCALE <= sm_scale <= LARGEST_SCALE:
        return f"sm_scale {sm_scale}; the kernel takes 2^-125 to 2^125"
    if kv.data_ptr() % 16 or kv.stride(2) != 1 or (kv.shape[0] > 1 and kv.stride(0) % 8):
        return "kv's address or stride is no multiple of 16 bytes"
    span = kv.shape[0] * kv.stride(0) * kv.element_size()
    if not 0 <= span < KV_SPAN:
        return "kv spans 64 GiB or more"
    if q.shape[0] * q.shape[1] >= MOST_ROWS:
        return "more than 2^30 query rows"
    return None
