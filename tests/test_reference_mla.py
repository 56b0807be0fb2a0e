"""The oracle's latent attention: absorbed against unabsorbed, RoPE by its angles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flashmla.reference import mha, mla

EXACT = dict(rtol=1e-11, atol=1e-11)


def random_weights(seed=0, d_model=20, d_cq=12, d_c=16, h=3, d_nope=8, d_rope=4, d_v=6):
    rng = np.random.default_rng(seed)
    shapes = dict(
        w_dq=(d_model, d_cq),
        w_uq=(d_cq, h, d_nope),
        w_qr=(d_cq, h, d_rope),
        w_dkv=(d_model, d_c),
        w_kr=(d_model, d_rope),
        w_uk=(d_c, h, d_nope),
        w_uv=(d_c, h, d_v),
        w_o=(h, d_v, d_model),
    )
    matrices = {name: rng.normal(0, shape[0] ** -0.5, shape) for name, shape in shapes.items()}
    return mla.MLAWeights(**matrices)


def with_gains(w, seed=1):
    rng = np.random.default_rng(seed)
    q_gain, kv_gain = (rng.uniform(0.5, 2.0, m.shape[1]) for m in (w.w_dq, w.w_dkv))
    return replace(w, q_gain=q_gain, kv_gain=kv_gain)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_absorbed_equals_unabsorbed(tokens, gains, causal):
    w = with_gains(random_weights()) if gains else random_weights()
    x = np.random.default_rng(2).normal(0, 2.0, (tokens, 20))
    y, lse = mla.unabsorbed(x, w, causal)
    y_absorbed, lse_absorbed = mla.absorbed(x, w, causal)
    assert np.abs(y).max() > 0.1
    np.testing.assert_allclose(y_absorbed, y, **EXACT)
    np.testing.assert_allclose(lse_absorbed, lse, **EXACT)


def test_unabsorbed_is_the_definition_head_by_head():
    w = with_gains(random_weights())
    x = np.random.default_rng(3).normal(0, 1.0, (5, 20))
    latent_q, c = x @ w.w_dq, x @ w.w_dkv
    latent_q = latent_q / np.sqrt((latent_q**2).mean(axis=1, keepdims=True) + 1e-6) * w.q_gain
    c = c / np.sqrt((c**2).mean(axis=1, keepdims=True) + 1e-6) * w.kv_gain
    y = np.zeros_like(x)
    for t in range(5):
        for h in range(3):
            q_rope = turned(latent_q[t] @ w.w_qr[:, h], t)
            scores = [
                (latent_q[t] @ w.w_uq[:, h]) @ (c[j] @ w.w_uk[:, h])
                + q_rope @ turned(x[j] @ w.w_kr, j)
                for j in range(t + 1)
            ]
            weights = np.exp(np.array(scores) / math.sqrt(8 + 4))
            values = [c[j] @ w.w_uv[:, h] for j in range(t + 1)]
            y[t] += (weights @ values / weights.sum()) @ w.w_o[h]
    np.testing.assert_allclose(mla.unabsorbed(x, w)[0], y, **EXACT)


def turned(x, position):
    """RoPE of one vector, pair by pair."""
    y = np.empty_like(x)
    for i in range(len(x) // 2):
        angle = position / 10000 ** (2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        y[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        y[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return y


@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 8)])
def test_rope_turns_pairs(shape):
    x = np.random.default_rng(4).normal(size=shape)
    positions = np.array([0, 1, 2, 100, 7, 7])
    got = mla.rope(x, positions)
    for t, position in enumerate(positions):
        want = np.apply_along_axis(turned, -1, x[t], position)
        np.testing.assert_allclose(got[t], want, **EXACT)
    np.testing.assert_array_equal(got[0], x[0])


def test_rope_depends_on_distance_only():
    q, k = np.random.default_rng(5).normal(size=(2, 1, 64))
    dots = [
        float(mla.rope(q, [start + 13])[0] @ mla.rope(k, [start])[0]) for start in (0, 1, 500, 4096)
    ]
    np.testing.assert_allclose(dots, dots[0], rtol=1e-9)
    assert abs(float(mla.rope(q, [1000])[0] @ mla.rope(k, [0])[0]) - dots[0]) > 1


def test_rms_norm_leaves_rows_of_mean_square_one():
    x = np.random.default_rng(6).normal(0, 30.0, (4, 64))
    normed = mla.rms_norm(x, np.ones(64))
    np.testing.assert_allclose((normed**2).mean(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(normed * np.abs(x[:, :1] / normed[:, :1]), x, **EXACT)
    assert mla.rms_norm(x, None) is x


def test_the_cache_is_one_latent_and_one_rope_key_a_token():
    w = random_weights()
    c, k_rope = mla.project_latents(np.ones((7, 20)), w, np.arange(7))
    assert c.shape == (7, 16) and k_rope.shape == (7, 4)


def test_the_scale_is_that_of_the_unabsorbed_heads():
    assert random_weights(d_nope=128, d_rope=64).scale == pytest.approx(1 / math.sqrt(192))


@pytest.mark.parametrize("h_kv", [1, 2])
def test_decode_takes_its_values_from_its_keys(h_kv):
    rng = np.random.default_rng(7)
    q, kv = rng.normal(size=(2, 4, 12)), rng.normal(size=(9, h_kv, 12))
    out, lse = mla.mla_decode(q, kv, 0.5, True, d_v=8)
    want_out, want_lse = mha.attention(q, kv, kv, 0.5, True)
    np.testing.assert_allclose(out, want_out[..., :8], **EXACT)
    np.testing.assert_array_equal(lse, want_lse)
