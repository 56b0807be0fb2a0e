"""Decoding over the paged latent cache: ``flash_mla_with_kvcache``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashmla import backend
from flashmla.checks import (
    check_block_table,
    check_bool,
    check_int,
    check_number,
    check_page_strides,
    check_shape,
    check_tensor,
    float_dtypes,
    values_wanted,
)
from flashmla.fp8 import BYTES_PER_TOKEN, CACHE_DTYPES, check_scales, slots_in_use
from flashmla.ops import dsa
from flashmla.ops.library import define
from flashmla.ops.split_kv import SplitPlan, check_plan_fresh, check_plan_tensors

__all__ = ["HEAD_DIM_QK", "HEAD_DIM_V", "flash_mla_with_kvcache"]

HEAD_DIM_QK = 576
"""512 latent dimensions and 64 rotated ones (RoPE). Dense decode takes keys without RoPE, 512, as
well."""

HEAD_DIM_V = 512
"""The latent dimensions, which are the values too."""

_DEFAULT_SCALES = {d_qk: d_qk**-0.5 for d_qk in (HEAD_DIM_QK, HEAD_DIM_V)}


def _fake_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    b, s_q, h_q, _ = q.shape
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    return q.new_empty(b, s_q, h_q, head_dim_v), lse


_dense_decode = define(
    "mla.dense_decode",
    "(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, int head_dim_v, "
    "Tensor tile_scheduler_metadata, Tensor num_splits, float softmax_scale, bool causal, "
    "Tensor? attn_sink=None) -> (Tensor, Tensor)",
    _fake_dense_decode,
)
_dense_decode_fp8 = define(
    "fp8.dense_decode",
    "(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, int head_dim_v, "
    "Tensor tile_scheduler_metadata, Tensor num_splits, float softmax_scale, bool causal, "
    "Tensor? attn_sink=None) -> (Tensor, Tensor)",
    _fake_dense_decode,
)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor | SplitPlan | None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MLA decoding over a paged cache: dense, or over the tokens that ``indices`` names.

    Keys and values are the same 576 numbers a token: all of them are the key, the first 512 the
    value. Dense decode takes caches of 512 as well, without a RoPE part. Nothing beyond a length,
    in an unused page, behind index -1 or out of range is read into a result, NaN included. A block
    number out of range within the length is the caller's mistake: nothing outside the cache is
    read, and the result is unspecified. The results carry no gradients.

    Args:
        q: [b, s_q, h_q, 576], bfloat16 or float16; float32 on CPU tensors as well. Dense: 512 too.
        k_cache: [blocks, page, h_kv, 576] of q's dtype, h_q a multiple of h_kv. The stride between
            pages is free, so a slice of a larger cache will do. Any page size; for dense decode the
            Hopper kernel takes 16, 32, 64 (the fastest), 128 and 256. With ``is_fp8_kvcache``
            [blocks, page, 1, 656] of float8_e4m3fn, uint8 or int8 (see :mod:`flashmla.fp8`).
        block_table: int32 [b, max_blocks], the pages of each request in order; what lies behind a
            request's length may hold anything. May be None with ``indices``.
        cache_seqlens: int32 [b], tokens of each request; 0 is allowed. May be None with
            ``indices``.
        head_dim_v: 512.
        tile_scheduler_metadata: the plan of :func:`get_mla_metadata` for these lengths, in either
            form: int32 [parts, 8], batch-invariant [parts, 16], or the object, which the first call
            fills in. A sparse call takes None as well, and reads no plan.
        num_splits: int32 [b + 1], the plan's second tensor; None with the object.
        softmax_scale: what scores are multiplied by; d_qk ** -0.5 unless given.
        causal: dense only. Query i of s_q sees the keys at positions up to
            length - s_q + i: the last query is aligned with the last key.
        is_fp8_kvcache: the cache holds 656-byte FP8 tokens. Attention is over what they stand for,
            code * scale; kernels round that product at most once, to q's dtype.
        indices: int32 [b, s_q, topk], the tokens that each query reads, as
            block * page + offset; -1 is skipped, and so is whatever lies out of range.
        attn_sink: float32 [h_q]: scales the output by exp(lse) / (exp(lse) + exp(sink)) and leaves
            the LSE alone; -inf is no sink, +inf leaves nothing.
        extra_k_cache: None; a second cache is not supported yet, nor are its companions.
        extra_indices_in_kvcache: None.
        topk_length: int32 [b] or [b, s_q], sparse only: how many of a query's indices count.
        extra_topk_length: None.

    Returns:
        (out, lse): out [b, s_q, h_q, 512] in q's dtype; lse float32 [b, h_q, s_q], the natural
        logarithm of the sum of exp(scaled score). A query with nothing to attend to gives
        out 0 and lse +inf.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape, device, stride or head size, h_q not a multiple of h_kv,
            or a plan of another batch size. With ``FLASHMLA_CHECK=1`` also lengths, block numbers
            and indices out of range, scales that are read and not positive and finite, and a plan
            made for other lengths.
        NotImplementedError: ``extra_k_cache`` or a companion is given.

    Example:
        >>> cache = flashmla.PagedKVCache(num_pages=8)
        >>> sequence = cache.allocate(torch.randn(100, 576).bfloat16())
        >>> block_table, cache_seqlens = cache.tables([sequence])
        >>> q = torch.randn(1, 2, 16, 576).bfloat16()
        >>> plan, _ = flashmla.get_mla_metadata()
        >>> out, lse = flashmla.flash_mla_with_kvcache(
        ...     q, cache.kv, block_table, cache_seqlens, 512, plan, causal=True
        ... )
        >>> out.shape, lse.shape
        (torch.Size([1, 2, 16, 512]), torch.Size([1, 16, 2]))

    Source: ``flashmla/torch/mla.py``, ``flashmla/triton/mla.py``, ``csrc/sm90/dense_decode/``;
    sparse, and over an FP8 cache: ``flashmla/torch/dsa.py``, ``flashmla/torch/fp8.py``,
    ``flashmla/triton/sparse.py``, ``csrc/sm90/sparse_decode/``.
    """
    if extra_k_cache is extra_indices_in_kvcache is extra_topk_length is None:
        results = None
        if is_compiling():
            pass
        elif indices is not None:
            results = _try_sparse_decode(
                q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
                num_splits, softmax_scale, causal, is_fp8_kvcache, indices, attn_sink, topk_length,
            )  # fmt: skip
        elif is_fp8_kvcache is False and topk_length is None:
            results = _try_dense_decode(
                q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
                num_splits, softmax_scale, causal, attn_sink,
            )  # fmt: skip
        if results is not None:
            return results
    extras = {
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
    }
    for name, extra in extras.items():
        if extra is not None:
            raise NotImplementedError(f"{name} must be None: a second cache is not supported yet")
    check_bool("causal", causal)
    check_bool("is_fp8_kvcache", is_fp8_kvcache)
    d_qk = _check_query(q, head_dim_v, indices is not None, is_fp8_kvcache)
    scale = d_qk**-0.5 if softmax_scale is None else check_number("softmax_scale", softmax_scale)
    if indices is not None:
        if causal:
            raise ValueError("causal must be False with indices: they say what each query sees")
        _check_sparse_plan(tile_scheduler_metadata, num_splits, q)
        if block_table is not None:
            _check_per_request("block_table", block_table, "[b, max_blocks]", q)
        if cache_seqlens is not None:
            _check_per_request("cache_seqlens", cache_seqlens, "[b]", q)
        results = dsa.sparse_decode(
            q, k_cache, indices, head_dim_v, scale, is_fp8_kvcache, attn_sink, topk_length
        )
        if isinstance(tile_scheduler_metadata, SplitPlan):
            tile_scheduler_metadata.claim(q.shape[0], sparse=True)
        return results
    if topk_length is not None:
        raise ValueError("topk_length must be None without indices: it is for sparse decode")
    return _checked_dense_decode(
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, scale, causal,
        is_fp8_kvcache, attn_sink,
    )  # fmt: skip


