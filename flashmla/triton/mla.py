"""Stages 02 and 03 in Triton: MLA decoding over a paged cache, split along the keys.

A program is one part of the split plan, for one KV head and one tile of rows, where a row is
one (query, query head) pair: all the heads of a KV head read the same keys, so they share the
loads. The part's range may begin in the middle of one request, cover others whole, and end in
the middle of another; results of requests that are cut go to a float32 workspace, which
`flashmla.triton.split_kv.combine` merges.

The latent is key and value at once: the values are the first `d_v` columns of the keys, so
each tile of the cache is loaded once and used in both products.
"""

import torch
import triton
import triton.language as tl

from flashmla.schedule import TILE, max_slots
from flashmla.triton.common import (
    INTERPRETED,
    LOG2_E,
    compile_target,
    finish_softmax,
    on_device,
    online_softmax,
    sink_share,
    split_head_dim,
    unsupported_dtype,
    unsupported_head_dim,
    working_dtype,
)
from flashmla.triton.split_kv import combine


# region: dense_decode_kernel
@triton.jit(do_not_specialize=["b", "num_slots", "num_blocks", "max_blocks"])
def dense_decode_kernel(
    q,  # [b, s_q, h_q, d_qk]
    k_cache,  # [blocks, page, h_kv, d_qk]
    block_table,  # [b, max_blocks] int32
    cache_seqlens,  # [b] int32
    tile_scheduler_metadata,  # [parts, 8] int32, batch-invariant [parts, 16]
    num_splits,  # [b + 1] int32
    attn_sink,  # [h_q] float32, natural units; not read unless HAS_SINK
    out,  # [b, s_q, h_q, d_v], contiguous
    lse,  # [b, h_q, s_q] float32, contiguous
    out_partial,  # [slots, s_q, h_q, d_v] float32, contiguous
    lse_partial,  # [slots, h_q, s_q] float32, contiguous
    q_stride_request,
    q_stride_token,
    q_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    table_stride,
    b,
    num_slots,
    s_q,
    h_q,
    group,  # query heads to a KV head
    num_blocks,
    max_blocks,
    scale_log2,  # softmax scale times log2(e)
    CAUSAL: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PLAN_COLUMNS: tl.constexpr,  # 8 or 16
    PAGE: tl.constexpr,  # tokens to a page
    TILE: tl.constexpr,  # tokens to a tile of the plan
    D_V: tl.constexpr,  # d_qk = D_V + D_ROPE
    D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # tokens of a step, a divisor of TILE
    UPCAST: tl.constexpr,  # compute in float32: the interpreter needs it
):
    # region: decode_who
    # Programs that read the same keys are neighbours in the grid, and meet in the L2 cache.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    row_exists = row < s_q * group  # [M]
    query = row // group  # [M], 0 .. s_q-1
    head = kv_head * group + row % group  # [M], 0 .. h_q-1
    d_v = tl.arange(0, D_V)
    # endregion: decode_who

    # region: decode_part
    plan = tile_scheduler_metadata + part * PLAN_COLUMNS
    begin_request = tl.load(plan + 0)
    begin_tile = tl.load(plan + 1)
    end_request = tl.load(plan + 2)
    end_tile = tl.load(plan + 3)
    begin_split = tl.load(plan + 4)
    chunk = tl.load(plan + 5) * TILE  # tokens that make a result of their own; 0: all there are
    # endregion: decode_part

    # An end tile of 0 means that the end request is not touched at all. A plan made for another
    # batch gives wrong results, but touches nothing outside the tensors.
    last_request = tl.minimum(end_request + (end_tile > 0).to(tl.int32), b)
    for request in range(tl.maximum(begin_request, 0), last_request):
        # region: decode_range
        request64 = tl.cast(request, tl.int64)  # its offsets may pass 2^31
        length = tl.minimum(tl.load(cache_seqlens + request), max_blocks * PAGE)
        length = tl.maximum(length, 0)
        first_token = tl.where(request == begin_request, tl.maximum(begin_tile, 0) * TILE, 0)
        last_token = tl.where(request == end_request, tl.minimum(end_tile * TILE, length), length)
        stretch = tl.where(chunk > 0, chunk, tl.maximum(last_token - first_token, 1))
        first_slot = tl.load(num_splits + request)
        splits = tl.load(num_splits + request + 1) - first_slot
        slot = first_slot + tl.where(request == begin_request, begin_split, 0)
        # Query i sees tokens 0 .. limit-1. Causal: the last query sees the last token.
        limit = tl.zeros([BLOCK_M], tl.int32) + length  # [M]
        if CAUSAL:
            limit = length - s_q + 1 + query
        # endregion: decode_range

        # region: decode_load_q
        q_row = q + request64 * q_stride_request
        q_row += query * q_stride_token + head * q_stride_head  # [M] pointers
        q_nope = tl.load(q_row[:, None] + d_v, mask=row_exists[:, None], other=0.0)  # [M, D_V]
        if UPCAST:
            q_nope = q_nope.to(tl.float32)
        if D_ROPE > 0:
            d_rope = D_V + tl.arange(0, D_ROPE)
            q_rope = tl.load(q_row[:, None] + d_rope, mask=row_exists[:, None], other=0.0)
            if UPCAST:
                q_rope = q_rope.to(tl.float32)  # [M, D_ROPE]
        # endregion: decode_load_q

        # One result, unless the plan has chunks; an empty stretch has one too.
        table_row = block_table + request64 * table_stride
        for begin in range(first_token, tl.maximum(last_token, first_token + 1), stretch):
            acc = tl.zeros([BLOCK_M, D_V], tl.float32)
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)

            for start in range(begin, tl.minimum(begin + stretch, last_token), BLOCK_N):
                # region: decode_gather
                # Only tokens within the length look into the block table, and only block numbers
                # within the cache are followed: all else is 0 and masked below.
                token = start + tl.arange(0, BLOCK_N)  # [N]
                exists = token < length  # [N]
                if PAGE % BLOCK_N == 0:
                    block = tl.load(table_row + start // PAGE)  # all the tokens are in one page
                else:
                    block = tl.load(table_row + token // PAGE, mask=exists, other=-1)  # [N]
                readable = exists & (block >= 0) & (block < num_blocks)  # [N]
                k_row = k_cache + block.to(tl.int64) * k_stride_block  # a cache may pass 4 GiB
                k_row += (token % PAGE) * k_stride_token + kv_head * k_stride_head  # [N] pointers
                k_nope = tl.load(k_row[:, None] + d_v, mask=readable[:, None], other=0.0)
                if UPCAST:
                    k_nope = k_nope.to(tl.float32)  # [N, D_V]
                # endregion: decode_gather

                # region: decode_scores
                scores = tl.dot(q_nope, tl.trans(k_nope))  # [M, N] float32
                if D_ROPE > 0:
                    k_rope = tl.load(k_row[:, None] + d_rope, mask=readable[:, None], other=0.0)
                    if UPCAST:
                        k_rope = k_rope.to(tl.float32)  # [N, D_ROPE]
                    scores = tl.dot(q_rope, tl.trans(k_rope), scores)
                visible = exists[None, :] & (token[None, :] < limit[:, None])  # [M, N]
                scores = tl.where(visible, scores * scale_log2, float("-inf"))
                # endregion: decode_scores

                # region: decode_accumulate
                weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum)
                # k_nope again: the latent is also the value.
                acc = tl.dot(weights.to(k_nope.dtype), k_nope, acc * rescale[:, None])  # [M, D_V]
                # endregion: decode_accumulate

            # region: decode_store
            result, row_lse = finish_softmax(acc, row_max, row_sum)  # [M, D_V], [M]
            if splits == 1:
                out_row = (request64 * s_q + query) * h_q + head  # [M], into [b, s_q, h_q]
                lse_row = (request64 * h_q + head) * s_q + query  # [M], into [b, h_q, s_q]
                out_at = out + out_row[:, None] * D_V + d_v
                if HAS_SINK:
                    sink = tl.load(attn_sink + head, mask=row_exists, other=0.0)  # [M]
                    result *= sink_share(row_lse, sink)[:, None]
                tl.store(out_at, result.to(out.dtype.element_ty), mask=row_exists[:, None])
                tl.store(lse + lse_row, row_lse, mask=row_exists)
            else:
                slot64 = tl.cast(slot, tl.int64)
                writes = row_exists & (slot >= 0) & (slot < num_slots)  # [M]
                out_row = (slot64 * s_q + query) * h_q + head  # [M], into [slots, s_q, h_q]
                lse_row = (slot64 * h_q + head) * s_q + query  # [M], into [slots, h_q, s_q]
                tl.store(out_partial + out_row[:, None] * D_V + d_v, result, mask=writes[:, None])
                tl.store(lse_partial + lse_row, row_lse, mask=writes)
            slot += 1
            # endregion: decode_store


# endregion: dense_decode_kernel


def decode_config(rows: int, target: int) -> dict[str, int]:
    """Tile sides, warps and pipeline stages for `rows` rows to a KV head on `target`.

    Shared memory decides: 64 tokens of 576 take 72 KB, as much as 64 rows of q. The
    accumulator, 64 rows of 512 in float32, takes 128 registers of each of 256 threads.
    """
    if target == 90:  # 227 KB; from 64 rows on Triton uses the warpgroups' matrix instruction
        if rows <= 16:
            return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 5}
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    if target // 10 == 10:  # 227 KB, of which the pipelined product here takes more
        if rows <= 16:
            return {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    if target >= 80:  # 99 KB at the least
        if rows <= 16:
            return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def supports_dense_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    *_: object,
) -> str:
    """Why `dense_decode` cannot serve these arguments; empty if it can."""
    d_qk = q.shape[-1]
    if unsupported_dtype(q.dtype):
        return f"q has dtype {q.dtype}, allowed are bfloat16 and float16"
    if unsupported_head_dim(d_qk) or head_dim_v != split_head_dim(d_qk)[0]:
        return (
            f"d_qk {d_qk} with head_dim_v {head_dim_v}; head_dim_v and d_qk - head_dim_v must be "
            "powers of two of at least 16, the first the larger, the second possibly 0"
        )
    return ""


