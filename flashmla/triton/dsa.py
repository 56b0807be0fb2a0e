"""Stage 06 in Triton: the lightning indexer's scores, of a prompt and of cached keys.

Top-k and attention over what it chose are in files of their own, and gathered here under the name
by which tiers are asked for them.

FP8 codes are exact in float16, so that one product serves every card, whether its matrix units
know FP8 or not: products of two codes are exact in float32, and so is their sum but for rounding.
"""

import torch
import triton
import triton.language as tl

from flashmla.fp8 import INDEX_DIM, INDEX_PAGE
from flashmla.triton.common import e4m3_values, on_device
from flashmla.triton.sparse import (
    sparse_decode,
    sparse_prefill,
    supports_sparse_decode,
    supports_sparse_prefill,
)
from flashmla.triton.topk import topk

__all__ = [
    "indexer_logits",
    "indexer_logits_paged",
    "sparse_decode",
    "sparse_prefill",
    "supports_indexer_logits",
    "supports_indexer_logits_paged",
    "supports_sparse_decode",
    "supports_sparse_prefill",
    "topk",
]

DIM = tl.constexpr(INDEX_DIM)
PAGE = tl.constexpr(INDEX_PAGE)

# Keys that a program scores, and the most heads it holds in registers.
BLOCK = 64
MOST_HEADS = 128


# region: score
@triton.jit
def score(q, weights, keys, key_scale):
    """q [H, 128] and keys [N, 128] float16, weights [H], key_scale [N] -> scores [N]."""
    dots = tl.dot(keys, tl.trans(q))  # [N, H] float32
    positive = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.sum(positive * weights[None, :], axis=1) * key_scale  # [N]


@triton.jit
def load_codes(codes, mask):
    """float8_e4m3 codes as float16, which holds each of them exactly."""
    return e4m3_values(tl.load(codes, mask=mask, other=0).to(tl.int32)).to(tl.float16)


# endregion: score


# region: prefill_kernel
@triton.jit(do_not_specialize=["s_kv", "blocks"])
def prefill_kernel(
    q_codes,  # [s_q, h, 128] uint8
    key_codes,  # [s_kv, 128] uint8
    key_scale,  # [s_kv] float32
    weights,  # [s_q, h] float32
    start,  # [s_q] int32
    end,  # [s_q] int32
    logits,  # [s_q, s_kv] float32
    s_kv,
    blocks,  # of BLOCK keys
    h,
    q_stride,
    q_stride_head,
    k_stride,
    H: tl.constexpr,  # h rounded up to a power of two, at least 16
    BLOCK: tl.constexpr,
):
    # One program for one query and one block of keys.
    program = tl.program_id(0).to(tl.int64)
    query, first = program // blocks, program % blocks * BLOCK
    token = first + tl.arange(0, BLOCK)  # [N]
    seen = (token >= tl.load(start + query)) & (token < tl.load(end + query)) & (token < s_kv)
    seen &= token >= 0
    result = tl.full([BLOCK], float("-inf"), tl.float32)
    if tl.max(seen.to(tl.int32)) > 0:
        head, column = tl.arange(0, H), tl.arange(0, DIM)
        place = query * q_stride + head[:, None] * q_stride_head + column[None, :]
        q = load_codes(q_codes + place, (head < h)[:, None])  # [H, 128]
        w = tl.load(weights + query * h + head, mask=head < h, other=0.0)  # [H]
        keys = load_codes(key_codes + token[:, None] * k_stride + column[None, :], seen[:, None])
        scale = tl.load(key_scale + token, mask=seen, other=0.0)  # [N]
        result = tl.where(seen, score(q, w, keys, scale), result)
    tl.store(logits + query * s_kv + token, result, mask=token < s_kv)


# endregion: prefill_kernel


