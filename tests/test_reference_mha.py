"""The oracle's attention against the textbook's loops, against torch, and against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import PREFILL_CASES, case_id

from flashmla.reference import mha

EXACT = dict(rtol=1e-12, atol=1e-12)
SHAPES = [  # s_q, s_k, h_q, h_kv, d_qk, d_v
    (1, 1, 1, 1, 4, 4),
    (5, 5, 2, 2, 8, 4),
    (3, 7, 4, 2, 8, 16),
    (6, 2, 3, 1, 4, 8),
    (1, 130, 6, 3, 16, 8),
]


def random_qkv(s_q, s_k, h_q, h_kv, d_qk, d_v, seed=0, std=1.0):
    rng = np.random.default_rng(seed)
    shapes = (s_q, h_q, d_qk), (s_k, h_kv, d_qk), (s_k, h_kv, d_v)
    return tuple(rng.normal(0.0, std, shape) for shape in shapes)


def textbook(q, k, v, scale, causal):
    """Softmax attention as a textbook has it: loops, no maximum subtracted."""
    s_q, h_q, _ = q.shape
    s_k, h_kv, d_v = v.shape
    out, lse = np.zeros((s_q, h_q, d_v)), np.full((s_q, h_q), math.inf)
    for i in range(s_q):
        for h in range(h_q):
            head = h * h_kv // h_q
            keys = [j for j in range(s_k) if not causal or j - s_k <= i - s_q]
            weights = [math.exp(scale * float(q[i, h] @ k[j, head])) for j in keys]
            if keys:
                out[i, h] = sum(w * v[j, head] for w, j in zip(weights, keys, strict=True))
                out[i, h] /= sum(weights)
                lse[i, h] = math.log(sum(weights))
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_textbook_s(shape, causal):
    q, k, v = random_qkv(*shape)
    out, lse = mha.attention(q, k, v, 0.3, causal)
    want_out, want_lse = textbook(q, k, v, 0.3, causal)
    np.testing.assert_allclose(out, want_out, **EXACT)
    np.testing.assert_allclose(lse, want_lse, **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_torch_s(shape, causal):
    s_q, s_k = shape[:2]
    q, k, v = random_qkv(*shape)
    mask = torch.ones(s_q, s_k, dtype=torch.bool).tril(s_k - s_q) if causal else None
    heads_first = [torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    out, _ = mha.attention(q, k, v, causal=causal)
    first = max(0, s_q - s_k) if causal else 0  # rows before it have nothing: torch has no rule
    np.testing.assert_allclose(out[first:], want[0].transpose(0, 1).numpy()[first:], **EXACT)


def test_the_default_scale_is_one_over_the_root_of_d_qk():
    q, k, v = random_qkv(3, 4, 2, 2, 16, 8)
    for got, want in zip(mha.attention(q, k, v), mha.attention(q, k, v, 0.25), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_last_query_is_aligned_with_the_last_key():
    np.testing.assert_array_equal(mha.causal_mask(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(mha.causal_mask(3, 2), [[0, 0], [1, 0], [1, 1]])


def test_rows_with_nothing_to_attend_to():
    q, k, v = random_qkv(5, 2, 2, 1, 4, 3)
    out, lse = mha.attention(q, k, v, causal=True)
    assert (out[:3] == 0).all() and (lse[:3] == np.inf).all()
    assert (out[3:] != 0).all() and np.isfinite(lse[3:]).all()
    out, lse = mha.attention(q, k[:0], v[:0])
    assert (out == 0).all() and (lse == np.inf).all() and out.shape == (5, 2, 3)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(2, 9, 1, 1, 4, 4, std=100.0)
    out, lse = mha.attention(q, k, v, scale=1.0)
    scores = (q[:, 0] @ k[:, 0].T).max(axis=1)
    assert scores.max() > 1e4
    np.testing.assert_allclose(lse[:, 0], scores, rtol=1e-3)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("s_q", [1, 4, 9])
def test_a_kv_cache_changes_nothing(s_q):
    q, k, v = random_qkv(s_q, 9, 4, 2, 8, 5)
    want_out, want_lse = mha.attention(q, k, v, causal=True)
    out, lse = mha.attention_with_kv_cache(q, k, v)
    np.testing.assert_allclose(out, want_out, **EXACT)
    np.testing.assert_allclose(lse, want_lse, **EXACT)


@pytest.mark.parametrize("block", [1, 3, 64, 1000])
@pytest.mark.parametrize(("s_q", "s_k", "causal"), [(5, 70, False), (70, 70, True), (9, 4, True)])
def test_online_softmax_changes_nothing(s_q, s_k, causal, block):
    q, k, v = random_qkv(s_q, s_k, 4, 2, 8, 5, std=3.0)
    want_out, want_lse = mha.attention(q, k, v, causal=causal)
    out, lse = mha.attention_online(q, k, v, block, causal=causal)
    np.testing.assert_allclose(out, want_out, **EXACT)
    np.testing.assert_allclose(lse, want_lse, **EXACT)


def test_online_softmax_may_see_masked_blocks_first_and_last():
    scores, v = np.array([[1.0, 2.0]]), np.array([[1.0], [3.0]])
    nothing = np.full((1, 2), -np.inf)
    out, lse = mha.online_softmax([nothing, scores, nothing], [v, v, v])
    np.testing.assert_allclose(lse, [math.log(math.exp(1) + math.exp(2))])
    np.testing.assert_allclose(out, [[(math.e + 3 * math.exp(2)) / (math.e + math.exp(2))]])
    out, lse = mha.online_softmax([nothing], [v])
    assert lse[0] == np.inf and out[0, 0] == 0


@pytest.mark.parametrize("case", PREFILL_CASES, ids=case_id)
def test_varlen_is_sequence_by_sequence(case):
    inputs = case.build()
    out, lse = inputs.expected()
    q, k, v = (x.double().numpy() for x in (inputs.q, inputs.k, inputs.v))
    row = key = 0
    for s_q, s_k in case.sequences:
        rows, keys = slice(row, row + s_q), slice(key, key + s_k)
        want_out, want_lse = mha.attention(q[rows], k[keys], v[keys], case.scale, case.causal)
        np.testing.assert_array_equal(out[rows], want_out)
        np.testing.assert_array_equal(lse[rows], want_lse)
        row, key = row + s_q, key + s_k
    assert row == len(out) and key == len(k)


@pytest.mark.parametrize("with_d_lse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_autograd_s(shape, causal, with_d_lse):
    q, k, v = random_qkv(*shape)
    s_q, s_k, h_q, h_kv, _, d_v = shape
    rng = np.random.default_rng(1)
    d_out = rng.normal(size=(s_q, h_q, d_v))
    d_lse = rng.normal(size=(s_q, h_q)) if with_d_lse else None
    leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(h_q // h_kv, dim=1) for x in leaves[1:])
    scores = torch.einsum("qhd,khd->hqk", leaves[0], keys) * 0.3
    seen = torch.ones(s_q, dtype=torch.bool)
    if causal:
        mask = torch.ones(s_q, s_k, dtype=torch.bool).tril(s_k - s_q)
        scores, seen = scores.masked_fill(~mask, -torch.inf), mask.any(dim=1)
    scores = scores[:, seen]
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
    loss = (out * torch.from_numpy(d_out)[seen]).sum()
    if d_lse is not None:
        loss = loss + (scores.logsumexp(dim=-1).T * torch.from_numpy(d_lse)[seen]).sum()
    loss.backward()
    gradients = mha.attention_backward(d_out, q, k, v, 0.3, causal, d_lse)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), **EXACT)


def test_varlen_backward_is_sequence_by_sequence():
    q, k, v = random_qkv(7, 9, 4, 2, 8, 5)
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.normal(size=(7, 4, 5)), rng.normal(size=(7, 4))
    cu_qo, cu_kv = [0, 3, 3, 5, 7], [0, 4, 6, 6, 9]
    got = mha.attention_varlen_backward(d_out, q, k, v, cu_qo, cu_kv, 0.3, True, d_lse)
    for rows, keys in ((slice(0, 3), slice(0, 4)), (slice(5, 7), slice(6, 9))):
        want = mha.attention_backward(
            d_out[rows], q[rows], k[keys], v[keys], 0.3, True, d_lse[rows]
        )
        for gradient, part, where in zip(got, want, (rows, keys, keys), strict=True):
            np.testing.assert_array_equal(gradient[where], part)
    assert (got[0][3:5] == 0).all()  # queries without keys
    assert (got[1][4:6] == 0).all() and (got[2][4:6] == 0).all()  # keys without queries
