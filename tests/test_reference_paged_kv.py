"""The oracle's paged cache: what it gathers, and that it reads nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DECODE_CASES, WILD, case_id, to_numpy

from flashmla.reference import mha, paged_kv


def paged(tokens, page, seed=0):
    """tokens [n, ...] in scattered pages of a cache of NaN -> cache, block-table row."""
    n = -(-len(tokens) // page)
    cache = np.full((n + 3, page, *tokens.shape[1:]), np.nan)
    row = np.full(n + 2, WILD)
    row[:n] = np.random.default_rng(seed).permutation(n + 3)[:n]
    for t, token in enumerate(tokens):
        cache[row[t // page], t % page] = token
    return cache, row


@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize("length", [0, 1, 47, 48, 49, 63, 64, 65, 128])
def test_gather_gives_the_tokens_and_nothing_else(length, page):
    tokens = np.random.default_rng(1).normal(size=(length, 2, 3))
    cache, row = paged(tokens, page)
    np.testing.assert_array_equal(paged_kv.gather(cache, row, length), tokens)


def test_append_continues_where_the_length_ends():
    tokens = np.random.default_rng(2).normal(size=(10, 1, 3))
    cache = np.full((5, 4, 1, 3), np.nan)
    row = np.array([3, 0, 4, WILD])
    length = paged_kv.append(cache, row, 0, tokens[:3])
    length = paged_kv.append(cache, row, length, tokens[3:])
    assert length == 10
    np.testing.assert_array_equal(paged_kv.gather(cache, row, 10), tokens)
    assert np.isnan(cache[[1, 2]]).all() and np.isnan(cache[4, 2:]).all()


@pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
def test_paged_decode_is_attention_over_each_request_s_tokens(case):
    inputs = case.build()
    out, lse = inputs.expected()
    assert np.isfinite(out).all() and not np.isnan(lse).any()
    cache, table = to_numpy(inputs.k_cache), to_numpy(inputs.block_table)
    for i, length in enumerate(case.lengths):
        where = [(table[i, t // case.page], t % case.page) for t in range(length)]
        kv = np.zeros((length, case.h_kv, case.d_qk))
        for t, (block, offset) in enumerate(where):
            kv[t] = cache[block, offset]
        q = inputs.q[i].double().numpy()
        want_out, want_lse = mha.attention(q, kv, kv, case.scale, case.causal)
        if inputs.attn_sink is not None:  # [h_q], beside want_lse [s_q, h_q]
            sees = np.isfinite(want_lse)
            share = np.exp(np.where(sees, inputs.attn_sink.double().numpy() - want_lse, 0.0))
            want_out = want_out / (1 + share[..., None])
        np.testing.assert_allclose(out[i], want_out[..., : case.d_v], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse[i].T, want_lse, rtol=1e-12)


def test_the_page_size_changes_nothing():
    rng = np.random.default_rng(3)
    lengths = [0, 1, 64, 100]
    tokens = [rng.normal(size=(length, 1, 12)) for length in lengths]
    q = rng.normal(size=(4, 2, 3, 12))
    results = []
    for page in (1, 16, 64, 128):
        caches, rows = zip(*(paged(t, page) for t in tokens), strict=True)
        starts = np.cumsum([0, *(len(cache) for cache in caches)])
        table = np.full((4, 110), WILD)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            n = -(-length // page)
            table[i, :n] = row[:n] + starts[i]
        cache = np.concatenate(caches)
        results.append(paged_kv.paged_decode(q, cache, table, lengths, 8, causal=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])
    assert (results[0][0][0] == 0).all() and (results[0][1][0] == np.inf).all()
    assert (results[0][1][1] == np.inf).tolist() == [[True, False]] * 3  # one key, two queries
