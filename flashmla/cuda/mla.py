"""Stages 02 and 03 on Hopper: dense decoding over the paged latent cache.

Source: ``csrc/sm90/dense_decode/``, ``csrc/sm90/combine.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load

__all__ = ["dense_decode"]

PAGE = 64
HEAD_DIM_QK = 576
HEAD_DIM_V = 512
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-125, 2.0**125
ALIGNMENT = 8
"""What the copy engine wants of addresses and strides, in 16-bit elements (16 bytes)."""


def dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q] float32) from q [b, s_q, h_q, 576] and a cache
    [blocks, 64, h_kv, 576], both bfloat16 or float16."""
    b, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    rows = s_q * (h_q // h_kv)
    slots = b + tile_scheduler_metadata.shape[0]
    out = q.new_empty(b, s_q, h_q, head_dim_v)
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    partial = q.new_empty(slots * h_kv * rows * (head_dim_v + 1), dtype=torch.float32)
    out_partial, lse_partial = partial.split_with_sizes(
        (slots * h_kv * rows * head_dim_v, slots * h_kv * rows)
    )
    load().dense_decode(
        _packed_rows(q, h_kv),
        k_cache,
        block_table,
        cache_seqlens,
        tile_scheduler_metadata,
        num_splits,
        out,
        lse,
        out_partial.view(slots, -1),
        lse_partial.view(slots, -1),
        softmax_scale,
        causal,
    )
    return out, lse


def _packed_rows(q: Tensor, h_kv: int) -> Tensor:
    """q as [b * h_kv, s_q * group, 576]: the rows that share a KV head, side by side.

    With one KV head, as MLA has, that is a view of a contiguous q; else a copy.
    """
    b, s_q, h_q, d = q.shape
    if h_kv > 1:
        q = q.view(b, s_q, h_kv, h_q // h_kv, d).transpose(1, 2)
    rows = q.reshape(b * h_kv, -1, d)
    aligned = rows.data_ptr() % 16 == 0 and not _bad_strides(rows)
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _bad_strides(x: Tensor) -> list[int]:
    """Strides that the copy engine does not take: odd ones, and 0, which says "the same again"."""
    sizes = zip(x.shape[:-1], x.stride()[:-1])
    return [stride for size, stride in sizes if size > 1 and (stride == 0 or stride % ALIGNMENT)]


def supports_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; the kernel takes bfloat16 and float16"
    if q.shape[-1] != HEAD_DIM_QK or head_dim_v != HEAD_DIM_V:
        return f"head sizes {q.shape[-1]}/{head_dim_v}; the kernel takes 576/512"
    if k_cache.shape[1] != PAGE:
        return f"page size {k_cache.shape[1]}; the kernel takes {PAGE}"
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return f"softmax_scale {softmax_scale}; the kernel takes 2^-125 to 2^125"
    if k_cache.shape[0] == 0:
        return "k_cache has no pages"
    if k_cache.data_ptr() % 16 or _bad_strides(k_cache):
        return "k_cache's address or strides are no positive multiples of 16 bytes"
    return None
