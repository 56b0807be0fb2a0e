"""Stage 05 in Triton: tokens of 656 bytes, written and read.

    bytes 0-511     512 float8_e4m3 codes: the NoPE part, a value is code * scale
    bytes 512-527   4 float32 scales, one for each tile of 128 values
    bytes 528-655   64 bfloat16 values: the RoPE part, not quantised

Roundings are written out in integers: cards before Ada have no instruction for e4m3, and those
that have one do not agree on what becomes of a NaN.
"""

import torch
import triton
import triton.language as tl

from flashmla.fp8 import BYTES_PER_TOKEN, HEAD_DIM, INDEX_DIM, INDEX_PAGE
from flashmla.triton.common import TILE, byte_views, e4m3_values, misplaced, on_device
from flashmla.triton.paged_kv import find_slots
from flashmla.triton.sparse import dense_decode, supports_dense_decode

__all__ = [
    "append",
    "dense_decode",
    "index_append",
    "index_pack",
    "pack",
    "supports_append",
    "supports_dense_decode",
    "supports_index_append",
    "unpack",
]

# Tokens that a program takes.
PACK_TOKENS, PACK_WARPS = 4, 2
INDEX_TOKENS = 16

TILES = tl.constexpr(4)
ROPE = tl.constexpr(64)
NOPE = tl.constexpr(512)
SCALES_AT = tl.constexpr(512)  # bytes
ROPE_AT = tl.constexpr(528)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)


# region: e4m3_codes
@triton.jit
def e4m3_codes(quotients):
    """The float8_e4m3 nearest to each quotient, ties to even, clamped to +-448: int32 0 to 255."""
    sign = (quotients.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(quotients), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # From 2^-6 on: cut 23 bits of mantissa to 3, and move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below it codes are multiples of 2^-9, which is the last bit of a float32 at 2^14.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0.015625, small, normal) | sign


# endregion: e4m3_codes


# region: quantise
@triton.jit
def quantise(x, POWER_OF_TWO: tl.constexpr):
    """x [..., 128] float32 -> codes [..., 128] int32, bits of the scales [...] int32.

    A tile that holds NaN or an infinity gets the scale NaN and codes that are NaN.
    """
    # Absolute values compare like their bits, with NaN above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=-1)  # [...]
    lost = largest >= INFINITY_BITS
    largest = tl.where(lost, 0, largest).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(largest, 1e-4), tl.full(largest.shape, 448.0, tl.float32))
    if POWER_OF_TWO:
        # Carry the mantissa into the exponent, then drop it.
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITY_BITS
        scale = bits.to(tl.float32, bitcast=True)
    codes = e4m3_codes(tl.div_rn(x, tl.broadcast_to(tl.expand_dims(scale, -1), x.shape)))
    codes = tl.where(tl.expand_dims(lost, -1), 0x7F, codes)
    return codes, tl.where(lost, NAN_BITS, scale.to(tl.int32, bitcast=True))


# endregion: quantise


