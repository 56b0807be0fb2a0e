"""Stages 05 and 06 on Hopper: decoding over chosen tokens, or over all of an FP8 cache.

Source: ``csrc/sm90/sparse_decode/``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.cuda.mla import LARGEST_SCALE, SMALLEST_SCALE
from flashmla.cuda.results import HEAD_DIM_V, empty_results
from flashmla.schedule import CHUNK, TILE

__all__ = [
    "dense_decode_fp8",
    "quick_sparse_decode",
    "sparse_decode",
    "splits_for",
    "supports_dense_decode_fp8",
    "supports_sparse_decode",
]

HEAD_DIM_QK = 576

ROWS = 64
"""Heads of one query that a CTA computes."""

LONGEST_SPLIT = 256
"""Parts that the merging kernel can join."""

START_OVERHEAD = 3.0
"""What starting a part costs a CTA, in tiles of 64 tokens."""

MERGE_OVERHEAD = 4.0
"""What merging partial results costs, however few, in tiles of 64 tokens."""

PARTIAL_OVERHEAD = 3.0 / 128
"""What one more partial result of 64 rows costs them all, in tiles of 64 tokens."""

FEW_ROWS = 16
"""Heads up to which the kernel for few rows reads a whole list faster than the other one would."""

FEW_ROWS_COST = 0.86
"""How long that takes it, relative to the other one."""

CACHE_SPAN = 16 << 32
"""Bytes of cache that a token's 32-bit offset in units of 16 can reach."""

