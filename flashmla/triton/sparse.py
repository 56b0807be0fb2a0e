"""Stages 05 and 06 in Triton: attention over named tokens, of a cache in 16 bits or in FP8.

A program takes one query and a tile of its heads, and goes through the names of the tokens that
the query may see, a block of them at a time. The names are a list, or those that a block table
gives to the positions of a sequence, one after the other: then it is dense decoding. Tokens
are gathered wherever they lie; an FP8 token is multiplied out to the type of the query on its way.
"""

import torch
import triton
import triton.language as tl

from flashmla.fp8 import BYTES_PER_TOKEN
from flashmla.triton.common import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    TILE,
    byte_views,
    compile_target,
    e4m3_values,
    finish_softmax,
    misplaced,
    on_device,
    online_softmax,
    sink_share,
    unsupported_dtype,
    working_dtype,
)

__all__ = [
    "dense_decode",
    "sparse_decode",
    "sparse_prefill",
    "supports_dense_decode",
    "supports_sparse_decode",
    "supports_sparse_prefill",
]

D_V, HEAD_DIMS = 512, (512, 576)


# region: load_tokens
@triton.jit
def load_nope(
    k_cache, codes, scales, row, valid, D_V: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr
):
    """The first D_V numbers of the tokens at row [N], in elements (bytes if FP8): [N, D_V]."""
    column = tl.arange(0, D_V)
    at = row[:, None] + column[None, :]
    if FP8:
        code = tl.load(codes + at, mask=valid[:, None], other=0).to(tl.int32)
        scale_at = ((row + D_V) // 4)[:, None] + (column // TILE)[None, :]
        scale = tl.load(scales + scale_at, mask=valid[:, None], other=0).to(
            tl.float32, bitcast=True
        )
        return (e4m3_values(code) * scale).to(DTYPE)
    return tl.load(k_cache + at, mask=valid[:, None], other=0.0).to(DTYPE)


@triton.jit
def load_rope(
    k_cache,
    rope,
    row,
    valid,
    D_V: tl.constexpr,
    D_ROPE: tl.constexpr,
    FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The numbers behind them: [N, D_ROPE]."""
    column = tl.arange(0, D_ROPE)
    if FP8:  # 2-byte elements, behind the codes and a float32 scale for each tile of them
        at = ((row + D_V + D_V // TILE * 4) // 2)[:, None] + column[None, :]
        bits = tl.load(rope + at, mask=valid[:, None], other=0).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    at = (row + D_V)[:, None] + column[None, :]
    return tl.load(k_cache + at, mask=valid[:, None], other=0.0).to(DTYPE)


# endregion: load_tokens


# region: sparse_kernel
@triton.jit(do_not_specialize=["names", "page", "num_tokens"])
def sparse_kernel(
    q,  # [b, s_q, h_q, d_qk]
    k_cache,  # [blocks, page, d_qk] of q's dtype; not read if FP8
    codes,  # [blocks, page, 656] uint8: the cache, if FP8
    scales,  # [blocks, page, 164] int32: the same bytes
    rope,  # [blocks, page, 328] int16: the same bytes
    indices,  # [b * s_q, names] int32: tokens; or the block table [b, names / page]
    limits,  # [b * s_q] int32: how many names count; not read without HAS_LIMIT
    attn_sink,  # [h_q] float32, natural units; not read unless HAS_SINK
    out,  # [b, s_q, h_q, d_v], contiguous
    lse,  # float32 [b, h_q, s_q], contiguous
    max_logits,  # the same; not written unless HAS_MAX
    q_stride_request,
    q_stride_token,
    q_stride_head,
    k_stride_block,  # elements of k_cache, bytes if FP8
    k_stride_token,
    names_stride,
    s_q,
    h_q,
    names,
    page,
    num_tokens,  # blocks * page
    scale_log2,  # softmax scale times log2(e)
    PAGED: tl.constexpr,  # names are positions, which the block table gives blocks to
    FP8: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_MAX: tl.constexpr,
    D_V: tl.constexpr,  # d_qk = D_V + D_ROPE
    D_ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # heads of a program
    BLOCK_N: tl.constexpr,  # tokens of a step
    UPCAST: tl.constexpr,  # compute in float32: the interpreter needs it
):
    # region: sparse_who
    # Programs of one query read the same tokens: neighbours in the grid, they meet in L2.
    tiles = tl.cdiv(h_q, BLOCK_M)
    row = tl.program_id(0).to(tl.int64) // tiles  # of b * s_q
    head = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    exists = head < h_q  # [M]
    request, query = row // s_q, row % s_q
    limit = names
    if HAS_LIMIT:
        limit = tl.minimum(tl.load(limits + row), names)
    d_v = tl.arange(0, D_V)
    DTYPE: tl.constexpr = tl.float32 if UPCAST else q.dtype.element_ty
    # endregion: sparse_who

    q_row = q + request * q_stride_request + query * q_stride_token + head * q_stride_head
    q_nope = tl.load(q_row[:, None] + d_v, mask=exists[:, None], other=0.0).to(DTYPE)  # [M, D_V]
    if D_ROPE > 0:
        d_rope = D_V + tl.arange(0, D_ROPE)
        q_rope = tl.load(q_row[:, None] + d_rope, mask=exists[:, None], other=0.0).to(DTYPE)

    acc = tl.zeros([BLOCK_M, D_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, limit, BLOCK_N):
        # region: sparse_gather
        name = start + tl.arange(0, BLOCK_N)  # [N]
        counts = name < limit
        if PAGED:
            table = indices + request * names_stride
            block = tl.load(table + name // page, mask=counts, other=-1).to(tl.int64)
            token = block * page + name % page
        else:
            token = tl.load(indices + row * names_stride + name, mask=counts, other=-1).to(tl.int64)
        # Only what lies within the cache is read: all else is 0 and masked.
        valid = counts & (token >= 0) & (token < num_tokens)  # [N]
        k_row = token // page * k_stride_block + token % page * k_stride_token  # [N]
        k_nope = load_nope(k_cache, codes, scales, k_row, valid, D_V, FP8, DTYPE)
        # endregion: sparse_gather

        scores = tl.dot(q_nope, tl.trans(k_nope))  # [M, N] float32
        if D_ROPE > 0:
            k_rope = load_rope(k_cache, rope, k_row, valid, D_V, D_ROPE, FP8, DTYPE)
            scores = tl.dot(q_rope, tl.trans(k_rope), scores)
        scores = tl.where(valid[None, :], scores * scale_log2, float("-inf"))
        weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum)
        acc = tl.dot(weights.to(DTYPE), k_nope, acc * rescale[:, None])  # [M, D_V]

    # region: sparse_store
    result, row_lse = finish_softmax(acc, row_max, row_sum)  # [M, D_V], [M]
    if HAS_SINK:
        sink = tl.load(attn_sink + head, mask=exists, other=0.0)  # [M]
        result *= sink_share(row_lse, sink)[:, None]
    out_at = out + (row * h_q + head)[:, None] * D_V + d_v
    tl.store(out_at, result.to(out.dtype.element_ty), mask=exists[:, None])
    at = (request * h_q + head) * s_q + query  # [M], into [b, h_q, s_q]
    tl.store(lse + at, row_lse, mask=exists)
    if HAS_MAX:
        tl.store(max_logits + at, row_max * LN_2, mask=exists)
    # endregion: sparse_store


# endregion: sparse_kernel


def sparse_config(heads: int, target: int) -> dict[str, int]:
    """Tile sides, warps and pipeline stages for ``heads`` heads to a query on ``target``.

    64 gathered tokens of 576 and 64 rows of q take 72 KB each, as in dense decode; but there is
    no block of them that a copy engine could bring ahead of time.
    """
    if target >= 90:
        wide = heads > 16
        return {"BLOCK_M": 64 if wide else 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if target >= 80:  # 99 KB at the least
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


def _attend(
    q: torch.Tensor,  # [b, s_q, h_q, d_qk]
    cache: torch.Tensor,  # [blocks, page, 1, d_qk or 656]
    indices: torch.Tensor,  # [b * s_q, names], or a block table [b, max_blocks]
    limits: torch.Tensor | None,  # int32 [b * s_q]
    scale: float,
    attn_sink: torch.Tensor | None,
    paged: bool = False,
    want_max: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [b, s_q, h_q, 512], lse [b, h_q, s_q], max_logits the same or empty)."""
    b, s_q, h_q, d_qk = q.shape
    blocks, page, _, width = cache.shape
    fp8 = width == BYTES_PER_TOKEN
    views = byte_views(cache) if fp8 else (cache, cache, cache)
    names = indices.shape[1] * (page if paged else 1)
    out = q.new_empty(b, s_q, h_q, D_V, dtype=working_dtype(q.dtype))
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    max_logits = torch.empty_like(lse) if want_max else lse.new_empty(0)
    if indices.stride(-1) != 1:
        indices = indices.contiguous()
    if out.numel():
        config = sparse_config(h_q, compile_target(q.device))
        with on_device(q.device):
            sparse_kernel[(b * s_q * triton.cdiv(h_q, config["BLOCK_M"]),)](
                q, cache if not fp8 else q, *views, indices, lse if limits is None else limits,
                lse if attn_sink is None else attn_sink, out, lse, max_logits,
                q.stride(0), q.stride(1), q.stride(2), cache.stride(0), cache.stride(1),
                indices.stride(0), s_q, h_q, names, max(1, page),
                blocks * page, scale * LOG2_E.value, PAGED=paged, FP8=fp8,
                HAS_LIMIT=limits is not None, HAS_SINK=attn_sink is not None, HAS_MAX=want_max,
                D_V=D_V, D_ROPE=d_qk - D_V, UPCAST=INTERPRETED, **config,
            )  # fmt: skip
    return out.to(q.dtype), lse, max_logits


def sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query with the tokens of the cache that its indices name."""
    b, s_q = q.shape[:2]
    limits = None
    if topk_length is not None:
        limits = topk_length.view(b, -1).expand(b, s_q).reshape(-1)
    out, lse, _ = _attend(q, k_cache, indices.flatten(0, 1), limits, softmax_scale, attn_sink)
    return out, lse


def supports_sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    indices: torch.Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
) -> str:
    """Empty if the kernel takes the arguments, else why not."""
    return _refusal(q, k_cache, is_fp8_kvcache)


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
    """Attention over all tokens of each request. No request is split, whatever the plan says."""
    b, s_q = q.shape[:2]
    seen = cache_seqlens.unsqueeze(1).expand(b, s_q)
    if causal:  # the last query sees the last token
        seen = seen - s_q + 1 + torch.arange(s_q, device=q.device, dtype=torch.int32)
    limits = seen.to(torch.int32).reshape(-1)
    out, lse, _ = _attend(q, k_cache, block_table, limits, softmax_scale, attn_sink, paged=True)
    return out, lse


def supports_dense_decode(q: torch.Tensor, k_cache: torch.Tensor, *_: object) -> str:
    """Empty if the kernel takes the arguments, else why not."""
    return _refusal(q, k_cache, True)


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    lse_base_2: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query with the rows of kv [s_kv, 1, d_qk] that its indices name; the LSE
    natural, or to base 2."""
    limits = None if topk_length is None else topk_length.contiguous()
    # Every query a request of its own, every row a page.
    out, lse, max_logits = _attend(
        q.unsqueeze(1), kv.unsqueeze(1), indices[:, 0], limits, sm_scale, attn_sink, want_max=True
    )
    lse = lse[..., 0] * LOG2_E.value if lse_base_2 else lse[..., 0]
    return out[:, 0], max_logits[..., 0], lse


def supports_sparse_prefill(q: torch.Tensor, kv: torch.Tensor, *_: object) -> str:
    """Empty if the kernel takes the arguments, else why not."""
    return _refusal(q, kv, False)


def _refusal(q: torch.Tensor, cache: torch.Tensor, fp8: bool) -> str:
    if unsupported_dtype(q.dtype) or (fp8 and q.dtype != torch.bfloat16):
        allowed = "bfloat16" if fp8 else "bfloat16 and float16"
        return f"q has dtype {q.dtype}, allowed are {allowed}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q has head size {q.shape[-1]}, allowed are 512 and 576"
    if fp8 and misplaced(cache):
        return "the cache's tokens do not lie at multiples of 4 bytes"
    return ""
