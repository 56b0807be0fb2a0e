"""Stage 03 in Triton: tokens written into their slots of a paged cache."""

import torch
import triton
import triton.language as tl

from flashmla.triton.common import on_device

# Tokens of a program, and elements of each that it moves at a time.
TOKENS = 4
BLOCK = 256


# region: find_slots
@triton.jit
def find_slots(slots, n, capacity, HAS_SLOTS: tl.constexpr, TOKENS: tl.constexpr):
    """The tokens of a program and the slots they go to, both int64 [TOKENS].

    The slot is -1 for a token to be dropped, whose slot is negative or beyond the cache, and for
    one that is not there.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = token
    if HAS_SLOTS:
        slot = tl.load(slots + token, mask=token < n, other=-1).to(tl.int64)
    return token, tl.where((token < n) & (slot >= 0) & (slot < capacity), slot, -1)


# endregion: find_slots


# region: append_kernel
@triton.jit(do_not_specialize=["n", "page", "capacity"])
def append_kernel(
    cache_bits,  # [blocks, page, width] integers
    slots,  # [n] int32 or int64
    x_bits,  # [n, width] integers
    stride_block,
    stride_token,
    x_stride,
    n,
    page,
    capacity,  # blocks * page
    width,
    TOKENS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,
):
    token, slot = find_slots(slots, n, capacity, True, TOKENS)  # [N]
    row = slot // page * stride_block + slot % page * stride_token  # [N]
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)  # [BLOCK]
        mask = (slot >= 0)[:, None] & (column < width)[None, :]  # [N, BLOCK]
        values = tl.load(x_bits + (token * x_stride)[:, None] + column[None, :], mask=mask)
        tl.store(cache_bits + row[:, None] + column[None, :], values, mask=mask)


# endregion: append_kernel


def append(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Writes x [n, h_kv, d] into the slots [n] of a cache [blocks, page, h_kv, d], in place."""
    blocks, page, heads, d = cache.shape
    if x.numel() == 0 or blocks * page == 0:
        return
    rows = x.reshape(x.shape[0], heads * d)
    integers = torch.int16 if x.element_size() == 2 else torch.int32
    with on_device(cache.device):
        append_kernel[(triton.cdiv(x.shape[0], TOKENS),)](
            cache.view(integers), slots, rows.view(integers), cache.stride(0), cache.stride(1),
            rows.stride(0), x.shape[0], page, blocks * page, heads * d, TOKENS=TOKENS,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
