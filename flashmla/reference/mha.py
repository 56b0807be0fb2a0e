"""Stage 01: multi-head attention from its formulas, in NumPy float64.

    S = scale · Q Kᵀ        P = softmax(S)        O = P V        LSE = log Σ exp(S)

One sequence has q [s_q, h_q, d_qk], k [s_k, h_kv, d_qk], v [s_k, h_kv, d_v]; query head i reads
KV head i // (h_q / h_kv).  The LSE is in natural log.  A row with nothing to attend to has
output 0 and LSE +inf.  With a causal mask the last query is aligned with the last key.
"""

from __future__ import annotations

import numpy as np


def causal_mask(s_q, s_k):
    """True where query i may see key j: [s_q, s_k], the last query aligned with the last key."""
    return np.arange(s_k)[None, :] <= np.arange(s_q)[:, None] + (s_k - s_q)


def softmax(scores):
    """Probabilities and natural-log LSE of scores [..., s_k], where -inf means masked.

    A row that is masked everywhere, or has no keys at all, gets probabilities 0 and LSE +inf.
    """
    largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    empty = largest == -np.inf
    weights = np.exp(scores - np.where(empty, 0.0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    probabilities = weights / np.where(empty, 1.0, total)
    lse = np.where(empty, np.inf, largest + np.log(np.where(empty, 1.0, total)))
    return probabilities, lse[..., 0]


def apply_sink(out, lse, sink):
    """Attention with a sink, a score that takes its share of the softmax and adds nothing.

    out [..., h, d_v], lse [..., h], sink [h] -> out · exp(lse) / (exp(lse) + exp(sink)); an empty
    row (LSE +inf) stays 0.  The LSE stays that of the keys alone.
    """
    if sink is None:
        return out
    empty = np.isposinf(lse)
    share = np.exp(-np.logaddexp(0.0, np.asarray(sink, np.float64) - np.where(empty, 0.0, lse)))
    return np.where(empty[..., None], 0.0, out * share[..., None])


def group_heads(x, h_kv):
    """Rows of one KV head side by side: [s, h_q, d] -> [h_kv, s · h_q/h_kv, d]."""
    s, h_q, d = x.shape
    x = np.asarray(x, np.float64).reshape(s, h_kv, h_q // h_kv, d)
    return x.transpose(1, 0, 2, 3).reshape(h_kv, s * (h_q // h_kv), d)


def ungroup_heads(rows, s, h_q):
    """The inverse of `group_heads`: [h_kv, s · h_q/h_kv, ...] -> [s, h_q, ...]."""
    h_kv, _, *rest = rows.shape
    rows = rows.reshape(h_kv, s, h_q // h_kv, *rest)
    return np.moveaxis(rows, 0, 1).reshape(s, h_q, *rest)


def scaled_scores(q, k, scale=None, causal=False):
    """Masked scores of each KV head: [h_kv, s_q · h_q/h_kv, s_k]; scale is 1/√d_qk by default."""
    s_q, h_q, d_qk = q.shape
    s_k, h_kv, _ = k.shape
    scale = d_qk**-0.5 if scale is None else scale
    k = np.asarray(k, np.float64).transpose(1, 2, 0)
    scores = scale * (group_heads(q, h_kv) @ k)
    if causal:
        visible = np.repeat(causal_mask(s_q, s_k), h_q // h_kv, axis=0)
        scores = np.where(visible, scores, -np.inf)
    return scores


def attention(q, k, v, scale=None, causal=False):
    """Attention of one sequence, straight from the formula.

    q [s_q, h_q, d_qk], k [s_k, h_kv, d_qk], v [s_k, h_kv, d_v]
    -> out [s_q, h_q, d_v], lse [s_q, h_q]
    """
    s_q, h_q, _ = q.shape
    probabilities, lse = softmax(scaled_scores(q, k, scale, causal))
    out = probabilities @ np.asarray(v, np.float64).transpose(1, 0, 2)
    return ungroup_heads(out, s_q, h_q), ungroup_heads(lse, s_q, h_q)


def attention_with_kv_cache(q, k, v, scale=None):
    """Causal attention as a decoder does it: token by token, keeping the keys and values.

    q [s_q, h_q, d_qk]; k, v [s_k, h_kv, d]: the first s_k - s_q >= 0 tokens are cached already.
    -> out [s_q, h_q, d_v], lse [s_q, h_q], equal to `attention(..., causal=True)`
    """
    s_q, s_k = len(q), len(k)
    k_cache, v_cache = list(k[: s_k - s_q]), list(v[: s_k - s_q])
    steps = []
    for t in range(s_q):
        k_cache.append(k[s_k - s_q + t])  # one new key and value a step; all others are reused
        v_cache.append(v[s_k - s_q + t])
        steps.append(attention(q[t : t + 1], np.stack(k_cache), np.stack(v_cache), scale))
    return np.concatenate([out for out, _ in steps]), np.concatenate([lse for _, lse in steps])


def online_softmax_step(state, scores, v):
    """Take one block of keys into the running softmax.

    state = (m, total, acc): the largest score so far [..., rows], the sum of exp(score - m), and
    the sum of exp(score - m) · v [..., rows, d_v]; scores [..., rows, block], v [..., block, d_v]
    """
    m, total, acc = state
    m_new = np.maximum(m, scores.max(axis=-1))
    safe = np.where(m_new == -np.inf, 0.0, m_new)  # nothing seen yet: -inf - -inf would be NaN
    rescale = np.exp(m - safe)  # what came before was measured against the older maximum
    weights = np.exp(scores - safe[..., None])
    return m_new, total * rescale + weights.sum(axis=-1), acc * rescale[..., None] + weights @ v


def online_softmax(score_blocks, v_blocks):
    """Attention in one pass over blocks: no block is looked at twice.

    score_blocks: arrays [..., rows, block]; v_blocks: arrays [..., block, d_v]
    -> out [..., rows, d_v], lse [..., rows]
    """
    rows, d_v = score_blocks[0].shape[:-1], v_blocks[0].shape[-1]
    state = np.full(rows, -np.inf), np.zeros(rows), np.zeros((*rows, d_v))
    for scores, v in zip(score_blocks, v_blocks, strict=True):
        state = online_softmax_step(state, scores, v)
    m, total, acc = state
    empty = total == 0
    safe_total = np.where(empty, 1.0, total)
    return acc / safe_total[..., None], np.where(empty, np.inf, m + np.log(safe_total))


def attention_online(q, k, v, block=64, scale=None, causal=False):
    """The same as `attention`, with the keys walked in blocks of `block` tokens.

    q [s_q, h_q, d_qk], k [s_k, h_kv, d_qk], v [s_k, h_kv, d_v], s_k >= 1
    -> out [s_q, h_q, d_v], lse [s_q, h_q]
    """
    s_q, h_q, _ = q.shape
    scores = scaled_scores(q, k, scale, causal)
    v = np.asarray(v, np.float64).transpose(1, 0, 2)
    starts = range(0, len(k), block)
    out, lse = online_softmax(
        [scores[..., i : i + block] for i in starts], [v[:, i : i + block] for i in starts]
    )
    return ungroup_heads(out, s_q, h_q), ungroup_heads(lse, s_q, h_q)


def attention_varlen(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale=None, causal=False):
    """Attention of sequences laid end to end; sequence i is rows cu[i] to cu[i + 1].

    q [total_q, h_q, d_qk], k [total_kv, h_kv, d_qk], v [total_kv, h_kv, d_v]
    -> out [total_q, h_q, d_v], lse [total_q, h_q]
    """
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    lse = np.full(q.shape[:2], np.inf)
    for rows, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv):
        out[rows], lse[rows] = attention(q[rows], k[keys], v[keys], scale, causal)
    return out, lse


def attention_backward(d_out, q, k, v, scale=None, causal=False, d_lse=None):
    """Gradients of one sequence from the gradient of out, and of the LSE if it is given.

        dS = P ∘ (dO Vᵀ - Σ O ∘ dO + dLSE)    dQ = scale · dS K    dK = scale · dSᵀ Q    dV = Pᵀ dO

    d_out [s_q, h_q, d_v], d_lse [s_q, h_q] -> dq, dk, dv, shaped as q, k, v
    """
    (s_q, h_q, d_qk), h_kv = q.shape, k.shape[1]
    scale = d_qk**-0.5 if scale is None else scale
    probabilities, _ = softmax(scaled_scores(q, k, scale, causal))
    q_rows, d_rows = group_heads(q, h_kv), group_heads(d_out, h_kv)
    k_heads, v_heads = (np.asarray(x, np.float64).transpose(1, 0, 2) for x in (k, v))
    d_lse = np.zeros((s_q, h_q)) if d_lse is None else d_lse
    d_lse_rows = group_heads(d_lse[..., None], h_kv)
    delta = ((probabilities @ v_heads) * d_rows).sum(axis=-1, keepdims=True)
    d_scores = probabilities * (d_rows @ v_heads.transpose(0, 2, 1) - delta + d_lse_rows)
    dq = ungroup_heads(scale * (d_scores @ k_heads), s_q, h_q)
    dk = scale * (d_scores.transpose(0, 2, 1) @ q_rows)
    dv = probabilities.transpose(0, 2, 1) @ d_rows
    return dq, dk.transpose(1, 0, 2), dv.transpose(1, 0, 2)


def attention_varlen_backward(
    d_out, q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale=None, causal=False, d_lse=None
):
    """`attention_backward` of sequences laid end to end -> dq, dk, dv, shaped as q, k, v."""
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for rows, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv):
        dq[rows], dk[keys], dv[keys] = attention_backward(
            d_out[rows], q[rows], k[keys], v[keys], scale, causal,
            None if d_lse is None else d_lse[rows],
        )  # fmt: skip
    return dq, dk, dv


def _sequences(cu_seqlens_qo, cu_seqlens_kv):
    """The rows of q and the rows of k and v that belong together, as slices."""
    return [
        (slice(*cu_seqlens_qo[i : i + 2]), slice(*cu_seqlens_kv[i : i + 2]))
        for i in range(len(cu_seqlens_qo) - 1)
    ]
