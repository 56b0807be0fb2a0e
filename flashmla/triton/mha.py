"""Stage 01 in Triton: dense attention over packed sequences of different lengths.

One program holds BLOCK_M queries of one head of one sequence and walks over that sequence's
keys, BLOCK_N at a time, with an online softmax. Nothing of size s_q x s_k is ever stored.
"""

import torch
import triton
import triton.language as tl

from flashmla.triton.common import (
    INTERPRETED,
    LOG2_E,
    compile_target,
    finish_softmax,
    on_device,
    online_softmax,
    split_head_dim,
    unsupported_dtype,
    unsupported_head_dim,
    working_dtype,
)


# region: forward_kernel
@triton.jit(do_not_specialize=["q_tiles"])
def forward_kernel(
    q,  # [total_q, h_q, d_qk]
    k,  # [total_kv, h_kv, d_qk]
    v,  # [total_kv, h_kv, d_v]
    out,  # [total_q, h_q, d_v], contiguous
    lse,  # [total_q, h_q] float32, contiguous
    cu_seqlens_qo,  # [b + 1] int32
    cu_seqlens_kv,  # [b + 1] int32
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    h_q,
    group,  # query heads to a KV head
    q_tiles,  # tiles of BLOCK_M queries in the longest sequence
    scale_log2,  # softmax scale times log2(e): exp2 is the hardware's exponential
    CAUSAL: tl.constexpr,
    D_MAIN: tl.constexpr,  # d_qk = D_MAIN + D_REST, each a power of two (or 0)
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,  # compute in float32: the interpreter needs it
):
    # region: forward_who
    # The grid is one-dimensional, since only the first dimension may pass 65,535.
    program = tl.program_id(0)
    tile = q_tiles - 1 - program % q_tiles  # the last queries first: causal, they have most to do
    head = program // q_tiles % h_q
    request = program // q_tiles // h_q

    q_begin = tl.load(cu_seqlens_qo + request)
    k_begin = tl.load(cu_seqlens_kv + request)
    s_q = tl.load(cu_seqlens_qo + request + 1) - q_begin
    s_k = tl.load(cu_seqlens_kv + request + 1) - k_begin
    if tile * BLOCK_M >= s_q:
        return
    # endregion: forward_who

    # region: forward_load_q
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M], query within the sequence
    row_exists = row < s_q  # [M]
    q_token = (q_begin + row).to(tl.int64)  # [M], query within the packed tensor
    d_main = tl.arange(0, D_MAIN)
    q_row = q + q_token * q_stride_token + head * q_stride_head  # [M] pointers
    q_main = tl.load(q_row[:, None] + d_main, mask=row_exists[:, None], other=0.0)  # [M, D_MAIN]
    if UPCAST:
        q_main = q_main.to(tl.float32)
    if D_REST > 0:
        d_rest = D_MAIN + tl.arange(0, D_REST)
        q_rest = tl.load(q_row[:, None] + d_rest, mask=row_exists[:, None], other=0.0)
        if UPCAST:
            q_rest = q_rest.to(tl.float32)  # [M, D_REST]
    # endregion: forward_load_q

    # region: forward_limits
    # Query `row` sees keys 0 .. limit-1. Causal: the last query sees the last key.
    limit = tl.zeros([BLOCK_M], tl.int32) + s_k  # [M]
    k_end = s_k
    if CAUSAL:
        limit = tl.maximum(s_k - s_q + 1 + row, 0)
        limit = tl.minimum(limit, s_k)
        k_end = tl.minimum(s_k, tl.maximum(s_k - s_q + (tile + 1) * BLOCK_M, 0))
    # endregion: forward_limits

    acc = tl.zeros([BLOCK_M, D_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    kv_head = head // group
    d_v = tl.arange(0, D_V)

    # region: forward_loop
    for start in range(0, k_end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)  # [N], key within the sequence
        column_exists = column < s_k
        token = (k_begin + column).to(tl.int64)  # [N], key within the packed tensor
        k_row = k + token * k_stride_token + kv_head * k_stride_head  # [N] pointers
        v_row = v + token * v_stride_token + kv_head * v_stride_head  # [N] pointers

        k_main = tl.load(k_row[:, None] + d_main, mask=column_exists[:, None], other=0.0)
        if UPCAST:
            k_main = k_main.to(tl.float32)  # [N, D_MAIN]
        scores = tl.dot(q_main, tl.trans(k_main))  # [M, N] float32
        if D_REST > 0:
            k_rest = tl.load(k_row[:, None] + d_rest, mask=column_exists[:, None], other=0.0)
            if UPCAST:
                k_rest = k_rest.to(tl.float32)  # [N, D_REST]
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)

        visible = column[None, :] < limit[:, None]  # [M, N]
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum)

        values = tl.load(v_row[:, None] + d_v, mask=column_exists[:, None], other=0.0)
        if UPCAST:
            values = values.to(tl.float32)  # [N, D_V]
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None])  # [M, D_V]
    # endregion: forward_loop

    # region: forward_store
    result, row_lse = finish_softmax(acc, row_max, row_sum)  # [M, D_V], [M]
    slot = (q_begin + row).to(tl.int64) * h_q + head  # [M], into [total_q, h_q]
    out_at = out + slot[:, None] * D_V + d_v
    tl.store(out_at, result.to(out.dtype.element_ty), mask=row_exists[:, None])
    tl.store(lse + slot, row_lse, mask=row_exists)
    # endregion: forward_store


