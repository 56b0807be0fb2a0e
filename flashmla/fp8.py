"""The FP8 cache formats: 656 bytes a token for attention, 132 for the indexer of sparse attention.

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

The indexer's keys are 128 values a token, one tile: quantised the same way, 64 tokens to a page,
first the codes of all 64 and then their scales:

==========  ===================================================================
bytes       what
==========  ===================================================================
0-8191      64 * 128 float8_e4m3 codes
8192-8447   64 float32 scales
==========  ===================================================================

"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.checks import (
    check_bool,
    check_dtype,
    check_finite,
    check_last_dim_contiguous,
    check_page_strides,
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
    "INDEX_BYTES_PER_TOKEN",
    "INDEX_DIM",
    "INDEX_PAGE",
    "NOPE_DIM",
    "ROPE_DIM",
    "ROPE_OFFSET",
    "SCALES_OFFSET",
    "SMALLEST_MAXIMUM",
    "TILE_DIM",
    "append",
    "index_append",
    "index_pack",
    "pack",
    "rotate",
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

INDEX_DIM = TILE_DIM
"""Dimensions of the indexer's queries and keys."""

INDEX_PAGE = 64
"""Tokens in a page of the indexer's cache."""

INDEX_BYTES_PER_TOKEN = INDEX_DIM + 4
"""128 float8_e4m3 codes and a float32 scale; a page holds all its codes first."""

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


