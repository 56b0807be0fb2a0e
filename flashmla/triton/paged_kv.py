"""Stage 03 in Triton: tokens written into their slots of a paged cache."""

import torch
import triton
import triton.language as tl

from flashmla.triton.common import on_device

# Elements that a program moves at a time.
BLOCK = 1024


# region: find_slot
@triton.jit
def find_slot(slots, token, capacity, HAS_SLOTS: tl.constexpr):
    """The slot of a token, int64; -1 if it is negative or beyond the cache, and so to be
    dropped."""
    slot = token
    if HAS_SLOTS:
        slot = tl.load(slots + token).to(tl.int64)
    return tl.where((slot >= 0) & (slot < capacity), slot, -1)


# endregion: find_slot


# region: append_kernel
@triton.jit(do_not_specialize=["page", "capacity"])
def append_kernel(
    cache_bits,  # [blocks, page, width] integers
    slots,  # [n] int32 or int64
    x_bits,  # [n, width] integers
    stride_block,
    stride_token,
    x_stride,
    page,
    capacity,  # blocks * page
    width,
    BLOCK: tl.constexpr,
):
    # One program for one token.
    token = tl.program_id(0).to(tl.int64)
    slot = find_slot(slots, token, capacity, True)
    if slot < 0:
        return
    row = slot // page * stride_block + slot % page * stride_token
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)  # [BLOCK]
        values = tl.load(x_bits + token * x_stride + column, mask=column < width)
        tl.store(cache_bits + row + column, values, mask=column < width)


# endregion: append_kernel


def append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Writes x [n, h_kv, d] into the slots [n] of a cache [blocks, page, h_kv, d], in place."""
    blocks, page, heads, d = cache.shape
    if x.numel() == 0 or blocks * page == 0:
        return
    rows = x.reshape(x.shape[0], heads * d)
    integers = torch.int16 if x.element_size() == 2 else torch.int32
    with on_device(cache.device):
        append_kernel[(x.shape[0],)](
            cache.view(integers), slots, rows.view(integers), cache.stride(0), cache.stride(1),
            rows.stride(0), page, blocks * page, heads * d, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