# endregion: forward_kernel


def forward_config(d_qk: int, target: int) -> dict[str, int]:
    """Tile sides, warps and pipeline stages for this head size on `target`.

    At d_qk 192 and d_v 128 the large tiles take 172 KB of the 227 that Hopper and its
    successor in the data centre have; other cards have 99 or fewer.
    """
    if target == 90 or target // 10 == 10:
        if d_qk > 64:
            return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if target >= 80:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def supports_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> str:
    """Why `forward` cannot serve these arguments; empty if it can."""
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if unsupported_dtype(q.dtype):
        return f"q has dtype {q.dtype}, allowed are bfloat16 and float16"
    if unsupported_head_dim(d_qk) or unsupported_head_dim(d_v) or split_head_dim(d_v)[1]:
        return (
            f"head sizes {d_qk} and {d_v}; the first must be a power of two or the sum of two, the "
            "second a power of two, all of at least 16"
        )
    return ""


# region: forward_launch
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed sequences; the last dimension of q, k and v is contiguous.

    q [total_q, h_q, d_qk], k [total_kv, h_kv, d_qk], v [total_kv, h_kv, d_v], bf16 or fp16;
    cu_seqlens_qo and cu_seqlens_kv [b + 1] int32. Other strides are free, nothing is copied.
    Returns out [total_q, h_q, d_v] in q's dtype and lse [total_q, h_q] float32, natural log;
    a row with nothing to attend to gives out 0 and LSE +inf.
    `supports_forward` says which head sizes are served.
    """
    total_q, h_q, d_qk = q.shape
    h_kv, d_v = v.shape[1:]
    d_main, d_rest = split_head_dim(d_qk)

    out = torch.empty(total_q, h_q, d_v, dtype=working_dtype(q.dtype), device=q.device)
    lse = torch.empty(total_q, h_q, dtype=torch.float32, device=q.device)
    config = forward_config(d_qk, compile_target(q.device))
    q_tiles = triton.cdiv(max_seqlen_qo, config["BLOCK_M"])
    b = cu_seqlens_qo.shape[0] - 1
    programs = q_tiles * h_q * b
    if programs:
        with on_device(q.device):
            forward_kernel[(programs,)](
                q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                h_q, h_q // h_kv, q_tiles, softmax_scale * LOG2_E.value,
                CAUSAL=causal, D_MAIN=d_main, D_REST=d_rest, D_V=d_v, UPCAST=INTERPRETED,
                **config,
            )  # fmt: skip
    return out.to(q.dtype), lse


# endregion: forward_launch
