"""DeepSeek sparse attention: the indexer's scores, exact top-k, attention over chosen tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.checks import (
    check_block_table,
    check_bool,
    check_int,
    check_number,
    check_page_strides,
    check_range,
    check_shape,
    check_tensor,
    float_dtypes,
    values_wanted,
)
from flashmla.fp8 import (
    BYTES_PER_TOKEN,
    CACHE_DTYPES,
    HEAD_DIM,
    INDEX_BYTES_PER_TOKEN,
    INDEX_DIM,
    INDEX_PAGE,
    check_index_scales,
    check_scales,
)
from flashmla.ops.library import define

__all__ = [
    "INDEX_BYTES_PER_TOKEN",
    "INDEX_DIM",
    "INDEX_PAGE",
    "flash_mla_sparse_fwd",
    "indexer_logits",
    "indexer_logits_paged",
    "sparse_decode",
    "topk",
]

PREFILL_HEAD_DIMS = (576, 512)
"""d_qk of sparse prefill: with RoPE dimensions and without."""


def _fake_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, s_q, h_q, _ = q.shape
    lse = q.new_empty(b, h_q, s_q, dtype=torch.float32)
    return q.new_empty(b, s_q, h_q, head_dim_v), lse


def _fake_sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    lse_base_2: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    s_q, h_q, _ = q.shape
    row = q.new_empty(s_q, h_q, dtype=torch.float32)
    return q.new_empty(s_q, h_q, d_v), row, torch.empty_like(row)


def _fake_indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[0], dtype=torch.float32)


def _fake_indexer_logits_paged(
    q: Tensor, cache: Tensor, weights: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    width = block_table.shape[1] * cache.shape[1]
    return q.new_empty(q.shape[0], q.shape[1], width, dtype=torch.float32)


def _fake_topk(
    logits: Tensor, k: int, lengths: Tensor | None, block_table: Tensor | None, page: int
) -> Tensor:
    return logits.new_empty(logits.shape[0], k, dtype=torch.int32)


_sparse_decode = define(
    "dsa.sparse_decode",
    "(Tensor q, Tensor k_cache, Tensor indices, int head_dim_v, float softmax_scale, "
    "bool is_fp8_kvcache, Tensor? attn_sink, Tensor? topk_length) -> (Tensor, Tensor)",
    _fake_sparse_decode,
)
_sparse_prefill = define(
    "dsa.sparse_prefill",
    "(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v, Tensor? attn_sink, "
    "Tensor? topk_length, bool lse_base_2) -> (Tensor, Tensor, Tensor)",
    _fake_sparse_prefill,
)
_indexer_logits = define(
    "dsa.indexer_logits",
    "(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor start, Tensor end) -> Tensor",
    _fake_indexer_logits,
)
_indexer_logits_paged = define(
    "dsa.indexer_logits_paged",
    "(Tensor q, Tensor cache, Tensor weights, Tensor block_table, Tensor lengths) -> Tensor",
    _fake_indexer_logits_paged,
)
_topk = define(
    "dsa.topk",
    "(Tensor logits, int k, Tensor? lengths, Tensor? block_table, int page) -> Tensor",
    _fake_topk,
)


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    is_fp8_kvcache: bool,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sparse half of :func:`flashmla.flash_mla_with_kvcache`, which has checked q."""
    b, s_q, h_q, _ = q.shape
    width, dtypes = (BYTES_PER_TOKEN, CACHE_DTYPES) if is_fp8_kvcache else (HEAD_DIM, (q.dtype,))
    dims = f"[blocks, page, 1, {width}]"
    check_tensor("k_cache", k_cache, dims, dtypes, q.device)
    check_shape("k_cache", k_cache, (None, None, 1, width), dims)
    check_page_strides("k_cache", k_cache, dims)
    check_tensor("indices", indices, "[b, s_q, topk]", (torch.int32,), q.device)
    check_shape("indices", indices, (b, s_q, None), "[b, s_q, topk]")
    _check_sink(attn_sink, h_q, q.device)
    if topk_length is not None:
        per_query = isinstance(topk_length, Tensor) and topk_length.dim() == 2
        length_dims = "[b, s_q]" if per_query else "[b]"
        check_tensor("topk_length", topk_length, length_dims, (torch.int32,), q.device)
        check_shape("topk_length", topk_length, (b, s_q) if per_query else (b,), length_dims)
        if not topk_length.is_contiguous():
            raise ValueError(
                f"topk_length must be contiguous, got strides {list(topk_length.stride())}"
            )
    if values_wanted():
        last = k_cache.shape[0] * k_cache.shape[1] - 1
        counted = _counted(indices, topk_length)
        check_range("indices", counted, -1, last, "block * page + offset, or -1 to skip,")
        if is_fp8_kvcache:
            check_scales("k_cache", k_cache, counted[counted >= 0].long())
    arguments = (q, k_cache, indices, head_dim_v, softmax_scale, is_fp8_kvcache)
    if b == 0:
        return _fake_sparse_decode(*arguments, attn_sink, topk_length)
    return _sparse_decode(*arguments, attn_sink, topk_length)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    lse_base_2: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill: each query attends to the tokens that its indices name.

    An index given twice counts twice. What an index does not point to is never read into a
    result, NaN included.

    Args:
        q: [s_q, h_q, d_qk], bfloat16 or float16; float32 on CPU tensors as well; d_qk 576 or 512.
        kv: [s_kv, 1, d_qk] of q's dtype; the first 512 numbers of a token are its value too.
        indices: int32 [s_q, 1, topk], rows of kv; negative or at least s_kv is skipped.
        sm_scale: what scores are multiplied by.
        d_v: 512.
        attn_sink: float32 [h_q]: scales the output by exp(lse) / (exp(lse) + exp(sink)) and
            leaves the LSE alone. Such an output can no longer be merged.
        topk_length: int32 [s_q], how many of a query's indices count.
        lse_base_2: the LSE as a logarithm to base 2, as some published text has it, instead of the
            natural one. Merge only natural ones. max_logits are the same either way.

    Returns:
        (out, max_logits, lse): out [s_q, h_q, 512] in q's dtype; max_logits float32 [s_q, h_q],
        the largest scaled score, -inf where nothing was valid; lse float32 [s_q, h_q], the
        logarithm of the sum of exp(scaled score), natural unless ``lse_base_2``. A query with
        nothing to attend to gives out 0 and lse +inf.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape, device, stride or head size; with ``FLASHMLA_CHECK=1``
            also a topk_length out of range, and an index other than -1 that is.

    Source: ``flashmla/torch/dsa.py``, ``flashmla/triton/sparse.py``,
    ``csrc/sm90/sparse_prefill/``.
    """
    dims = "[s_q, h_q, d_qk]"
    check_tensor("q", q, dims, float_dtypes(q))
    s_q, h_q, d_qk = q.shape
    if d_qk not in PREFILL_HEAD_DIMS:
        raise ValueError(f"q must have head size 576 or 512, got {d_qk}: {list(q.shape)}")
    check_tensor("kv", kv, "[s_kv, 1, d_qk]", (q.dtype,), q.device)
    check_shape("kv", kv, (None, 1, d_qk), "[s_kv, 1, d_qk]")
    check_tensor("indices", indices, "[s_q, 1, topk]", (torch.int32,), q.device)
    check_shape("indices", indices, (s_q, 1, None), "[s_q, 1, topk]")
    scale = check_number("sm_scale", sm_scale)
    if check_int("d_v", d_v, 1) != 512:
        raise ValueError(f"d_v must be 512, the only one supported, got {d_v}")
    _check_sink(attn_sink, h_q, q.device)
    if topk_length is not None:
        check_tensor("topk_length", topk_length, "[s_q]", (torch.int32,), q.device)
        check_shape("topk_length", topk_length, (s_q,), "[s_q]")
    base_2 = check_bool("lse_base_2", lse_base_2)
    if values_wanted():
        counted = _counted(indices, topk_length)
        check_range("indices", counted, -1, kv.shape[0] - 1, "a row of kv, or -1 to skip,")
    return _sparse_prefill(q, kv, indices, scale, d_v, attn_sink, topk_length, base_2)


def _counted(indices: Tensor, topk_length: Tensor | None) -> Tensor:
    """indices [b, s_q, topk] or [s_q, 1, topk] with -1 behind topk_length, which is checked."""
    if topk_length is None:
        return indices
    topk = indices.shape[2]
    check_range("topk_length", topk_length, 0, topk, "a number of indices")
    rank = torch.arange(topk, device=indices.device)
    behind = rank >= topk_length.view(indices.shape[0], -1, 1)
    return indices.masked_fill(behind.expand_as(indices), -1)


def _check_sink(attn_sink: Tensor | None, h_q: int, device: torch.device) -> None:
    if attn_sink is not None:
        check_tensor("attn_sink", attn_sink, "[h_q]", (torch.float32,), device)
        check_shape("attn_sink", attn_sink, (h_q,), "[h_q]")


def indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """How much each query wants each token: what the lightning indexer scores.

    logit(i, j) = k_scale(j) * sum over heads h of weights(i, h) * max(0, q(i, h) . k(j)).

    Args:
        q: float8_e4m3fn [s_q, h, 128].
        k: float8_e4m3fn [s_kv, 128].
        k_scale: float32 [s_kv].
        weights: float32 [s_q, h]; they carry q's scale and 1 / sqrt(d).
        start: int32 [s_q], the first token that a query may see.
        end: int32 [s_q], one behind the last.

    Returns:
        float32 [s_q, s_kv], -inf outside a query's range, whatever is there; a range that runs
        backwards holds nothing. On Hopper FP8 products are added up with fewer bits than float32
        has: an error stays below 2^-11 of the sum of absolute products.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape, device or stride; with ``FLASHMLA_CHECK=1`` also ranges
            that run beyond the keys or backwards.

    Source: ``flashmla/torch/dsa.py``, ``flashmla/triton/dsa.py``,
    ``csrc/sm90/indexer/prefill.cu``.
    """
    _check_index_query(q, "[s_q, h, 128]")
    s_q, h, _ = q.shape
    floats, ints = (torch.float32,), (torch.int32,)
    check_tensor("k", k, "[s_kv, 128]", (torch.float8_e4m3fn,), q.device)
    check_shape("k", k, (None, INDEX_DIM), "[s_kv, 128]")
    check_tensor("k_scale", k_scale, "[s_kv]", floats, q.device)
    check_shape("k_scale", k_scale, (k.shape[0],), "[s_kv]")
    check_tensor("weights", weights, "[s_q, h]", floats, q.device)
    check_shape("weights", weights, (s_q, h), "[s_q, h]")
    for name, bound in (("start", start), ("end", end)):
        check_tensor(name, bound, "[s_q]", ints, q.device)
        check_shape(name, bound, (s_q,), "[s_q]")
        if values_wanted():
            check_range(name, bound, 0, k.shape[0], "a token's position")
    if values_wanted():
        _check_forward(start, end)
    return _indexer_logits(q, k, k_scale, weights, start, end)


def _check_forward(start: Tensor, end: Tensor) -> None:
    """Ranges may be empty, but run forward; reads them, so only where values are wanted."""
    wrong = (end < start).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"end[{i}] is {int(end[i])}, but must be at least start[{i}], which is "
            f"{int(start[i])} ({len(wrong)} such ranges)"
        )


def indexer_logits_paged(
    q: Tensor, cache: Tensor, weights: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    """:func:`indexer_logits` of the newest queries of each request over its cached keys.

    Args:
        q: float8_e4m3fn [b, s_q, h, 128]; the last query of a request sees all its tokens, the
            one before all but the last, and so on.
        cache: [blocks, 64, 1, 132] of uint8, int8 or float8_e4m3fn, as
            :func:`flashmla.fp8.index_append` writes it. A page is 64 * 128 bytes of codes and then
            64 float32 scales; the stride between pages is free.
        weights: float32 [b, s_q, h], or [b * s_q, h].
        block_table: int32 [b, max_blocks].
        lengths: int32 [b], tokens of each request.

    Returns:
        float32 [b, s_q, max_blocks * 64], -inf where a query may not see.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape, device or stride; with ``FLASHMLA_CHECK=1`` also lengths
            and block numbers out of range, and scales within the lengths that are not positive and
            finite.

    Source: ``flashmla/torch/dsa.py``, ``flashmla/triton/dsa.py``, ``csrc/sm90/indexer/paged.cu``.
    """
    _check_index_query(q, "[b, s_q, h, 128]")
    b, s_q, h, _ = q.shape
    dims = "[blocks, 64, 1, 132]"
    check_tensor("cache", cache, dims, CACHE_DTYPES, q.device)
    check_shape("cache", cache, (None, INDEX_PAGE, 1, INDEX_BYTES_PER_TOKEN), dims)
    check_page_strides("cache", cache, dims)
    if isinstance(weights, Tensor) and weights.dim() == 2 and weights.shape[0] == b * s_q:
        weights = weights.unflatten(0, (b, s_q))
    check_tensor("weights", weights, "[b, s_q, h]", (torch.float32,), q.device)
    check_shape("weights", weights, (b, s_q, h), "[b, s_q, h]")
    check_tensor("block_table", block_table, "[b, max_blocks]", (torch.int32,), q.device)
    check_shape("block_table", block_table, (b, None), "[b, max_blocks]")
    check_tensor("lengths", lengths, "[b]", (torch.int32,), q.device)
    check_shape("lengths", lengths, (b,), "[b]")
    if values_wanted():
        check_block_table("lengths", lengths, block_table, cache.shape[0], INDEX_PAGE)
        check_index_scales("cache", cache, block_table, lengths)
    return _indexer_logits_paged(q, cache, weights, block_table, lengths)


def _check_index_query(q: object, dims: str) -> None:
    query = check_tensor("q", q, dims, (torch.float8_e4m3fn,))
    if query.shape[-1] != INDEX_DIM:
        raise ValueError(f"q must have shape {dims}, got {list(query.shape)}")


def topk(
    logits: Tensor,
    k: int,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    page: int = INDEX_PAGE,
) -> Tensor:
    """The k largest logits of each row, exactly; of equals the lower position.

    Args:
        logits: float32 [rows, n]. NaN and -inf are never chosen.
        k: how many, any number from 0; it may exceed n.
        lengths: int32 [rows]: positions from there on are never chosen.
        block_table: int32 [rows, max_blocks]: positions become block * page + offset, as
            ``indices`` of :func:`flash_mla_with_kvcache` wants them.
        page: tokens in a page of that table.

    Returns:
        int32 [rows, k]: positions, ascending, then -1 where there were fewer than k. With a block
        table they are in the order of the positions, not of the cache.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape or device, or a block table too narrow for n; with
            ``FLASHMLA_CHECK=1`` also lengths out of range, and negative block numbers within them.

    Example:
        >>> logits = torch.tensor([[2.0, 5.0, float("nan"), 2.0, 3.0]])
        >>> flashmla.topk(logits, 3).tolist(), flashmla.topk(logits, 6).tolist()
        ([[0, 1, 4]], [[0, 1, 3, 4, -1, -1]])

    Source: ``flashmla/torch/dsa.py``, ``flashmla/triton/topk.py``, ``csrc/sm90/topk/``.
    """
    check_tensor("logits", logits, "[rows, n]", (torch.float32,))
    rows, n = logits.shape
    count, page = check_int("k", k, 0), check_int("page", page, 1)
    if lengths is not None:
        check_tensor("lengths", lengths, "[rows]", (torch.int32,), logits.device)
        check_shape("lengths", lengths, (rows,), "[rows]")
        if values_wanted():
            check_range("lengths", lengths, 0, n, "a length")
    if block_table is not None:
        dims = "[rows, max_blocks]"
        check_tensor("block_table", block_table, dims, (torch.int32,), logits.device)
        check_shape("block_table", block_table, (rows, None), dims)
        if block_table.shape[1] * page < n:
            raise ValueError(
                f"block_table has {block_table.shape[1]} blocks of {page} tokens a row, too few "
                f"for the {n} positions of logits"
            )
        if values_wanted():
            ends = lengths if lengths is not None else torch.full((rows,), n, device=logits.device)
            used = torch.arange(block_table.shape[1], device=logits.device) * page
            numbers = block_table.masked_fill(used >= ends.unsqueeze(1), 0)
            most = torch.iinfo(torch.int32).max // page
            check_range("block_table", numbers, 0, most, "a block number within the length")
    return _topk(logits, count, lengths, block_table, page)