# region: bf16_bits
@triton.jit
def bf16_bits(x):
    """The bfloat16 nearest to each float32, ties to even, as int32; NaN becomes 0x7fc0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > INFINITY_BITS, 0x7FC0, rounded)


# endregion: bf16_bits


# region: pack_kernel
@triton.jit(do_not_specialize=["n", "page", "capacity"])
def pack_kernel(
    x,  # [n, 576]
    slots,  # [n] int32 or int64, or anything without HAS_SLOTS
    codes,  # [blocks, page, 656] uint8: the cache
    scales,  # [blocks, page, 164] int32: the same bytes
    rope,  # [blocks, page, 328] int16: the same bytes
    x_stride,
    stride_block,  # bytes
    stride_token,  # bytes
    n,
    page,
    capacity,  # blocks * page
    POWER_OF_TWO: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
):
    token, slot = find_slots(slots, n, capacity, HAS_SLOTS, TOKENS)  # [N]
    kept = slot >= 0  # [N]
    row = slot // page * stride_block + slot % page * stride_token  # [N], bytes

    tile = tl.arange(0, TILES)  # [T]
    place = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [T, 128]
    at = (token * x_stride)[:, None, None] + place[None, :, :]  # [N, T, 128]
    values = tl.load(x + at, mask=kept[:, None, None], other=0.0).to(tl.float32)
    nope, scale_bits = quantise(values, POWER_OF_TWO)  # [N, T, 128], [N, T]
    at = row[:, None, None] + place[None, :, :]
    tl.store(codes + at, nope.to(tl.uint8), mask=kept[:, None, None])
    at = ((row + SCALES_AT) // 4)[:, None] + tile[None, :]
    tl.store(scales + at, scale_bits, mask=kept[:, None])
    column = tl.arange(0, ROPE)  # [64]
    at = (token * x_stride + NOPE)[:, None] + column[None, :]  # [N, 64]
    values = tl.load(x + at, mask=kept[:, None], other=0.0).to(tl.float32)
    at = ((row + ROPE_AT) // 2)[:, None] + column[None, :]
    tl.store(rope + at, bf16_bits(values).to(tl.int16), mask=kept[:, None])


# endregion: pack_kernel


# region: unpack_kernel
@triton.jit(do_not_specialize=["n", "inner"])
def unpack_kernel(
    codes,  # [outer, inner, 656] uint8: the cache
    scales,  # [outer, inner, 164] int32: the same bytes
    rope,  # [outer, inner, 328] int16: the same bytes
    values,  # [n, 576] float32
    stride_outer,  # bytes
    stride_inner,  # bytes
    n,  # outer * inner
    inner,
    TOKENS: tl.constexpr,  # of a program
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [N]
    exists = token < n  # [N]
    row = token // inner * stride_outer + token % inner * stride_inner  # [N], bytes
    tile = tl.arange(0, TILES)  # [T]
    place = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [T, 128]
    out = values + token * (NOPE + ROPE)  # [N] pointers

    at = ((row + SCALES_AT) // 4)[:, None] + tile[None, :]  # [N, T]
    scale = tl.load(scales + at, mask=exists[:, None], other=0).to(tl.float32, bitcast=True)
    at = row[:, None, None] + place[None, :, :]  # [N, T, 128]
    code = tl.load(codes + at, mask=exists[:, None, None], other=0).to(tl.int32)
    nope = e4m3_values(code) * scale[:, :, None]
    tl.store(out[:, None, None] + place[None, :, :], nope, mask=exists[:, None, None])
    column = tl.arange(0, ROPE)  # [64]
    at = ((row + ROPE_AT) // 2)[:, None] + column[None, :]  # [N, 64]
    bits = tl.load(rope + at, mask=exists[:, None], other=0).to(tl.int32) << 16
    out = (out + NOPE)[:, None] + column[None, :]
    tl.store(out, bits.to(tl.float32, bitcast=True), mask=exists[:, None])


# endregion: unpack_kernel


# region: index_pack_kernel
@triton.jit(do_not_specialize=["n", "page", "capacity"])
def index_pack_kernel(
    x,  # [n, 128]
    slots,  # [n] int32 or int64, or anything without HAS_SLOTS
    codes,  # uint8, of block 0: [page, 128]
    scales,  # int32, of block 0: [page]
    x_stride,
    stride_block,  # bytes, a multiple of 4; the same for codes and scales
    n,
    page,
    capacity,  # blocks * page
    POWER_OF_TWO: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program
):
    token, slot = find_slots(slots, n, capacity, HAS_SLOTS, TOKENS)  # [N]
    kept = slot >= 0  # [N]
    block, offset = slot // page, slot % page
    column = tl.arange(0, TILE)  # [128]
    at = (token * x_stride)[:, None] + column[None, :]  # [N, 128]
    values = tl.load(x + at, mask=kept[:, None], other=0.0).to(tl.float32)
    key, scale_bits = quantise(values, POWER_OF_TWO)  # [N, 128], [N]
    at = (block * stride_block + offset * TILE)[:, None] + column[None, :]
    tl.store(codes + at, key.to(tl.uint8), mask=kept[:, None])
    tl.store(scales + block * (stride_block // 4) + offset, scale_bits, mask=kept)


# endregion: index_pack_kernel


def pack(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """[tokens, 576] -> uint8 [tokens, 656]."""
    packed = torch.empty(x.shape[0], BYTES_PER_TOKEN, dtype=torch.uint8, device=x.device)
    _pack(x, None, packed.view(1, -1, 1, BYTES_PER_TOKEN), power_of_two)
    return packed


def append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Quantises x [n, 576] into the slots [n] of a cache [blocks, page, 1, 656], in place."""
    _pack(x, slots, cache, True)


