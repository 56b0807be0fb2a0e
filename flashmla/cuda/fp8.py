"""Stage 05 on Hopper: writing and reading the FP8 cache, and decoding over it.

Source: ``csrc/sm90/fp8_cache/``, ``csrc/sm90/sparse_decode/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.cuda.paged_kv import aligned_rows, misplaced
from flashmla.cuda.sparse import dense_decode_fp8 as dense_decode
from flashmla.cuda.sparse import supports_dense_decode_fp8 as supports_dense_decode
from flashmla.fp8 import BYTES_PER_TOKEN, HEAD_DIM

__all__ = [
    "append",
    "dense_decode",
    "index_append",
    "index_pack",
    "pack",
    "supports_dense_decode",
    "unpack",
]


def pack(x: Tensor, power_of_two: bool) -> Tensor:
    """[tokens, 576] -> uint8 [tokens, 656]."""
    packed = x.new_empty(x.shape[0], BYTES_PER_TOKEN, dtype=torch.uint8)
    load().fp8_pack(aligned_rows(x), packed, power_of_two)
    return packed


def unpack(cache: Tensor) -> Tensor:
    """[..., 656] of one-byte elements -> float32 [..., 576]."""
    lead = cache.shape[:-1]
    while cache.dim() < 3:
        cache = cache.unsqueeze(0)
    rows = cache.flatten(1, -2)  # [outer, inner, 656], a view where only pages lie apart
    if misplaced(rows):
        rows = rows.clone(memory_format=torch.contiguous_format)
    out = rows.new_empty(rows.shape[0] * rows.shape[1], HEAD_DIM, dtype=torch.float32)
    load().fp8_unpack(rows, out)
    return out.view(*lead, HEAD_DIM)


def append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Quantise x [n, 576] into the slots [n] of a cache [blocks, page, 1, 656], in place."""
    load().fp8_append(cache, slots, aligned_rows(x))


def supports_append(cache: Tensor, slots: Tensor, x: Tensor) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if misplaced(cache):
        return "cache's tokens do not lie at multiples of 16 bytes"
    return None


def index_pack(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[tokens, 128] -> codes float8_e4m3fn [tokens, 128], scales float32 [tokens]."""
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    load().index_pack(aligned_rows(x), codes, scales, power_of_two)
    return codes, scales


def index_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Quantise x [n, 128] into the slots [n] of a cache [blocks, 64, 1, 132], in place."""
    load().index_append(cache, slots, aligned_rows(x))


def supports_index_append(cache: Tensor, slots: Tensor, x: Tensor) -> str | None:
    """None if the kernel takes these arguments, else why not."""
    if misplaced(cache, 1):
        return "cache's pages do not lie at multiples of 16 bytes"
    return None