def _fake_index_pack(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


_index_pack = define(
    "fp8.index_pack", "(Tensor x, bool power_of_two) -> (Tensor, Tensor)", _fake_index_pack
)
_index_append = define(
    "fp8.index_append", "(Tensor(a!) cache, Tensor slots, Tensor x) -> ()", _fake_append
)


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
    _check_tokens(slots, x, cache, HEAD_DIM)
    _append(cache, slots, x)


def rotate(x: Tensor) -> Tensor:
    """The Hadamard rotation of the indexer's queries and keys, by a matrix product.

    It is orthogonal, so that rotating both leaves their dot products alone. A dimension in which
    both are large, whose one product would carry its rounding error whole, is spread over all
    dimensions, where errors average out. Outliers in different dimensions gain nothing by it.

    Args:
        x: [..., d], bfloat16, float16 or float32, d a power of two.

    Returns:
        x @ H / sqrt(d) in x's dtype, rounded once, with H[i, j] = -1 where i and j have an odd
        number of set bits in common, else 1. Rotating twice gives x again, but for rounding. In
        16 bits on a GPU 1 / sqrt(d) is of x's dtype too, which scales all values alike, by 1.0001
        at most in bfloat16 for d = 128, and so ranks nothing differently.

    Raises:
        TypeError: x is no tensor of one of these dtypes.
        ValueError: a last dimension that is no power of two.

    Example:
        >>> flashmla.fp8.rotate(torch.tensor([3.0, 0.0, 0.0, 0.0]))
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor [..., d], got {type(x).__name__}")
    check_dtype("x", x, _FLOATS)
    d = x.shape[-1] if x.dim() else 0
    if d < 1 or d & (d - 1):
        raise ValueError(f"x must have a power of two as its last dimension, got {list(x.shape)}")
    # A GPU adds 16-bit products up in float32; on a CPU that depends on the library.
    dtype = x.dtype if x.device.type == "cuda" else torch.float32
    return (x.to(dtype) @ _hadamard(d, dtype, x.device)).to(x.dtype)


def _hadamard(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[d, d], symmetric and orthogonal, d a power of two; made once for a device."""
    if torch.compiler.is_compiling():
        return _make_hadamard(d, dtype, device)
    key = (d, dtype, device)
    matrix = _rotations.get(key)
    if matrix is None:
        with torch.inference_mode(False):
            matrix = _make_hadamard(d, dtype, device)
        # What is made while a CUDA graph is being captured is that graph's, and dies with it.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _rotations[key] = matrix
    return matrix


_rotations: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _make_hadamard(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * d**-0.5).to(dtype)


def index_pack(x: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """Quantise the indexer's queries or keys: what :func:`flashmla.indexer_logits` takes.

    Args:
        x: [..., 128], bfloat16, float16 or float32; rotated by :func:`rotate`, if the model's are.
        power_of_two: round scales up to powers of two.

    Returns:
        (codes, scales): float8_e4m3fn [..., 128] and float32 [...]; a value is code * scale.

    Raises:
        TypeError: x is no tensor of one of these dtypes, or power_of_two no bool.
        ValueError: a last dimension other than 128, or not contiguous; with ``FLASHMLA_CHECK=1``
            also NaN or an infinity in x.

    Example:
        >>> codes, scales = flashmla.fp8.index_pack(torch.full((3, 128), 0.3))
        >>> (codes.float() * scales.unsqueeze(-1))[0, 0].item()
        0.3125

    Source: ``flashmla/torch/fp8.py``, ``flashmla/triton/fp8.py``,
    ``csrc/sm90/fp8_cache/index_pack.cu``.
    """
    _check_last("x", x, INDEX_DIM, _FLOATS)
    check_bool("power_of_two", power_of_two)
    if values_wanted():
        check_finite("x", x, _FINITE)
    codes, scales = _index_pack(x.reshape(-1, INDEX_DIM), power_of_two)
    return codes.view(x.shape), scales.view(x.shape[:-1])


def index_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Quantise keys (with power-of-two scales) and write them into the indexer's cache, in place.

    Args:
        cache: [blocks, 64, 1, 132] of uint8, int8 or float8_e4m3fn; the stride between pages is
            free.
        slots: int32 or int64 [n]: block * 64 + offset of each token. A negative slot drops its
            token, and so does one beyond the cache. Slots must differ from one another: one given
            twice holds a mixture of its tokens afterwards.
        x: [n, 128], bfloat16, float16 or float32; rotated by :func:`rotate`, if the model's are.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: shapes, devices or strides that do not fit; with ``FLASHMLA_CHECK=1`` also a
            slot beyond the cache or given twice, and NaN or an infinity in x.

    Source: ``flashmla/torch/fp8.py``, ``flashmla/triton/fp8.py``,
    ``csrc/sm90/fp8_cache/index_pack.cu``.
    """
    dims = "[blocks, 64, 1, 132]"
    check_tensor("cache", cache, dims, CACHE_DTYPES)
    check_shape("cache", cache, (None, INDEX_PAGE, 1, INDEX_BYTES_PER_TOKEN), dims)
    check_page_strides("cache", cache, dims)
    _check_tokens(slots, x, cache, INDEX_DIM)
    _index_append(cache, slots, x)


def slots_in_use(block_table: Tensor, lengths: Tensor, page: int) -> Tensor:
    """Where the tokens of requests are: int64 [tokens of all], block * page + offset.

    Args:
        block_table: int32 [b, max_blocks].
        lengths: int32 [b], at most max_blocks * page each.
    """
    position = torch.arange(block_table.shape[1] * page, device=lengths.device)
    request, at = (position < lengths.unsqueeze(1)).nonzero().unbind(1)
    return block_table[request, at // page].long() * page + at % page


def check_index_scales(name: str, cache: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """As :func:`check_scales`, for the tokens of requests in the indexer's cache.

    Args:
        block_table: int32 [b, max_blocks], within the cache up to each length.
        lengths: int32 [b].
    """
    slots = slots_in_use(block_table, lengths, INDEX_PAGE).unique()
    pages = cache.view(torch.uint8).flatten(1)[:, INDEX_PAGE * INDEX_DIM :]
    scales = pages.contiguous().view(torch.float32).flatten()[slots]
    wrong = (~((scales > 0) & scales.isfinite())).nonzero()
    if len(wrong):
        token = int(wrong[0])
        block, offset = divmod(int(slots[token]), INDEX_PAGE)
        raise ValueError(
            f"{name} has the scale {scales[token].item()} for token {offset} of block {block}, but "
            f"a scale must be positive and finite ({len(wrong)} such scales)"
        )


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


def _check_tokens(slots: object, x: object, cache: Tensor, width: int) -> None:
    """What is appended to a cache [blocks, page, ...], and where it goes."""
    slots = check_tensor("slots", slots, "[n]", (torch.int32, torch.int64), cache.device)
    dims = f"[n, {width}]"
    x = check_tensor("x", x, dims, _FLOATS, cache.device)
    check_shape("x", x, (slots.shape[0], width), dims)
    if values_wanted():
        check_slots("slots", slots, cache.shape[0] * cache.shape[1])
        check_finite("x", x, _FINITE)


def _check_last(name: str, x: object, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Like check_tensor, for any leading dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [..., {size}], got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape [..., {size}], got {list(x.shape)}")
    check_dtype(name, x, dtypes)
    check_last_dim_contiguous(name, x)
