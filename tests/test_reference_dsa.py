"""The oracle's sparse attention: indexer, exact top-k, sparse decode and prefill, sink."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from cases import (
    SPARSE_DECODE_CASES,
    SPARSE_PREFILL_CASES,
    SparseDecodeCase,
    SparsePrefillCase,
    case_id,
    to_numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla.reference import dsa, fp8, mha, mla

E4M3 = ml_dtypes.float8_e4m3fn
EXACT = dict(rtol=1e-11, atol=1e-12)
NAN, INF = math.nan, math.inf


# --- the indexer -----------------------------------------------------------------------------


def random_indexer(s_q, s_kv, h=3, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(s_q, h, 128)).astype(np.float32).astype(E4M3)
    k = rng.normal(size=(s_kv, 128)).astype(np.float32).astype(E4M3)
    k_scale = rng.uniform(0.1, 2.0, s_kv).astype(np.float32)
    return q, k, k_scale, rng.normal(size=(s_q, h)).astype(np.float32)


def test_indexer_logits_are_the_formula_s():
    q, k, k_scale, weights = random_indexer(4, 9)
    start, end = [0, 2, 5, 9], [9, 7, 5, 20]
    logits = dsa.indexer_logits(q, k, k_scale, weights, start, end)
    assert logits.shape == (4, 9)
    for i in range(4):
        for j in range(9):
            if not start[i] <= j < end[i]:
                assert logits[i, j] == -INF
                continue
            dots = [float(q[i, h].astype(float) @ k[j].astype(float)) for h in range(3)]
            want = sum(float(w) * max(0.0, dot) for w, dot in zip(weights[i], dots, strict=True))
            assert logits[i, j] == pytest.approx(want * float(k_scale[j]), rel=1e-12)


def test_keys_outside_the_range_are_not_read():
    q, k, k_scale, weights = random_indexer(2, 9)
    want = dsa.indexer_logits(q, k, k_scale, weights, [2, 2], [5, 5])
    k[[0, 1, 5, 8]], k_scale[[0, 1, 6, 8]] = np.nan, np.nan
    np.testing.assert_array_equal(dsa.indexer_logits(q, k, k_scale, weights, [2, 2], [5, 5]), want)


def test_paged_indexer_logits_are_those_of_the_gathered_keys():
    lengths, s_q = [0, 1, 64, 150], 2
    cache = np.full((8, 64 * 132), 255, np.uint8)
    table = np.full((4, 4), 2147480000, np.int32)
    table[1, 0], table[2, 0], table[3, :3] = 5, 2, (7, 0, 4)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(4, s_q, 3, 128)).astype(np.float32).astype(E4M3)
    weights = rng.normal(size=(4, s_q, 3))
    keys = []
    for i, length in enumerate(lengths):
        _, k, k_scale, _ = random_indexer(1, length, seed=i + 2)
        keys.append((k, k_scale))
        for t in range(length):
            page, offset = cache[table[i, t // 64]], t % 64
            page[128 * offset : 128 * offset + 128] = k[t].view(np.uint8)
            at = 64 * 128 + 4 * offset
            page[at : at + 4] = k_scale[t : t + 1].view(np.uint8)
    logits = dsa.indexer_logits_paged(q, cache.reshape(8, 64, 1, 132), weights, table, lengths)
    assert logits.shape == (4, s_q, 256)
    for i, length in enumerate(lengths):
        for j in range(s_q):
            end = length - (s_q - 1 - j)  # the last query sees all, the one before one less
            want = dsa.indexer_logits(q[i, j][None], *keys[i], weights[i, j][None], [0], [end])
            np.testing.assert_array_equal(logits[i, j, :length], want[0])
            assert (logits[i, j, max(end, 0) :] == -INF).all()
            assert np.isfinite(logits[i, j, : max(end, 0)]).all()


# --- top-k -----------------------------------------------------------------------------------


def full_sort(row, k):
    """The k best by sorting all: largest first, of equals the lower position."""
    allowed = [j for j, x in enumerate(row) if not math.isnan(x) and x != -INF]
    best = sorted(sorted(allowed, key=lambda j: (-row[j], j))[:k])
    return best + [-1] * (k - len(best))


ADVERSARIAL = [
    [1.0] * 9,
    [0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
    [NAN] * 5,
    [-INF] * 5,
    [NAN, 1.0, -INF, NAN, 2.0, INF, -INF, 2.0, INF, NAN],
    [1.0, np.nextafter(1.0, 2.0), 1.0, np.nextafter(1.0, 0.0)],
    [5e-324, 0.0, -5e-324, 1e308, -1e308],
    list(range(20)),
    list(range(20, 0, -1)),
    [3.0, 1.0, 3.0, 2.0, 3.0, 2.0, 1.0, 3.0],
    [],
]


@pytest.mark.parametrize("k", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("row", ADVERSARIAL)
def test_topk_is_the_full_sort_s(row, k):
    chosen = dsa.topk(np.array([row]), k)
    assert chosen.dtype == np.int32
    assert chosen.tolist() == [full_sort(row, k)]


@given(
    st.lists(st.sampled_from([NAN, INF, -INF, -1.0, -0.0, 0.0, 1.0, 2.0]), max_size=40),
    st.integers(1, 50),
    st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_topk_of_rows_full_of_ties(row, k, length):
    length = min(length, len(row))
    chosen = dsa.topk(np.array([row, row]).reshape(2, -1), k, lengths=[length, len(row)])
    assert chosen.tolist() == [full_sort(row[:length], k), full_sort(row, k)]


def test_topk_by_hand():
    logits = np.array([[1.0, 5.0, 5.0, 3.0, 5.0]])
    assert dsa.topk(logits, 2).tolist() == [[1, 2]]
    assert dsa.topk(logits, 4).tolist() == [[1, 2, 3, 4]]
    assert dsa.topk(logits, 6).tolist() == [[0, 1, 2, 3, 4, -1]]
    assert dsa.topk(logits, 2, lengths=[1]).tolist() == [[0, -1]]


def test_topk_in_cache_coordinates():
    logits = np.zeros((2, 200))
    logits[0, [3, 64, 130]] = 1.0, 2.0, 3.0
    logits[1, [0, 65]] = 1.0, 2.0
    table = np.array([[9, 4, 7, 2147480000], [1, 0, 2147480000, 2147480000]])
    got = dsa.topk(logits, 3, lengths=[131, 66], block_table=table)
    assert got[0].tolist() == [9 * 64 + 3, 4 * 64 + 0, 7 * 64 + 2]
    assert got[1].tolist() == [1 * 64 + 0, 1 * 64 + 1, 0 * 64 + 1]
    assert dsa.topk(logits[:1], 2, [0], table[:1]).tolist() == [[-1, -1]]
    small = dsa.topk(logits[:1], 1, [70], np.array([[0, 3, 0, 0, 8]]), page=16)
    assert small.tolist() == [[8 * 16]]


# --- attention over chosen tokens ------------------------------------------------------------


def test_prefill_with_all_tokens_chosen_is_dense_attention():
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(4, 3, 24)), rng.normal(size=(10, 1, 24))
    indices = np.array([rng.permutation(10) for _ in range(4)])[:, None]
    out, max_logits, lse = dsa.sparse_prefill(q, kv, indices, 0.4, d_v=16)
    want_out, want_lse = mla.mla_decode(q, kv, 0.4, d_v=16)
    np.testing.assert_allclose(out, want_out, **EXACT)
    np.testing.assert_allclose(lse, want_lse, **EXACT)
    scores = 0.4 * np.einsum("shd,kd->shk", q, kv[:, 0])
    np.testing.assert_allclose(max_logits, scores.max(axis=-1), **EXACT)


def test_prefill_with_causal_indices_is_causal_attention():
    rng = np.random.default_rng(1)
    q, kv = rng.normal(size=(4, 3, 24)), rng.normal(size=(9, 1, 24))
    indices = np.array([[j if j <= 5 + i else -1 for j in range(9)] for i in range(4)])[:, None]
    out, _, lse = dsa.sparse_prefill(q, kv, indices, 0.4, d_v=16)
    want_out, want_lse = mha.attention(q, kv, kv[..., :16], 0.4, causal=True)
    np.testing.assert_allclose(out, want_out, **EXACT)
    np.testing.assert_allclose(lse, want_lse, **EXACT)


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES, ids=case_id)
def test_prefill_reads_the_valid_indices_and_no_others(case: SparsePrefillCase):
    inputs = case.build()
    out, max_logits, lse = inputs.expected()
    q, kv = (to_numpy(x).astype(np.float64) for x in (inputs.q, inputs.kv))
    indices = to_numpy(inputs.indices)
    for i in range(case.s_q):
        length = case.topk if case.topk_length is None else case.topk_length[i]
        chosen = [j for j in indices[i, 0, :length] if 0 <= j < case.s_kv]
        for h in range(case.h_q):
            scores = np.array([q[i, h] @ kv[j, 0] * case.d_qk**-0.5 for j in chosen])
            if not chosen:
                assert lse[i, h] == INF and max_logits[i, h] == -INF and (out[i, h] == 0).all()
                continue
            weights = np.exp(scores)
            total = weights.sum()
            sink = math.exp(inputs.attn_sink[h]) if case.sink else 0.0
            want = weights @ kv[chosen, 0, : case.d_v] / (total + sink)
            np.testing.assert_allclose(out[i, h], want, rtol=1e-9, atol=1e-12)
            assert lse[i, h] == pytest.approx(math.log(total), rel=1e-9, abs=1e-12)
            assert max_logits[i, h] == pytest.approx(scores.max(), rel=1e-9, abs=1e-12)


def test_an_index_given_twice_counts_twice():
    rng = np.random.default_rng(2)
    q, kv = rng.normal(size=(1, 2, 8)), rng.normal(size=(5, 1, 8))
    twice = dsa.sparse_prefill(q, kv, np.array([[[3, 1, 3]]]), 1.0, d_v=8)
    copied = dsa.sparse_prefill(q, kv[[3, 1, 3]], np.array([[[0, 1, 2]]]), 1.0, d_v=8)
    for a, b in zip(twice, copied, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES, ids=case_id)
def test_decode_is_prefill_over_the_unpacked_cache(case: SparseDecodeCase):
    inputs = case.build()
    out, lse = inputs.expected()
    assert out.shape == (case.b, case.s_q, case.h_q, 512)
    assert lse.shape == (case.b, case.h_q, case.s_q)
    cache = to_numpy(inputs.k_cache).reshape(case.blocks * case.page, 1, -1)
    kv = fp8.unpack(cache, np.float64) if case.fp8 else cache.astype(np.float64)
    sink = to_numpy(inputs.attn_sink)
    for i in range(case.b):
        lengths = None
        if case.topk_length is not None:
            lengths = np.broadcast_to(case.topk_length[i], case.s_q)
        indices = to_numpy(inputs.indices)[i][:, None]
        q = to_numpy(inputs.q)[i]
        want_out, _, want_lse = dsa.sparse_prefill(q, kv, indices, 576**-0.5, 512, sink, lengths)
        np.testing.assert_allclose(out[i], want_out, **EXACT)
        np.testing.assert_allclose(lse[i].T, want_lse, **EXACT)


def test_what_fp8_costs_is_what_quantising_the_tokens_costs():
    rng = np.random.default_rng(3)
    tokens, q = rng.normal(size=(128, 576)), rng.normal(size=(1, 1, 2, 576))
    indices = rng.permutation(128)[None, None, :50]
    cache = fp8.pack(tokens).reshape(2, 64, 1, 656)
    out, lse = dsa.sparse_decode(q, cache, indices, 512)
    rounded = fp8.quantise_dequantise(tokens)[:, None]
    want_out, want_lse = mla.mla_decode(q[0], rounded[indices[0, 0]], d_v=512)
    np.testing.assert_allclose(out[0], want_out, **EXACT)
    np.testing.assert_allclose(lse[0].T, want_lse, **EXACT)
    unrounded, _ = mla.mla_decode(q[0], tokens[indices[0, 0], None], d_v=512)
    error = np.abs(out[0] - unrounded).max()
    assert 1e-4 < error < 0.1


# --- the sink --------------------------------------------------------------------------------


def test_a_sink_is_a_key_with_its_score_and_a_value_of_nothing():
    rng = np.random.default_rng(4)
    scores, v = rng.normal(0, 3.0, (3, 7)), rng.normal(size=(7, 5))
    sink = np.array([-1.0, 2.5, 10.0])
    probabilities, lse = mha.softmax(scores)
    with_sink, _ = mha.softmax(np.concatenate([scores, sink[:, None]], axis=1))
    want = with_sink @ np.concatenate([v, np.zeros((1, 5))])
    np.testing.assert_allclose(dsa.apply_sink(probabilities @ v, lse, sink), want, **EXACT)


def test_a_sink_scales_by_its_formula_and_extremes_are_safe():
    out = np.ones((6, 2))
    lse = np.array([1.0, 1.0, 1.0, 900.0, -900.0, INF])
    sink = np.array([0.5, -INF, INF, 0.0, 0.0, 0.0])
    out[5] = 0.0
    got = dsa.apply_sink(out, lse, sink)
    want = [math.e / (math.e + math.exp(0.5)), 1.0, 0.0, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(got, np.repeat(want, 2).reshape(6, 2), rtol=1e-14, atol=1e-300)
    assert (dsa.apply_sink(np.zeros((1, 2)), np.array([INF]), np.array([INF])) == 0).all()
    assert dsa.apply_sink(out, lse, None) is out


def test_a_sink_leaves_the_lse_alone():
    case = SparsePrefillCase("sink", sink=True, seed=2)
    inputs = case.build()
    out, max_logits, lse = inputs.expected()
    inputs.attn_sink = None
    out_without, max_without, lse_without = inputs.expected()
    np.testing.assert_array_equal(lse, lse_without)
    np.testing.assert_array_equal(max_logits, max_without)
    assert (np.abs(out) < np.abs(out_without)).all()