MOST_ITEMS = 1 << 29


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q] float32) from q [b, s_q, h_q, 576], a cache
    [blocks, page, 1, 656 bytes or 576 numbers of q's dtype] and indices [b, s_q, topk]."""
    kernel = load().sparse_decode
    b, s_q, h_q, _ = q.shape
    out, lse = empty_results(q, b, s_q, h_q)
    splits = splits_for(b * s_q, h_q, indices.shape[2], _sms(q.device), is_fp8_kvcache)
    optional = topk_length, attn_sink, None, None, None, None
    results = out, lse, is_fp8_kvcache, splits, softmax_scale
    # The second time queries or lists were scattered, or began at no multiple of 16 bytes.
    if not kernel(q, k_cache, indices, *optional, *results):
        q = q.clone(memory_format=torch.contiguous_format)
        if not kernel(q, k_cache, indices.contiguous(), *optional, *results):
            raise RuntimeError(
                "flashmla: the kernel refuses a call that was checked; please report it"
            )
    return out, lse


def quick_sparse_decode() -> Callable[..., tuple[Tensor, Tensor] | None]:
    """Sparse decode of tensors that nobody has looked at, bound to the library as it is now.

    As with :func:`flashmla.cuda.mla.quick_dense_decode` the library checks everything in one go,
    and the result is None, with nothing launched, if the kernel cannot take the tensors as they
    are.
    """
    kernel = load().sparse_decode

    def run(
        q: Tensor,
        k_cache: Tensor,
        indices: Tensor,
        softmax_scale: float,
        is_fp8_kvcache: bool,
        topk_length: Tensor | None,
        attn_sink: Tensor | None,
        block_table: Tensor | None,
        cache_seqlens: Tensor | None,
        tile_scheduler_metadata: Tensor | None,
        num_splits: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        optional = (
            topk_length, attn_sink, block_table, cache_seqlens, tile_scheduler_metadata, num_splits
        )  # fmt: skip
        # No subclasses: they may stand for something else than memory.
        if not (type(q) is type(k_cache) is type(indices) is Tensor):
            return None
        for x in optional:
            if x is not None and type(x) is not Tensor:
                return None
        if indices.dim() != 3 or not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
            return None
        b, s_q, h_q, _ = q.shape
        if b * s_q * h_q == 0:
            return None
        out, lse = empty_results(q, b, s_q, h_q)
        splits = splits_for(b * s_q, h_q, indices.shape[2], _sms(q.device), is_fp8_kvcache)
        try:
            launched = kernel(
                q, k_cache, indices, *optional, out, lse, is_fp8_kvcache, splits, softmax_scale
            )
        except RuntimeError:  # what torch does not hand over: tensors on meta, sparse ones
            return None
        return (out, lse) if launched else None

    return run


def dense_decode_fp8(
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
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q] float32) from q [b, s_q, h_q, 576] in bfloat16 and
    an FP8 cache [blocks, page, 1, 656]."""
    b, s_q, h_q, d_qk = q.shape
    out, lse = empty_results(q, b, s_q, h_q)
    rows = q.reshape(b, s_q * h_q, d_qk)
    load().dense_decode_fp8(
        rows if _readable(rows) else rows.clone(memory_format=torch.contiguous_format),
        k_cache,
        block_table if block_table.stride(-1) == 1 else block_table.contiguous(),
        cache_seqlens.contiguous(),
        tile_scheduler_metadata,
        num_splits,
        q.new_empty(0, dtype=torch.float32) if attn_sink is None else attn_sink.contiguous(),
        out,
        lse,
        CHUNK,
        softmax_scale,
        causal,
    )
    return out, lse


@functools.cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def splits_for(queries: int, h_q: int, topk: int, sms: int, is_fp8: bool = True) -> int:
    """How many CTAs share the list of one query, so that all are done soonest.

    All lists count as equally long, so there is no plan: a card's rounds times what a CTA does in
    one, counted in tiles.
    """
    tiles = max(1, -(-topk // TILE))
    units = queries * -(-h_q // ROWS)
    filled = min(ROWS, -(-h_q // 16) * 16) / ROWS  # of a partial result's rows
    best, least = 1, float("inf")
    for splits in range(1, min(tiles, LONGEST_SPLIT, max(1, 2 * sms // units)) + 1):
        rounds = -(-units * splits // sms)
        cost = rounds * (-(-tiles // splits) + START_OVERHEAD)
        if splits > 1:
            cost += MERGE_OVERHEAD + PARTIAL_OVERHEAD * units * splits * filled
        elif is_fp8 and h_q <= FEW_ROWS:
            cost *= FEW_ROWS_COST
        if cost < least:
            best, least = splits, cost
    return best


def _readable(rows: Tensor) -> bool:
    """Whether 16 bytes at once can be read of each row."""
    return rows.data_ptr() % 16 == 0 and not any(stride % 8 for stride in rows.stride()[:2])


def supports_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; the kernel takes bfloat16 and float16"
    if is_fp8_kvcache and q.dtype != torch.bfloat16:
        return f"q is {q.dtype}; over an FP8 cache the kernel takes bfloat16"
    if q.shape[0] * q.shape[1] * -(-q.shape[2] // ROWS) >= MOST_ITEMS // LONGEST_SPLIT:
        return "more than 2 million queries"
    return _refused(q, k_cache, head_dim_v, softmax_scale)


def supports_dense_decode_fp8(
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
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}; over an FP8 cache the kernel takes bfloat16"
    if q.shape[0] * q.shape[1] * q.shape[2] >= 1 << 31:
        return "more than 2^31 query rows"
    return _refused(q, k_cache, head_dim_v, softmax_scale)


def _refused(q: Tensor, k_cache: Tensor, head_dim_v: int, softmax_scale: float) -> str | None:
    """What neither kernel takes, if the call has any of it."""
    if q.shape[-1] != HEAD_DIM_QK or head_dim_v != HEAD_DIM_V:
        return f"head sizes {q.shape[-1]}/{head_dim_v}; the kernel takes 576/512"
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return f"softmax_scale {softmax_scale}; the kernel takes 2^-125 to 2^125"
    if k_cache.shape[0] * k_cache.shape[1] == 0:
        return "k_cache has no tokens"
    page_bytes = k_cache.stride(0) * k_cache.element_size()
    if k_cache.data_ptr() % 16 or (k_cache.shape[0] > 1 and page_bytes % 16):
        return "k_cache's address or page stride is no multiple of 16 bytes"
    span = max(k_cache.shape[0] * page_bytes, k_cache[0].numel() * k_cache.element_size())
    if page_bytes < 0 or span > CACHE_SPAN:
        return "k_cache spans more than 64 GiB"
    return None