def _try_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    plan: Tensor | SplitPlan | None,
    num_splits: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """A dense call in good order on a Hopper card, which the kernels' library checks by itself.

    Checking here, argument by argument, takes longer than launching the kernels. None, and nothing
    done, if anything at all is not as usual: the checks below then say what, or let it pass.
    """
    if type(q) is not Tensor or not q.is_cuda or q.dim() != 4:
        return None
    kernel = backend.shortcut("mla.dense_decode", q.device)
    scale = _DEFAULT_SCALES.get(q.shape[3]) if softmax_scale is None else softmax_scale
    if kernel is None or type(scale) is not float or type(causal) is not bool:
        return None
    if type(head_dim_v) is not int or head_dim_v != HEAD_DIM_V:
        return None
    if type(plan) is SplitPlan:
        if num_splits is not None or type(cache_seqlens) is not Tensor:
            return None
        ready = plan.ready(cache_seqlens)
        if ready is None:
            return None
        plan, num_splits = ready
    results: tuple[Tensor, Tensor] | None = kernel(
        q, k_cache, block_table, cache_seqlens, plan, num_splits, scale, causal, attn_sink
    )
    if results is not None:
        backend.record("mla.dense_decode", "cuda")
    return results


def _try_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    plan: Tensor | SplitPlan | None,
    num_splits: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Tensor,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """A sparse call in good order on a Hopper card, as :func:`_try_dense_decode` has it."""
    if type(q) is not Tensor or not q.is_cuda or q.dim() != 4 or type(is_fp8_kvcache) is not bool:
        return None
    kernel = backend.shortcut("dsa.sparse_decode", q.device)
    scale = _DEFAULT_SCALES.get(q.shape[3]) if softmax_scale is None else softmax_scale
    if kernel is None or type(scale) is not float or causal is not False:
        return None
    if type(head_dim_v) is not int or head_dim_v != HEAD_DIM_V:
        return None
    if type(plan) is SplitPlan:
        if num_splits is not None or not plan.ready_for_sparse(q.shape[0]):
            return None
        plan = None
    results: tuple[Tensor, Tensor] | None = kernel(
        q, k_cache, indices, scale, is_fp8_kvcache, topk_length, attn_sink, block_table,
        cache_seqlens, plan, num_splits,
    )  # fmt: skip
    if results is not None:
        backend.record("dsa.sparse_decode", "cuda")
    return results


