"""The FP8 cache format: 656 bytes a token.

=========  ====================================================================
bytes      what
=========  ====================================================================
0-511      512 float8_e4m3 codes: the NoPE part (the latent)
512-527    4 float32 scales, one for each 128 values
528-655    64 bfloat16 values: the RoPE part, not quantised
=========  ====================================================================

A value is code * scale. The scale of a tile of 128 values is max(max|x|, 1e-4) / 448 in float32,
rounded up to a power of two unless asked otherwise; any positive float32 is legal in the format. A
code is the float32 quotient x / scale, clamped to +-448 and rounded to the nearest, ties to even.

A tile that holds NaN or an infinity becomes NaN as a whole: its scale is the NaN 0x7fc00000 and
each of its codes the NaN 0x7f. In the RoPE part a NaN becomes the bfloat16 0x7fc0 and an infinity
stays one; what is beyond bfloat16's range becomes an infinity. ``FLASHMLA_CHECK=1`` refuses both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.checks import (
    check_bool,
    check_dtype,
    check_finite,
    check_last_dim_contiguous,
    check_shape,
    check_slots,
    check_tensor,
    values_wanted,
)
from flashmla.ops.library import define

__all__ = [
    "BYTES_PER_TOKEN",
    "CACHE_DTYPES",
    "E4M3_MAX",
    "HEAD_DIM",
    "NOPE_DIM",
    "ROPE_DIM",
    "ROPE_OFFSET",
    "SCALES_OFFSET",
    "SMALLEST_MAXIMUM",
    "TILE_DIM",
    "append",
    "pack",
    "unpack",
]

NOPE_DIM = 512
ROPE_DIM = 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
TILE_DIM = 128  # values that share a scale
SCALES_OFFSET = NOPE_DIM
ROPE_OFFSET = SCALES_OFFSET + 4 * (NOPE_DIM // TILE_DIM)
BYTES_PER_TOKEN = ROPE_OFFSET + 2 * ROPE_DIM
E4M3_MAX = 448.0
SMALLEST_MAXIMUM = 1e-4
CACHE_DTYPES = (torch.float8_e4m3fn, torch.uint8, torch.int8)
"""What a cache may be declared as; the bytes are the same."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FINITE = "what is quantised must be finite"


def _fake_pack(x: Tensor, power_of_two: bool) -> Tensor:
    return x.new_empty(x.shape[0], BYTES_PER_TOKEN, dtype=torch.uint8)


def _fake_unpack(cache: Tensor) -> Tensor:
    return cache.new_empty(*cache.shape[:-1], HEAD_DIM, dtype=torch.float32)


def _fake_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    return None


_pack = define("fp8.pack", "(Tensor x, bool power_of_two) -> Tensor", _fake_pack)
_unpack = define("fp8.unpack", "(Tensor cache) -> Tensor", _fake_unpack)
_append = define("fp8.append", "(Tensor(a!) cache, Tensor slots, Tensor x) -> ()", _fake_append)


def pack(x: Tensor, power_of_two: bool = True) -> Tensor:
    """Quantise tokens into the cache format.

    Args:
        x: [..., 576], bfloat16, float16 or float32: 512 NoPE values, then 64 RoPE values.
        power_of_two: round scales up to powers of two, as DeepSeek's kernels want them; False
            keeps the float32 quotients, which waste no range.

    Returns:
        uint8 [..., 656]; ``.view(torch.float8_e4m3fn)`` makes it the dtype that other libraries
        declare.

    Raises:
        TypeError: x is no tensor of one of these dtypes, or power_of_two no bool.
        ValueError: a last dimension other than 576, or not contiguous; with ``FLASHMLA_CHECK=1``
            also NaN or an infinity in x.

    Example:
        >>> packed = flashmla.fp8.pack(torch.full((3, 576), 0.3))
        >>> packed.shape, flashmla.fp8.unpack(packed)[0, 0].item()
        (torch.Size([3, 656]), 0.3125)

    Source: ``flashmla/torch/fp8.py``, ``flashmla/triton/fp8.py``,
    ``csrc/sm90/fp8_cache/pack.cu``; the oracle is ``flashmla/reference/fp8.py``.
    """
    _check_last("x", x, HEAD_DIM, _FLOATS)
    check_bool("power_of_two", power_of_two)
    if values_wanted():
        check_finite("x", x, _FINITE)
    packed = _pack(x.reshape(-1, HEAD_DIM), power_of_two)
    return packed.view(*x.shape[:-1], BYTES_PER_TOKEN)


