"""Stages 02 and 03 on Hopper: dense decoding over the paged latent cache.

Source: ``csrc/sm90/dense_decode/``, ``csrc/sm90/combine.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.schedule import MAX_PARTS, METADATA_COLUMNS, max_slots

__all__ = ["dense_decode", "try_dense_decode"]

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
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q] float32) from q [b, s_q, h_q, d_qk] and a cache
    [blocks, page, h_kv, d_qk], both bfloat16 or float16."""
    arguments = (k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits)
    results = _launch(q, q, *arguments, softmax_scale, causal, attn_sink)
    if results is None:  # q's rows are scattered, or begin at no multiple of 16 bytes
        rows = _packed_rows(q, k_cache.shape[2])
        results = _launch(q, rows, *arguments, softmax_scale, causal, attn_sink)
    if results is None:
        raise RuntimeError("flashmla: the kernel refuses a call that was checked; please report it")
    return results


def try_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """The same from tensors that nobody has looked at: the library checks them in one go.

    None, and nothing is launched, if they are not what the kernel takes as it is; then the caller
    has to find out what is wrong, if anything.
    """
    for tensor in (q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits):
        if type(tensor) is not Tensor:
            return None
    if attn_sink is not None and type(attn_sink) is not Tensor:
        return None
    sizes = (q.dim(), k_cache.dim(), block_table.dim(), tile_scheduler_metadata.dim())
    if sizes != (4, 4, 2, 2) or tile_scheduler_metadata.shape[0] > MAX_PARTS:
        return None
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return None
    return _launch(
        q, q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits,
        softmax_scale, causal, attn_sink,
    )  # fmt: skip


def _launch(
    q: Tensor,
    rows: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """rows is q, or q's rows packed. Results are allocated here and checked with the rest."""
    b, s_q, h_q, _ = q.shape
    # As methods and with sizes one by one, which is how torch is quickest.
    out = q.new_empty(b, s_q, h_q, HEAD_DIM_V)
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    room = block_table.shape[1] * k_cache.shape[1]
    launched = load().dense_decode(
        rows, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink,
        out, lse, max_slots(tile_scheduler_metadata.shape, b, room), softmax_scale, causal,
    )  # fmt: skip
    return (out, lse) if launched else None


def _packed_rows(q: Tensor, h_kv: int) -> Tensor:
    """A copy of q as [b * h_kv, s_q * group, d_qk]: the rows that share a KV head, side by side."""
    b, s_q, h_q, d = q.shape
    rows = q.view(b, s_q, h_kv, h_q // h_kv, d).transpose(1, 2)
    return rows.clone(memory_format=torch.contiguous_format).view(b * h_kv, -1, d)


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
    attn_sink: Tensor | None = None,
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; the kernel takes bfloat16 and float16"
    page, d_qk = k_cache.shape[1], q.shape[-1]
    if head_dim_v != HEAD_DIM_V:
        return f"head_dim_v is {head_dim_v}; the kernel takes {HEAD_DIM_V}"
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return f"softmax_scale {softmax_scale}; the kernel takes 2^-125 to 2^125"
    if k_cache.shape[0] == 0:
        return "k_cache has no pages"
    if k_cache.data_ptr() % 16 or _bad_strides(k_cache):
        return "k_cache's address or strides are no positive multiples of 16 bytes"
    refused = load().dense_decode_refuses(
        page, d_qk, attn_sink is not None, tile_scheduler_metadata.shape[1] > METADATA_COLUMNS
    )
    if refused:
        return f"the kernel does not take {refused} (page size {page}, head sizes {d_qk}/512)"
    return None