def _check_sparse_plan(
    plan: Tensor | SplitPlan | None, num_splits: Tensor | None, q: Tensor
) -> None:
    """A sparse call needs no plan; one that is given has to be of the batch, all the same."""
    if isinstance(plan, SplitPlan):
        _check_no_splits(num_splits)
        plan.serve(q.shape[0], sparse=True)
        if not plan.empty:
            plan.check(q.shape[0], q.device)
    elif plan is None:
        if num_splits is not None:
            raise TypeError("num_splits must be None without tile_scheduler_metadata")
    else:
        check_plan_tensors(
            "tile_scheduler_metadata", plan, "num_splits", num_splits, q.shape[0], q.device
        )


def _check_no_splits(num_splits: object) -> None:
    if num_splits is not None:
        raise TypeError("num_splits must be None with a plan object, which holds its own")


def _check_per_request(name: str, value: object, dims: str, q: Tensor) -> Tensor:
    """The block table or the lengths: int32, a row or a number for each request."""
    tensor = check_tensor(name, value, dims, (torch.int32,), q.device)
    if tensor.shape[0] != q.shape[0]:
        check_shape(name, tensor, (q.shape[0], *(None,) * (tensor.dim() - 1)), dims)
    return tensor


def _check_query(q: object, head_dim_v: object, sparse: bool, is_fp8_kvcache: bool) -> int:
    """d_qk, once q has been found to be in order."""
    q = check_tensor("q", q, "[b, s_q, h_q, 576]", float_dtypes(q))
    d_qk = q.shape[-1]
    if d_qk != HEAD_DIM_QK and (d_qk != HEAD_DIM_V or sparse or is_fp8_kvcache):
        allowed = f"{HEAD_DIM_QK} or {HEAD_DIM_V}"
        if sparse or is_fp8_kvcache:
            allowed = f"{HEAD_DIM_QK} with {'indices' if sparse else 'is_fp8_kvcache=True'}"
        raise ValueError(f"q must have head size {allowed}, got {d_qk}: {list(q.shape)}")
    if check_int("head_dim_v", head_dim_v, 1) != HEAD_DIM_V:
        raise ValueError(
            f"head_dim_v must be {HEAD_DIM_V}, the only one supported, got {head_dim_v}"
        )
    if 0 in (q.shape[1], q.shape[2]):
        raise ValueError(f"q must have at least one token and one head, got {list(q.shape)}")
    return d_qk