def _pack(
    x: torch.Tensor, slots: torch.Tensor | None, cache: torch.Tensor, power_of_two: bool
) -> None:
    blocks, page = cache.shape[:2]
    if x.shape[0] == 0 or blocks * page == 0:
        return
    with on_device(cache.device):
        pack_kernel[(triton.cdiv(x.shape[0], PACK_TOKENS),)](
            x, x if slots is None else slots, *byte_views(cache), x.stride(0), cache.stride(0),
            cache.stride(1), x.shape[0], page, blocks * page, POWER_OF_TWO=power_of_two,
            HAS_SLOTS=slots is not None, TOKENS=PACK_TOKENS, num_warps=PACK_WARPS,
        )  # fmt: skip


def unpack(cache: torch.Tensor) -> torch.Tensor:
    """[..., 656] of one-byte elements -> float32 [..., 576]."""
    lead = cache.shape[:-1]
    while cache.dim() < 3:
        cache = cache.unsqueeze(0)
    rows = cache.flatten(1, -2)  # [outer, inner, 656]
    if misplaced(rows):
        rows = rows.clone(memory_format=torch.contiguous_format)
    tokens = rows.shape[0] * rows.shape[1]
    values = torch.empty(tokens, HEAD_DIM, dtype=torch.float32, device=cache.device)
    if tokens:
        with on_device(cache.device):
            unpack_kernel[(triton.cdiv(tokens, PACK_TOKENS),)](
                *byte_views(rows), values, rows.stride(0), rows.stride(1), tokens, rows.shape[1],
                TOKENS=PACK_TOKENS, num_warps=PACK_WARPS,
            )  # fmt: skip
    return values.view(*lead, HEAD_DIM)


def index_pack(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, 128] -> codes float8_e4m3fn [tokens, 128], scales float32 [tokens]."""
    tokens = x.shape[0]
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        _index_pack(x, None, codes, scales, 0, tokens, tokens, power_of_two)
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float32)


def index_append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Quantises x [n, 128] into the slots [n] of a cache [blocks, 64, 1, 132], in place."""
    pages = cache.view(torch.uint8).flatten(1)  # [blocks, 64 * 128 codes, then 64 scales]
    scales = pages[:, INDEX_PAGE * INDEX_DIM :].view(torch.int32)
    capacity = pages.shape[0] * INDEX_PAGE
    if x.shape[0] and capacity:
        _index_pack(x, slots, pages, scales, pages.stride(0), INDEX_PAGE, capacity, True)


def _index_pack(
    x: torch.Tensor,
    slots: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    stride_block: int,
    page: int,
    capacity: int,
    power_of_two: bool,
) -> None:
    with on_device(x.device):
        index_pack_kernel[(triton.cdiv(x.shape[0], INDEX_TOKENS),)](
            x, x if slots is None else slots, codes, scales, x.stride(0), stride_block, x.shape[0],
            page, capacity, POWER_OF_TWO=power_of_two, HAS_SLOTS=slots is not None,
            TOKENS=INDEX_TOKENS, num_warps=4,
        )  # fmt: skip


def supports_index_append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> str:
    """Empty if the kernel takes the arguments, else why not."""
    return "cache's pages do not lie at multiples of 4 bytes" if misplaced(cache) else ""


def supports_append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> str:
    """Empty if these kernels take the arguments, else why not."""
    return "cache's tokens do not lie at multiples of 4 bytes" if misplaced(cache) else ""