# region: dense_decode_launch
def dense_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decoding: q [b, s_q, h_q, d_qk] against a paged cache [blocks, page, h_kv, d_qk].

    bf16 or fp16, last dimensions contiguous, other strides free; block_table [b, max_blocks],
    cache_seqlens [b], tile_scheduler_metadata [parts, 8 or 16] and num_splits [b + 1] int32;
    attn_sink [h_q] float32. The values are the first head_dim_v columns of the keys. Causal
    masking aligns the last query with the last token. Returns out [b, s_q, h_q, head_dim_v] in
    q's dtype and lse [b, h_q, s_q] float32, natural log; nothing to attend to gives out 0 and
    LSE +inf.

    Nothing beyond a length or outside the cache is read. `supports_dense_decode` says which
    head sizes are served.
    """
    b, s_q, h_q, d_qk = q.shape
    num_blocks, page, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    parts, columns = tile_scheduler_metadata.shape
    slots = max_slots((parts, columns), b, block_table.shape[1] * page)

    out = q.new_empty(b, s_q, h_q, head_dim_v, dtype=working_dtype(q.dtype))
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    out_partial = q.new_empty(slots, s_q, h_q, head_dim_v, dtype=torch.float32)
    lse_partial = q.new_empty(slots, h_q, s_q, dtype=torch.float32)
    if out.numel():
        config = decode_config(s_q * group, compile_target(q.device))
        grid = (triton.cdiv(s_q * group, config["BLOCK_M"]), h_kv, parts)
        with on_device(q.device):
            dense_decode_kernel[grid](
                q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits,
                lse if attn_sink is None else attn_sink, out, lse, out_partial, lse_partial,
                q.stride(0), q.stride(1), q.stride(2),
                k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), block_table.stride(0),
                b, slots, s_q, h_q, group, num_blocks, block_table.shape[1],
                softmax_scale * LOG2_E.value,
                CAUSAL=causal, HAS_SINK=attn_sink is not None, PLAN_COLUMNS=columns, PAGE=page,
                TILE=TILE, D_V=head_dim_v, D_ROPE=d_qk - head_dim_v, UPCAST=INTERPRETED, **config,
            )  # fmt: skip
            combine(out_partial, lse_partial, num_splits, out, lse, attn_sink)
    return out.to(q.dtype), lse


# endregion: dense_decode_launch
