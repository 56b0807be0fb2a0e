"""Stage 06 on Hopper, the part that chooses: the indexer's scores and exact top-k.

Source: ``csrc/sm90/indexer/``, ``csrc/sm90/topk/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load

__all__ = ["indexer_logits", "indexer_logits_paged", "topk"]

LARGEST_K = 2048
LONGEST_ROW = 1 << 18
HEADS = (32, 64)
"""What the kernels are made for; fewer heads are padded with some whose weight is 0."""
ALIGNMENT = 16
"""What the copy engine wants of addresses and strides, in bytes."""


def indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Scores float32 [s_q, s_kv] of keys k [s_kv, 128] for queries q [s_q, h, 128]."""
    logits = q.new_empty(q.shape[0], k.shape[0], dtype=torch.float32)
    q, weights = _padded_heads(q, weights)
    load().indexer_logits(
        _for_copy_engine(q),
        _for_copy_engine(k),
        _packed(k_scale),
        _packed(weights),
        _packed(start),
        _packed(end),
        logits,
    )
    return logits


def supports_indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    return _bad_heads(q.shape[1])


def indexer_logits_paged(
    q: Tensor, cache: Tensor, weights: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    """Scores float32 [b, s_q, max_blocks * 64] of cached keys for queries q [b, s_q, h, 128]."""
    b, s_q = q.shape[:2]
    logits = q.new_empty(b, s_q, block_table.shape[1] * cache.shape[1], dtype=torch.float32)
    q, weights = _padded_heads(q, weights)
    load().indexer_logits_paged(
        _for_copy_engine(q),
        cache,
        _packed(weights),
        _gapless(block_table),
        _packed(lengths),
        logits,
    )
    return logits


def supports_indexer_logits_paged(
    q: Tensor, cache: Tensor, weights: Tensor, block_table: Tensor, lengths: Tensor
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if cache.shape[0] == 0:
        return "cache has no pages"
    if cache.data_ptr() % ALIGNMENT or (cache.shape[0] > 1 and _bad_stride(cache.stride(0))):
        return "cache's address or the stride between its pages is no multiple of 16 bytes"
    return _bad_heads(q.shape[2])


def _bad_heads(heads: int) -> str | None:
    if not 1 <= heads <= HEADS[-1]:
        return f"{heads} heads; the kernel takes 1 to {HEADS[-1]}"
    return None


def _padded_heads(q: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., h, 128] and weights [..., h] with as many heads as a kernel is made for."""
    heads = q.shape[-2]
    missing = min(made for made in HEADS if made >= heads) - heads
    if missing == 0:
        return q, weights
    codes = torch.nn.functional.pad(q.view(torch.uint8), (0, 0, 0, missing))
    return codes.view(q.dtype), torch.nn.functional.pad(weights, (0, missing))


def _for_copy_engine(x: Tensor) -> Tensor:
    """Bytes [..., 128] with strides and address that the copy engine takes; x itself if it can."""
    bad = any(_bad_stride(n) for size, n in zip(x.shape[:-1], x.stride()[:-1]) if size > 1)
    bad = bad or x.stride(-1) != 1 or x.data_ptr() % ALIGNMENT != 0
    return x.clone(memory_format=torch.contiguous_format) if bad else x


def _bad_stride(stride: int) -> bool:
    """The copy engine does not take odd strides, nor 0, which says "the same again"."""
    return stride == 0 or stride % ALIGNMENT != 0


def _packed(x: Tensor) -> Tensor:
    """x without gaps and aligned; itself if it is so already."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def topk(
    logits: Tensor, k: int, lengths: Tensor | None, block_table: Tensor | None, page: int
) -> Tensor:
    """Positions int32 [rows, k] of the k largest of each row of logits [rows, n]."""
    out = logits.new_empty(logits.shape[0], k, dtype=torch.int32)
    if lengths is not None:
        lengths = lengths.contiguous()
    if block_table is not None:
        block_table = _gapless(block_table)
    load().topk(_gapless(logits), lengths, block_table, page, out)
    return out


def _gapless(x: Tensor) -> Tensor:
    """x with its last dimension without gaps; itself if it is so already."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def supports_topk(
    logits: Tensor, k: int, lengths: Tensor | None, block_table: Tensor | None, page: int
) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if k > LARGEST_K:
        return f"k is {k}; the kernel takes up to {LARGEST_K}"
    if logits.shape[1] > LONGEST_ROW:
        return f"rows of {logits.shape[1]} logits; the kernel takes up to {LONGEST_ROW}"
    return None
