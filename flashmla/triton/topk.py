"""Stage 06 in Triton: exact top-k of rows of scores, by a radix search for the k-th largest.

Floats become integers of the same order. Four passes over the row find the k-th largest of them
byte by byte: a histogram of the byte of all that still agree with what is known. A fifth pass
writes what is above it, and of its equals the first ones, in their order.
"""

import torch
import triton
import triton.language as tl

from flashmla.triton.common import on_device

__all__ = ["topk"]

BLOCK = 2048  # elements that a program looks at together


# region: ordered_keys
@triton.jit
def ordered_keys(x, exists):
    """float32 [N] -> int64 [N] of the same order, 0 to 2^32 - 1; -1 for what is never chosen."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(order == -1, 0, order)  # the two zeros are equal
    # NaN compares with nothing. Denormals must not be compared as floats, which may take them for
    # zeros, but all that matters here is that they are above -inf.
    allowed = exists & (x > float("-inf"))
    return tl.where(allowed, order.to(tl.int64) + 2147483648, -1)


# endregion: ordered_keys


# region: topk_kernel
@triton.jit(do_not_specialize=["n", "count", "page"])
def topk_kernel(
    logits,  # [rows, n] float32
    lengths,  # [rows] int32; not read without HAS_LENGTHS
    block_table,  # [rows, max_blocks] int32; not read without HAS_TABLE
    indices,  # [rows, count] int32
    logits_stride,
    table_stride,
    n,
    count,  # k
    page,
    HAS_LENGTHS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = n
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + row), n)
    place = tl.arange(0, BLOCK)
    digit_value = tl.arange(0, 256)

    # region: topk_search
    prefix = tl.zeros([], tl.int64)  # the upper bytes of the k-th largest, as far as known
    wanted = tl.zeros([], tl.int32) + count  # how many of those that agree with it
    for byte in tl.static_range(4):
        shift = 24 - 8 * byte
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, BLOCK):
            at = start + place
            x = tl.load(logits + row * logits_stride + at, mask=at < length, other=0.0)
            key = ordered_keys(x, at < length)
            agrees = (key >> (shift + 8)) == prefix  # -1 never does
            digit = ((key >> shift) & 255).to(tl.int32)
            histogram += tl.histogram(digit, 256, mask=agrees)
        total = tl.sum(histogram)
        if byte == 0:
            wanted = tl.minimum(wanted, total)
        above = total - tl.cumsum(histogram)  # [256], with a larger byte
        found = tl.max(tl.where(above + histogram >= wanted, digit_value, 0))
        wanted -= tl.sum(tl.where(digit_value == found, above, 0))
        prefix = prefix * 256 + found
    # endregion: topk_search

    # region: topk_write
    done = tl.zeros([], tl.int32)  # written so far
    equals = tl.zeros([], tl.int32)  # of the k-th largest, met so far
    for start in range(0, length, BLOCK):
        at = start + place
        x = tl.load(logits + row * logits_stride + at, mask=at < length, other=0.0)
        key = ordered_keys(x, at < length)
        equal = (key == prefix).to(tl.int32)
        nth = equals + tl.cumsum(equal)
        chosen = (key > prefix) | ((equal > 0) & (nth <= wanted))
        column = done + tl.cumsum(chosen.to(tl.int32)) - 1
        token = at
        if HAS_TABLE:
            block = tl.load(block_table + row * table_stride + at // page, mask=chosen, other=0)
            token = block * page + at % page
        tl.store(indices + row * count + column, token, mask=chosen)
        done += tl.sum(chosen.to(tl.int32))
        equals += tl.sum(equal)
    for start in range(done, count, BLOCK):
        column = start + place
        tl.store(
            indices + row * count + column, tl.full([BLOCK], -1, tl.int32), mask=column < count
        )
    # endregion: topk_write


# endregion: topk_kernel


def topk(
    logits: torch.Tensor,
    k: int,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    page: int,
) -> torch.Tensor:
    """Positions int32 [rows, k] of the k largest of each row of logits [rows, n], any k and n."""
    rows, n = logits.shape
    indices = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    if indices.numel():
        with on_device(logits.device):
            topk_kernel[(rows,)](
                logits, indices if lengths is None else lengths,
                indices if block_table is None else block_table, indices, logits.stride(0),
                0 if block_table is None else block_table.stride(0), n, k, page,
                HAS_LENGTHS=lengths is not None, HAS_TABLE=block_table is not None, BLOCK=BLOCK,
                num_warps=8,
            )  # fmt: skip
    return indices
