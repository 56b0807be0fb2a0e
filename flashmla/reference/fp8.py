"""Stage 05: the FP8 cache format of 656 bytes a token, in NumPy.

    bytes 0-511     512 float8_e4m3 codes: the NoPE part, a value is code · scale
    bytes 512-527   4 float32 scales, one for each tile of 128 values
    bytes 528-655   64 bfloat16 values: the RoPE part, not quantised

Numbers are stored little-endian.  Quantisation is float32 arithmetic by definition of the format,
so here, and only here, the oracle computes in float32.

A tile that holds NaN or an infinity is lost as a whole, and says so twice: its scale is NaN and
each of its codes is 0x7f, which is NaN.  A RoPE value that is NaN becomes 0x7fc0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from flashmla.reference.paged_kv import paged_decode

D_NOPE, D_ROPE, TILE = 512, 64, 128
SCALES_AT = D_NOPE  # byte offsets
ROPE_AT = SCALES_AT + 4 * (D_NOPE // TILE)
TOKEN_BYTES = ROPE_AT + 2 * D_ROPE
E4M3_MAX = np.float32(448.0)
SMALLEST_AMAX = np.float32(1e-4)


def round_up_to_power_of_two(x):
    """The smallest power of two that is >= x, exactly; x float32, positive and finite."""
    mantissa, exponent = np.frexp(x)  # x = mantissa · 2^exponent, 0.5 <= mantissa < 1
    return np.ldexp(np.float32(1.0), np.where(mantissa == 0.5, exponent - 1, exponent))


def to_e4m3(x):
    """The float8_e4m3 nearest to x float32, ties to even, what is beyond 448 clamped to it."""
    return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def quantise(x, power_of_two=True):
    """x float32 [..., n · 128] -> codes float8_e4m3fn [..., n · 128], scales float32 [..., n].

    The largest value of a tile becomes 448, or up to twice less when scales are powers of two.
    """
    tiles = x.reshape(*x.shape[:-1], x.shape[-1] // TILE, TILE)
    amax = np.max(np.abs(tiles), axis=-1)
    lost = ~np.isfinite(amax)
    scales = np.maximum(np.where(lost, E4M3_MAX, amax), SMALLEST_AMAX) / E4M3_MAX
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    codes = to_e4m3(np.where(lost[..., None], np.float32(np.nan), tiles / scales[..., None]))
    return codes.reshape(x.shape), np.where(lost, np.float32(np.nan), scales)


def dequantise(codes, scales, dtype=np.float32):
    """codes float8_e4m3fn [..., n · 128], scales float32 [..., n] -> values [..., n · 128]."""
    tiles = codes.astype(dtype).reshape(*scales.shape, TILE)
    return (tiles * scales[..., None].astype(dtype)).reshape(codes.shape)


def pack(x, power_of_two=True):
    """Tokens x [..., 576] of any float dtype -> cache bytes uint8 [..., 656]."""
    x = np.asarray(x).astype(np.float32)
    codes, scales = quantise(x[..., :D_NOPE], power_of_two)
    rope = x[..., D_NOPE:]
    rope = np.where(np.isnan(rope), np.float32(np.nan), rope).astype(ml_dtypes.bfloat16)
    fields = [np.ascontiguousarray(field).view(np.uint8) for field in (codes, scales, rope)]
    return np.concatenate(fields, axis=-1)


def unpack(cache, dtype=np.float32):
    """Cache bytes [..., 656], uint8 or any one-byte dtype -> values [..., 576].

    With dtype float64 the products code · scale are exact; in float32 they are rounded once.
    """
    cache = np.ascontiguousarray(cache).view(np.uint8)
    codes, scales, rope = np.split(cache, [SCALES_AT, ROPE_AT], axis=-1)
    codes = np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn)
    scales = np.ascontiguousarray(scales).view(np.float32)
    rope = np.ascontiguousarray(rope).view(ml_dtypes.bfloat16)
    return np.concatenate([dequantise(codes, scales, dtype), rope.astype(dtype)], axis=-1)


def quantise_dequantise(x, power_of_two=True):
    """What a token is worth after a stay in the cache: x [..., 576] -> float32 [..., 576]."""
    return unpack(pack(x, power_of_two))


def append(cache, slots, x, power_of_two=True):
    """Pack tokens x [n, 576] into a cache [blocks, page, 1, 656], in place.

    slots [n]: block · page + offset of each token; a negative slot drops its token.
    """
    page = cache.shape[1]
    for slot, row in zip(slots, pack(x, power_of_two), strict=True):
        if slot >= 0:
            cache[slot // page, slot % page, 0] = row.view(cache.dtype)


def dense_decode(q, cache, block_table, seqlens, d_v, scale=None, causal=False, attn_sink=None):
    """Attention of each request's newest tokens with all its cached ones, code · scale exact.

    As `paged_decode`, with a cache of bytes [blocks, page, 1, 656].
    """
    tokens = unpack(cache, np.float64)
    return paged_decode(q, tokens, block_table, seqlens, d_v, scale, causal, attn_sink)


INDEX_PAGE, INDEX_DIM = 64, TILE  # tokens in a page of the indexer's cache, dimensions of its keys


def hadamard(d):
    """H[i, j] = -1 where i and j have an odd number of set bits in common, else 1; over √d."""
    common = np.arange(d)[:, None] & np.arange(d)[None, :]
    odd = np.vectorize(int.bit_count, otypes=[int])(common) % 2
    return np.where(odd == 1, -1.0, 1.0) / np.sqrt(d)


def index_pack(x, power_of_two=True):
    """Indexer keys x [..., 128] of any float dtype -> codes float8_e4m3fn [..., 128], scales."""
    codes, scales = quantise(np.asarray(x).astype(np.float32), power_of_two)
    return codes, scales[..., 0]


def index_append(cache, slots, x, power_of_two=True):
    """Pack keys x [n, 128] into the indexer's cache, bytes [blocks, 64, 1, 132], in place.

    A page is 64 · 128 code bytes and then 64 float32 scales; a negative slot drops its token.
    """
    pages = cache.reshape(len(cache), -1)
    for slot, code, scale in zip(slots, *index_pack(x, power_of_two), strict=True):
        if slot >= 0:
            block, offset = divmod(slot, INDEX_PAGE)
            begin, scale_at = offset * INDEX_DIM, INDEX_PAGE * INDEX_DIM + 4 * offset
            pages[block, begin : begin + INDEX_DIM] = code.view(cache.dtype)
            pages[block, scale_at : scale_at + 4] = scale[None].view(cache.dtype)