# region: paged_kernel
@triton.jit(do_not_specialize=["s_q", "pages", "blocks"])
def paged_kernel(
    q_codes,  # [b, s_q, h, 128] uint8
    key_codes,  # uint8, of page 0: [64, 128]
    key_scales,  # float32, of page 0: [64]
    weights,  # [b, s_q, h] float32
    block_table,  # [b, pages] int32
    cache_seqlens,  # [b] int32
    logits,  # [b, s_q, pages * 64] float32
    s_q,
    pages,
    blocks,  # pages of the cache
    h,
    q_stride_batch,
    q_stride,
    q_stride_head,
    page_stride,  # bytes, a multiple of 4; the same for codes and scales
    table_stride,
    H: tl.constexpr,
):
    # One program for one query and one page.
    program = tl.program_id(0).to(tl.int64)
    row, page = program // pages, program % pages
    request, query = row // s_q, row % s_q
    offset = tl.arange(0, PAGE)  # [64]
    # The last query sees all tokens, the one before it all but the last, and so on.
    length = tl.minimum(tl.load(cache_seqlens + request).to(tl.int64), pages * PAGE)
    seen = page * PAGE + offset < length - s_q + 1 + query
    result = tl.full([PAGE], float("-inf"), tl.float32)
    if tl.max(seen.to(tl.int32)) > 0:
        head, column = tl.arange(0, H), tl.arange(0, DIM)
        place = request * q_stride_batch + query * q_stride
        place += head[:, None] * q_stride_head + column[None, :]
        q = load_codes(q_codes + place, (head < h)[:, None])  # [H, 128]
        w = tl.load(weights + row * h + head, mask=head < h, other=0.0)  # [H]
        # A block number out of range is the caller's fault, but no reason to read elsewhere.
        block = tl.load(block_table + request * table_stride + page).to(tl.int64)
        block = tl.minimum(tl.maximum(block, 0), blocks - 1)
        codes = key_codes + block * page_stride + offset[:, None] * DIM + column[None, :]
        keys = load_codes(codes, seen[:, None])  # [64, 128]
        scales = key_scales + block * (page_stride // 4) + offset
        scale = tl.load(scales, mask=seen, other=0.0)  # [64]
        result = tl.where(seen, score(q, w, keys, scale), result)
    tl.store(logits + program * PAGE + offset, result)


# endregion: paged_kernel


def indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> torch.Tensor:
    """Scores float32 [s_q, s_kv] of keys k [s_kv, 128] for queries q [s_q, h, 128]."""
    s_q, h, _ = q.shape
    s_kv = k.shape[0]
    logits = torch.empty(s_q, s_kv, dtype=torch.float32, device=q.device)
    blocks = -(-s_kv // BLOCK)
    if logits.numel():
        with on_device(q.device):
            prefill_kernel[(s_q * blocks,)](
                q.view(torch.uint8), k.view(torch.uint8), k_scale.contiguous(),
                weights.contiguous(), start.contiguous(), end.contiguous(), logits, s_kv, blocks,
                h, q.stride(0), q.stride(1), k.stride(0), H=_padded(h), BLOCK=BLOCK,
            )  # fmt: skip
    return logits


def supports_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> str:
    """Why the kernel can't take these arguments; empty if it can."""
    return _bad_heads(q.shape[1])


def indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Scores float32 [b, s_q, max_blocks * 64] of cached keys for queries q [b, s_q, h, 128]."""
    b, s_q, h, d = q.shape
    blocks, page = cache.shape[:2]
    pages = block_table.shape[1]
    logits = torch.empty(b, s_q, pages * page, dtype=torch.float32, device=q.device)
    if blocks == 0:
        return logits.fill_(-float("inf"))
    if logits.numel():
        codes = cache.view(torch.uint8).flatten(1)  # [blocks, 64 * 132]
        scales = codes[:, page * d :].view(torch.float32)
        with on_device(q.device):
            paged_kernel[(b * s_q * pages,)](
                q.view(torch.uint8), codes, scales, weights.contiguous(), block_table,
                lengths.contiguous(), logits, s_q, pages, blocks, h, q.stride(0), q.stride(1),
                q.stride(2), codes.stride(0), block_table.stride(0), H=_padded(h),
            )  # fmt: skip
    return logits


def supports_indexer_logits_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
) -> str:
    """Why the kernel can't take these arguments; empty if it can."""
    if cache.stride(0) % 4 or cache.storage_offset() % 4:
        return "the cache's scales lie at no multiples of 4 bytes"
    return _bad_heads(q.shape[2])


def _bad_heads(heads: int) -> str:
    return "" if 1 <= heads <= MOST_HEADS else f"{heads} heads; the kernel takes 1 to {MOST_HEADS}"


def _padded(heads: int) -> int:
    """The side of the product: a power of two, and `tl.dot` takes no less than 16."""
    return max(16, triton.next_power_of_2(heads))
