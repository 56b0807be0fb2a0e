"""Stage 03: a KV cache in pages, in NumPy float64.

A cache is [blocks, page, h_kv, d].  A request owns a row of the block table: its token t lives in
block row[t // page] at offset t % page.  Entries of the row behind the last token, the rest of the
last page and all other blocks may hold anything; they are never read.
"""

from __future__ import annotations

import numpy as np

from flashmla.reference.mha import apply_sink
from flashmla.reference.mla import mla_decode


def gather(cache, block_table_row, length):
    """The first `length` tokens of one request: [length, h_kv, d], in float64."""
    page = cache.shape[1]
    blocks = block_table_row[: -(-length // page)]
    tokens = cache[blocks].reshape(-1, *cache.shape[2:])
    return tokens[:length].astype(np.float64)


def append(cache, block_table_row, length, tokens):
    """Write `tokens` [n, h_kv, d] behind the first `length`, in place; return the new length."""
    page = cache.shape[1]
    for t, token in enumerate(tokens, start=length):
        cache[block_table_row[t // page], t % page] = token
    return length + len(tokens)


def paged_decode(q, cache, block_table, seqlens, d_v, scale=None, causal=False, attn_sink=None):
    """Attention of each request's newest tokens with its own cached tokens.

    q [b, s_q, h_q, d_qk], cache [blocks, page, h_kv, d_qk] (values are the first d_v columns),
    block_table [b, max_blocks], seqlens [b], attn_sink [h_q]
    -> out [b, s_q, h_q, d_v], lse [b, h_q, s_q]
    """
    b, s_q, h_q, _ = q.shape
    out, lse = np.zeros((b, s_q, h_q, d_v)), np.zeros((b, h_q, s_q))
    for i in range(b):
        kv = gather(cache, block_table[i], seqlens[i])
        out_i, lse_i = mla_decode(q[i], kv, scale, causal, d_v)
        out[i], lse[i] = apply_sink(out_i, lse_i, attn_sink), lse_i.T
    return out, lse
