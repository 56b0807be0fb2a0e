"""Stage 02: multi-head latent attention from its formulas, in NumPy float64.

A token's hidden state x is pressed into a latent c = x W_dkv, from which every head's keys and
values are expanded again, and into one RoPE key shared by all heads:

    q_i = [x W_dq W_uq_i ; rope(x W_dq W_qr_i)]   k_i = [c W_uk_i ; rope(x W_kr)]   v_i = c W_uv_i

Since q · (c W_uk) = (q W_ukᵀ) · c, the expansion can be moved to the query's side and the output's
side.  What remains is attention with one KV head whose key is [c ; rope(x W_kr)] and whose value
is c: the cache holds only that.  This is called the absorbed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashmla.reference.mha import attention


@dataclass(frozen=True)
class MLAWeights:
    """The matrices of one MLA layer, heads as an axis of their own.

    The gains are those of the RMSNorm behind each down-projection; None leaves it out.
    """

    w_dq: np.ndarray  # [d_model, d_cq]           down: hidden state to query latent
    w_uq: np.ndarray  # [d_cq, h, d_nope]         up: query latent to NoPE queries
    w_qr: np.ndarray  # [d_cq, h, d_rope]         up: query latent to RoPE queries
    w_dkv: np.ndarray  # [d_model, d_c]           down: hidden state to KV latent
    w_kr: np.ndarray  # [d_model, d_rope]         hidden state to the RoPE key all heads share
    w_uk: np.ndarray  # [d_c, h, d_nope]          up: KV latent to NoPE keys
    w_uv: np.ndarray  # [d_c, h, d_v]             up: KV latent to values
    w_o: np.ndarray  # [h, d_v, d_model]          heads' outputs to hidden state
    q_gain: np.ndarray | None = None  # [d_cq]
    kv_gain: np.ndarray | None = None  # [d_c]

    @property
    def scale(self):
        """1/√(d_nope + d_rope): that of the unabsorbed heads, whichever form is computed."""
        return (self.w_uk.shape[-1] + self.w_kr.shape[-1]) ** -0.5


def rms_norm(x, gain, eps=1e-6):
    """x [..., d] over its root mean square, times gain [d]; unchanged if gain is None."""
    if gain is None:
        return x
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rope(x, positions, base=10000.0):
    """Turn the pairs (x_2i, x_2i+1) of x [s, ..., d] by the angle position · base^(-2i/d).

    Two tokens turned so have a dot product that depends on their distance only.
    """
    x = np.asarray(x, np.float64)
    d = x.shape[-1]
    angles = np.asarray(positions)[:, None] * base ** (-np.arange(0, d, 2) / d)
    turn = np.exp(1j * angles).reshape(len(x), *[1] * (x.ndim - 2), d // 2)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def project_queries(x, w, positions):
    """Hidden states x [s, d_model] -> q_nope [s, h, d_nope], q_rope [s, h, d_rope]."""
    latent = rms_norm(x @ w.w_dq, w.q_gain)
    q_nope = np.einsum("sc,chd->shd", latent, w.w_uq)
    q_rope = rope(np.einsum("sc,chd->shd", latent, w.w_qr), positions)
    return q_nope, q_rope


def project_latents(x, w, positions):
    """What the cache holds: x [s, d_model] -> c [s, d_c], k_rope [s, d_rope]."""
    return rms_norm(x @ w.w_dkv, w.kv_gain), rope(x @ w.w_kr, positions)


def unabsorbed(x, w, causal=True):
    """MLA as the definition has it: every head's keys and values are expanded.

    x [s, d_model] -> y [s, d_model], lse [s, h]
    """
    positions = np.arange(len(x))
    q_nope, q_rope = project_queries(x, w, positions)
    c, k_rope = project_latents(x, w, positions)
    k_nope = np.einsum("sc,chd->shd", c, w.w_uk)
    v = np.einsum("sc,chd->shd", c, w.w_uv)
    shared = np.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[-1]))
    q = np.concatenate([q_nope, q_rope], axis=-1)
    k = np.concatenate([k_nope, shared], axis=-1)
    heads, lse = attention(q, k, v, w.scale, causal)
    return np.einsum("shd,hdm->sm", heads, w.w_o), lse


def absorbed(x, w, causal=True):
    """MLA over the latents themselves: one KV head, nothing expanded token by token.

    x [s, d_model] -> y [s, d_model], lse [s, h], equal to `unabsorbed`
    """
    positions = np.arange(len(x))
    q_nope, q_rope = project_queries(x, w, positions)
    c, k_rope = project_latents(x, w, positions)
    q_latent = np.einsum("shd,chd->shc", q_nope, w.w_uk)  # W_uk absorbed into the query
    q = np.concatenate([q_latent, q_rope], axis=-1)
    kv = np.concatenate([c, k_rope], axis=-1)[:, None]
    latents, lse = mla_decode(q, kv, w.scale, causal, d_v=c.shape[-1])
    heads = np.einsum("shc,chd->shd", latents, w.w_uv)  # W_uv absorbed into the output
    return np.einsum("shd,hdm->sm", heads, w.w_o), lse


def mla_decode(q, kv, scale=None, causal=False, d_v=512):
    """Attention whose values are the first d_v columns of its keys.

    q [s_q, h_q, d_qk], kv [s_k, h_kv, d_qk] -> out [s_q, h_q, d_v], lse [s_q, h_q]
    """
    return attention(q, kv, kv[..., :d_v], scale, causal)