def _checked_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    plan: Tensor | SplitPlan | None,
    num_splits: Tensor | None,
    scale: float,
    causal: bool,
    is_fp8_kvcache: bool,
    attn_sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, s_q, h_q, _ = q.shape
    h_kv, page = _check_dense_cache(q, k_cache, is_fp8_kvcache)
    table = _check_per_request("block_table", block_table, "[b, max_blocks]", q)
    seqlens = _check_per_request("cache_seqlens", cache_seqlens, "[b]", q)
    if attn_sink is not None:
        check_tensor("attn_sink", attn_sink, "[h_q]", (torch.float32,), q.device)
        check_shape("attn_sink", attn_sink, (h_q,), "[h_q]")
    if values_wanted():
        check_block_table("cache_seqlens", seqlens, table, k_cache.shape[0], page)
        if is_fp8_kvcache:
            check_scales("k_cache", k_cache, slots_in_use(table, seqlens, page))

    if isinstance(plan, SplitPlan):
        _check_no_splits(num_splits)
        plan.serve(batch, sparse=False)
        metadata, splits = plan.tensors(seqlens, s_q * h_q // h_kv, h_kv)
    else:
        metadata, splits = check_plan_tensors(
            "tile_scheduler_metadata", plan, "num_splits", num_splits, batch, q.device
        )
    check_plan_fresh(metadata, splits, seqlens)
    if isinstance(plan, SplitPlan):
        plan.claim(batch, sparse=False)
    arguments = (
        q, k_cache, table, seqlens, HEAD_DIM_V, metadata, splits, scale, causal, attn_sink
    )  # fmt: skip
    if batch == 0:
        return _fake_dense_decode(*arguments)
    out, lse = (_dense_decode_fp8 if is_fp8_kvcache else _dense_decode)(*arguments)
    return out, lse


def _check_dense_cache(q: Tensor, k_cache: Tensor, is_fp8_kvcache: bool) -> tuple[int, int]:
    """(h_kv, page) of a cache that dense decode can read."""
    h_q, d_qk = q.shape[2:]
    if is_fp8_kvcache:
        dims = "[blocks, page, 1, 656]"
        shape: tuple[int | None, ...] = (None, None, 1, BYTES_PER_TOKEN)
        check_tensor("k_cache", k_cache, dims, CACHE_DTYPES, q.device)
    else:
        dims, shape = "[blocks, page, h_kv, 576]", (None, None, None, d_qk)
        check_tensor("k_cache", k_cache, dims, (q.dtype,), q.device)
    check_shape("k_cache", k_cache, shape, dims)
    _, page, h_kv, _ = k_cache.shape
    if h_kv == 0 or h_q % h_kv:
        raise ValueError(f"q has {h_q} heads, which k_cache's {h_kv} heads do not divide")
    check_page_strides("k_cache", k_cache, dims)
    if page == 0:
        raise ValueError(
            f"k_cache must have pages of at least one token, got {list(k_cache.shape)}"
        )
    return h_kv, page
