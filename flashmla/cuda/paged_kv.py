"""Stage 03 on Hopper: writing tokens into the paged cache.

Source: ``csrc/sm90/fp8_cache/append.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load

__all__ = ["append"]

ALIGNMENT = 16
"""Bytes that the kernels read and write at once."""


def append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write x [n, h_kv, d] into the slots [n] of a cache [blocks, page, h_kv, d], in place."""
    heads_packed = x.shape[1] <= 1 or x.stride(1) == x.shape[2]
    load().paged_append(cache, slots, aligned_rows(x if heads_packed else x.contiguous()))


def supports_append(cache: Tensor, slots: Tensor, x: Tensor) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    width = cache.shape[2] * cache.shape[3] * cache.element_size()
    if width % ALIGNMENT:
        return f"a token has {width} bytes, no multiple of {ALIGNMENT}"
    if misplaced(cache):
        return f"cache's tokens do not lie at multiples of {ALIGNMENT} bytes"
    return None


def aligned_rows(x: Tensor) -> Tensor:
    """x itself if each of its tokens can be read in pieces of 16 bytes, else a copy."""
    return x.clone(memory_format=torch.contiguous_format) if misplaced(x, 1) else x


def misplaced(x: Tensor, dims: int = 2) -> bool:
    """Whether the first dimensions of x lead to addresses that are no multiples of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % ALIGNMENT != 0 or any(
        x.shape[dim] > 1 and x.stride(dim) * size % ALIGNMENT for dim in range(dims)
    )