def unpack(cache: Tensor) -> Tensor:
    """The values of cache bytes.

    Args:
        cache: [..., 656] of uint8, int8 or float8_e4m3fn.

    Returns:
        float32 [..., 576]: code * scale rounded once to float32, then the RoPE values, exact.

    Raises:
        TypeError: cache is no tensor of one of these dtypes.
        ValueError: a last dimension other than 656, or not contiguous.

    Source: ``flashmla/torch/fp8.py``, ``flashmla/triton/fp8.py``,
    ``csrc/sm90/fp8_cache/unpack.cu``.
    """
    _check_last("cache", cache, BYTES_PER_TOKEN, CACHE_DTYPES)
    return _unpack(cache)


def append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Quantise tokens (with power-of-two scales) and write them into a paged cache, in place.

    Args:
        cache: [blocks, page, 1, 656] of uint8, int8 or float8_e4m3fn; the stride between pages
            is free.
        slots: int32 or int64 [n]: block * page + offset of each token. A negative slot drops its
            token, and so does one beyond the cache. Slots must differ from one another: one given
            twice holds a mixture of its tokens afterwards.
        x: [n, 576], bfloat16, float16 or float32.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: shapes, devices or strides that do not fit; with ``FLASHMLA_CHECK=1`` also a
            slot beyond the cache or given twice, and NaN or an infinity in x.

    Source: ``flashmla/torch/fp8.py``, ``flashmla/triton/fp8.py``,
    ``csrc/sm90/fp8_cache/pack.cu``.
    """
    dims = "[blocks, page, 1, 656]"
    check_tensor("cache", cache, dims, CACHE_DTYPES)
    check_shape("cache", cache, (None, None, 1, BYTES_PER_TOKEN), dims)
    check_tensor("slots", slots, "[n]", (torch.int32, torch.int64), cache.device)
    check_tensor("x", x, "[n, 576]", _FLOATS, cache.device)
    check_shape("x", x, (slots.shape[0], HEAD_DIM), "[n, 576]")
    if values_wanted():
        check_slots("slots", slots, cache.shape[0] * cache.shape[1])
        check_finite("x", x, _FINITE)
    _append(cache, slots, x)


def check_scales(name: str, cache: Tensor, slots: Tensor) -> None:
    """The scales of some tokens of a cache [blocks, page, 1, 656] are positive and finite.

    Reads the cache on the device, so only where checks of values are wanted.

    Args:
        name: the cache's, for the message.
        slots: int64 of any shape, block * page + offset; all within the cache.
    """
    page = max(1, cache.shape[1])
    slots = slots.unique()
    rows = cache.view(torch.uint8)[slots // page, slots % page, 0, SCALES_OFFSET:ROPE_OFFSET]
    scales = rows.contiguous().view(torch.float32)
    wrong = (~((scales > 0) & scales.isfinite())).nonzero()
    if len(wrong):
        token, tile = wrong[0].tolist()
        block, offset = divmod(int(slots[token]), page)
        raise ValueError(
            f"{name}[{block}, {offset}, 0] has the scale {scales[token, tile].item()} in tile "
            f"{tile}, but a scale must be positive and finite ({len(wrong)} such scales)"
        )


def _check_last(name: str, x: object, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Like check_tensor, for any leading dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [..., {size}], got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape [..., {size}], got {list(x.shape)}")
    check_dtype(name, x, dtypes)
    check_last_dim_contiguous(name, x)
