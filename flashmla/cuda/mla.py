"""Stages 02 and 03 on Hopper: dense decoding over the paged latent cache.

Source: ``csrc/sm90/dense_decode/``; ``csrc/sm90/combine.cu`` merges what the kernel cannot merge by
itself, batch-invariant plans above all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.cuda.results import HEAD_DIM_V, empty_results
from flashmla.schedule import CHUNK

__all__ = ["PAGE_SIZES", "dense_decode", "quick_dense_decode"]

PAGE_SIZES = (16, 32, 64, 128, 256)
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
    kernel = load().dense_decode
    b, s_q, h_q, _ = q.shape
    out, lse = empty_results(q, b, s_q, h_q)
    arguments = (
        k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink,
        out, lse, CHUNK, softmax_scale, causal,
    )  # fmt: skip
    # The second time q's rows were scattered, or began at no multiple of 16 bytes.
    if not kernel(q, *arguments) and not kernel(_packed_rows(q, k_cache.shape[2]), *arguments):
        raise RuntimeError("flashmla: the kernel refuses a call that was checked; please report it")
    return out, lse


def quick_dense_decode() -> Callable[..., tuple[Tensor, Tensor] | None]:
    """Dense decode of tensors that nobody has looked at, bound to the library as it is now.

    The library checks everything in one go. The result is None, and nothing is launched, if
    the kernel cannot take the tensors as they are; what is wrong, if anything, somebody else has to
    find out.
    """
    kernel = load().dense_decode

    def run(
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
        # No subclasses: they may stand for something else than memory.
        if not (
            type(q) is type(k_cache) is type(block_table) is type(cache_seqlens)
            is type(tile_scheduler_metadata) is type(num_splits) is Tensor
        ) or (attn_sink is not None and type(attn_sink) is not Tensor):  # fmt: skip
            return None
        if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
            return None
        b, s_q, h_q, _ = q.shape
        out, lse = empty_results(q, b, s_q, h_q)
        try:
            launched = kernel(
                q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits,
                attn_sink, out, lse, CHUNK, softmax_scale, causal,
            )  # fmt: skip
        except RuntimeError:  # what torch does not hand over: tensors on meta, sparse ones
            return None
        return (out, lse) if launched else None

    return run


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
    if head_dim_v != HEAD_DIM_V:
        return f"head_dim_v is {head_dim_v}; the kernel takes {HEAD_DIM_V}"
    if not SMALLEST_SCALE <= softmax_scale <= LARGEST_SCALE:
        return f"softmax_scale {softmax_scale}; the kernel takes 2^-125 to 2^125"
    if k_cache.shape[0] == 0:
        return "k_cache has no pages"
    if k_cache.data_ptr() % 16 or _bad_strides(k_cache):
        return "k_cache's address or strides are no positive multiples of 16 bytes"
    if k_cache.shape[1] not in PAGE_SIZES:
        return f"pages of {k_cache.shape[1]} tokens; the kernel takes {PAGE_SIZES}"
    return None
