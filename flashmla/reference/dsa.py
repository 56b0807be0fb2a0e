"""Stage 06: DeepSeek sparse attention, in NumPy float64.

A small indexer scores every earlier token for a query, the k best are chosen exactly, and
attention reads only those.

    logit(i, j) = Σ_h w(i, h) · max(0, q(i, h) · k(j)) · k_scale(j)

An index that is negative, out of range or behind `topk_length` is nothing: what it points to is
never read.  An index given twice counts twice.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from flashmla.reference.fp8 import INDEX_DIM, INDEX_PAGE, TOKEN_BYTES, unpack
from flashmla.reference.mha import apply_sink, scaled_scores
from flashmla.reference.mla import mla_decode


def indexer_logits(q, k, k_scale, weights, start, end):
    """Scores of keys start[i] to end[i] - 1 for query i; -inf outside.

    q [s_q, h, 128] and k [s_kv, 128] float8_e4m3 codes, k_scale [s_kv], weights [s_q, h],
    start and end [s_q] -> logits [s_q, s_kv]
    """
    logits = np.full((len(q), len(k)), -np.inf)
    for i in range(len(q)):
        keys = slice(max(0, start[i]), max(0, end[i]))
        dots = np.asarray(q[i], np.float64) @ np.asarray(k[keys], np.float64).T
        scores = np.asarray(weights[i], np.float64) @ np.maximum(dots, 0.0)
        logits[i, keys] = scores * np.asarray(k_scale[keys], np.float64)
    return logits


def gather_index_keys(cache, block_table_row, length):
    """Keys and scales of one request from the indexer's cache, bytes [blocks, 64, 1, 132].

    A page is 64 · 128 code bytes and then 64 float32 scales -> k [length, 128], scale [length]
    """
    pages = cache[block_table_row[: -(-length // INDEX_PAGE)]].reshape(-1, INDEX_PAGE * 132)
    codes, scales = np.split(pages.view(np.uint8), [INDEX_PAGE * INDEX_DIM], axis=1)
    k = np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn).reshape(-1, INDEX_DIM)
    return k[:length], np.ascontiguousarray(scales).view(np.float32).reshape(-1)[:length]


def indexer_logits_paged(q, cache, weights, block_table, lengths):
    """Scores of each request's cached tokens for its newest queries, the last of which sees all.

    q [b, s_q, h, 128], cache bytes [blocks, 64, 1, 132], weights [b, s_q, h], lengths [b],
    block_table [b, max_blocks] -> logits [b, s_q, max_blocks · 64], -inf where nothing may be seen
    """
    b, s_q = q.shape[:2]
    logits = np.full((b, s_q, block_table.shape[1] * INDEX_PAGE), -np.inf)
    for i in range(b):
        k, k_scale = gather_index_keys(cache, block_table[i], lengths[i])
        end = lengths[i] - s_q + 1 + np.arange(s_q)
        own = indexer_logits(q[i], k, k_scale, weights[i], np.zeros(s_q, int), end)
        logits[i, :, : lengths[i]] = own
    return logits


def topk(logits, k, lengths=None, block_table=None, page=64):
    """Positions of the k largest of each row, ascending, then -1: int32 [rows, k].

    logits [rows, n], of equals the lower position wins; NaN, -inf and what lies at or behind
    lengths [rows] is never chosen.  With block_table [rows, max_blocks] a position t is given as
    block_table[t // page] · page + t % page.
    """
    chosen = np.full((len(logits), k), -1, np.int32)
    for i, row in enumerate(logits):
        row = np.asarray(row if lengths is None else row[: lengths[i]], np.float64)
        candidates = np.flatnonzero(row > -np.inf)  # false for NaN, too
        best_first = candidates[np.argsort(-row[candidates], kind="stable")]
        positions = np.sort(best_first[:k])
        if block_table is not None:
            positions = block_table[i][positions // page] * page + positions % page
        chosen[i, : len(positions)] = positions
    return chosen


def select(tokens, indices, length=None):
    """The rows of tokens [n, ...] that indices [topk] point to; those that are nothing left out."""
    indices = indices[:length]
    return tokens[indices[(indices >= 0) & (indices < len(tokens))]]


def sparse_prefill(
    q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, lse_base_2=False
):
    """Attention of each query with its own list of tokens.

    q [s_q, h_q, d_qk], kv [s_kv, 1, d_qk], indices [s_q, 1, topk], attn_sink [h_q],
    topk_length [s_q] -> out [s_q, h_q, d_v], max_logits [s_q, h_q], lse [s_q, h_q], natural or
    to base 2
    """
    s_q, h_q, _ = q.shape
    out, lse = np.zeros((s_q, h_q, d_v)), np.full((s_q, h_q), np.inf)
    max_logits = np.full((s_q, h_q), -np.inf)
    for i in range(s_q):
        tokens = select(kv, indices[i, 0], None if topk_length is None else topk_length[i])
        out[i : i + 1], lse[i : i + 1] = mla_decode(q[i : i + 1], tokens, sm_scale, d_v=d_v)
        scores = scaled_scores(q[i : i + 1], tokens, sm_scale)
        max_logits[i] = scores.max(axis=-1, initial=-np.inf)
    return apply_sink(out, lse, attn_sink), max_logits, lse / np.log(2.0) if lse_base_2 else lse


def sparse_decode(q, cache, indices, d_v, scale=None, attn_sink=None, topk_length=None):
    """Sparse attention over a paged cache: an index is block · page + offset.

    q [b, s_q, h_q, 576], cache [blocks, page, 1, 576] of floats or [blocks, page, 1, 656] of bytes,
    indices [b, s_q, topk], attn_sink [h_q], topk_length [b] or [b, s_q]
    -> out [b, s_q, h_q, d_v], lse [b, h_q, s_q]
    """
    b, s_q, h_q, _ = q.shape
    tokens = cache.reshape(-1, *cache.shape[2:])
    out, lse = np.zeros((b, s_q, h_q, d_v)), np.full((b, s_q, h_q), np.inf)
    lengths = np.full(b, indices.shape[-1]) if topk_length is None else np.asarray(topk_length)
    lengths = np.broadcast_to(lengths.reshape(b, -1), (b, s_q))
    for i, j in np.ndindex(b, s_q):
        kv = select(tokens, indices[i, j], lengths[i, j])
        kv = unpack(kv, np.float64) if cache.shape[-1] == TOKEN_BYTES else kv
        out[i, j], lse[i, j] = (x[0] for x in mla_decode(q[i, j][None], kv, scale, d_v=d_v))
    return apply_sink(out, lse, attn_sink), lse.transpose(0, 2, 1)
