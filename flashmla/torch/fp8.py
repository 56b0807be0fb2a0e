"""The FP8 cache format in torch: pack, unpack, append."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.fp8 import (
    BYTES_PER_TOKEN,
    E4M3_MAX,
    INDEX_DIM,
    INDEX_PAGE,
    NOPE_DIM,
    ROPE_OFFSET,
    SCALES_OFFSET,
    SMALLEST_MAXIMUM,
    TILE_DIM,
)
from flashmla.torch import mla, paged_kv

__all__ = ["append", "dense_decode", "index_append", "index_pack", "pack", "quantise", "unpack"]

_E4M3_NAN, _BF16_NAN, _FLOAT_NAN = 0x7F, 0x7FC0, 0x7FC00000


@torch.no_grad()
def pack(x: Tensor, power_of_two: bool) -> Tensor:
    """[tokens, 576] -> uint8 [tokens, 656]."""
    codes, scales = quantise(x[:, :NOPE_DIM], power_of_two)
    rope = x[:, NOPE_DIM:]
    # Conversions differ in what becomes of a NaN's sign and payload, so none is left to them.
    bits = rope.to(torch.bfloat16).view(torch.int16).masked_fill(rope.isnan(), _BF16_NAN)
    return torch.cat([codes, scales.view(torch.uint8), bits.view(torch.uint8)], dim=1)


def quantise(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[tokens, n * 128] -> codes uint8 [tokens, n * 128], scales float32 [tokens, n]."""
    tiles = x.float().unflatten(-1, (-1, TILE_DIM))
    maximum = tiles.abs().amax(-1)
    lost = ~maximum.isfinite()
    maximum = maximum.masked_fill(lost, 1.0).clamp(min=SMALLEST_MAXIMUM)
    # Divide by a tensor: on a GPU torch multiplies by the reciprocal of a number.
    scales = maximum / torch.full_like(maximum, E4M3_MAX)
    if power_of_two:
        scales = _round_up_to_power_of_two(scales)
    quotients = (tiles / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    codes = quotients.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(lost.unsqueeze(-1), _E4M3_NAN).flatten(-2)
    return codes, scales.view(torch.int32).masked_fill(lost, _FLOAT_NAN).view(torch.float32)


def _round_up_to_power_of_two(scales: Tensor) -> Tensor:
    """Exact for positive normal float32: carry the mantissa into the exponent, then drop it."""
    bits = scales.view(torch.int32)
    return ((bits + 0x007FFFFF) & 0x7F800000).view(torch.float32)


@torch.no_grad()
def unpack(cache: Tensor) -> Tensor:
    """[..., 656] of one-byte elements -> float32 [..., 576]."""
    cache = cache.view(torch.uint8)
    codes = cache[..., :SCALES_OFFSET].view(torch.float8_e4m3fn).float()
    scales = cache[..., SCALES_OFFSET:ROPE_OFFSET].contiguous().view(torch.float32)
    rope = cache[..., ROPE_OFFSET:BYTES_PER_TOKEN].contiguous().view(torch.bfloat16).float()
    values = codes.unflatten(-1, (-1, TILE_DIM)) * scales.unsqueeze(-1)
    return torch.cat([values.flatten(-2), rope], dim=-1)


@torch.no_grad()
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
    """As :func:`flashmla.torch.mla.dense_decode`, over a cache [blocks, page, 1, 656]."""
    return mla.attend_to_pages(
        q, k_cache.view(torch.uint8), block_table, cache_seqlens, head_dim_v,
        tile_scheduler_metadata, num_splits, softmax_scale, causal, attn_sink, unpack,
    )  # fmt: skip


@torch.no_grad()
def append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write packed tokens into the slots of a cache [blocks, page, 1, 656], in place."""
    paged_kv.append(cache.view(torch.uint8), slots, pack(x, True).unsqueeze(1))


@torch.no_grad()
def index_pack(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[tokens, 128] -> codes float8_e4m3fn [tokens, 128], scales float32 [tokens]."""
    codes, scales = quantise(x, power_of_two)
    return codes.view(torch.float8_e4m3fn), scales.squeeze(-1)


@torch.no_grad()
def index_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write packed keys into the slots of a cache [blocks, 64, 1, 132], in place."""
    codes, scales = quantise(x, True)
    pages = cache.view(torch.uint8).flatten(1)  # [blocks, 64 * 128 codes, then 64 scales]
    parts = pages.split_with_sizes((INDEX_PAGE * INDEX_DIM, INDEX_PAGE * 4), dim=1)
    for part, rows in zip(parts, (codes, scales.view(torch.uint8)), strict=True):
        paged_kv.append(part.unflatten(1, (INDEX_PAGE, -1)), slots, rows)
