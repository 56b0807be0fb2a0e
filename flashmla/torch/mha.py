"""Dense prefill attention over sequences laid end to end, forward and backward, in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashmla.torch.online_softmax import OnlineSoftmax

__all__ = ["backward", "forward"]

_QUERIES = 256  # query tokens in a block
_KEYS = 512  # keys in a block
_INF = float("inf")


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Block of queries by block of keys, with the online softmax."""
    h_q, h_kv, d_v = q.shape[1], k.shape[1], v.shape[2]
    out = torch.zeros(q.shape[0], h_q, d_v, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], h_q), _INF, device=q.device)
    for tokens, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv, q.shape[0], k.shape[0]):
        q_rows = _group_heads(q[tokens], h_kv) * softmax_scale
        k_heads, v_heads = _group_heads(k[keys], h_kv), _group_heads(v[keys], h_kv)
        out_rows = torch.zeros(*q_rows.shape[:2], d_v, device=q.device)
        lse_rows = torch.full(q_rows.shape[:2], -_INF, device=q.device)
        for rows, blocks in _tiles(tokens, keys, h_q // h_kv, causal, q.device):
            softmax = OnlineSoftmax((h_kv, rows.stop - rows.start), d_v, q.device)
            for block, hidden in blocks:
                scores = q_rows[:, rows] @ k_heads[:, block].mT
                softmax.update(_masked(scores, hidden), v_heads[:, block])
            out_rows[:, rows], lse_rows[:, rows] = softmax.finish()
        out[tokens] = _ungroup_heads(out_rows, h_q).to(out.dtype)
        lse[tokens] = _ungroup_heads(lse_rows.unsqueeze(-1), h_q).squeeze(-1)
    return out, lse.masked_fill_(lse == -_INF, _INF)


@torch.no_grad()
def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, with the probabilities made again from the LSE, block by block.

    dV = P^T dO;  dS = P (dO V^T - rowsum(dO O) + dLSE);  dQ = scale dS K;  dK = scale dS^T Q.
    """
    h_q, h_kv = q.shape[1], k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shift = (d_out.float() * out.float()).sum(-1)
    if d_lse is not None:
        shift = shift - d_lse
    for tokens, keys in _sequences(cu_seqlens_qo, cu_seqlens_kv, q.shape[0], k.shape[0]):
        q_rows, d_rows = _group_heads(q[tokens], h_kv), _group_heads(d_out[tokens], h_kv)
        lse_rows = _group_heads(lse[tokens].unsqueeze(-1), h_kv)
        shift_rows = _group_heads(shift[tokens].unsqueeze(-1), h_kv)
        k_heads, v_heads = _group_heads(k[keys], h_kv), _group_heads(v[keys], h_kv)
        dq_rows = torch.zeros_like(q_rows)
        dk_heads, dv_heads = torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        for rows, blocks in _tiles(tokens, keys, h_q // h_kv, causal, q.device):
            for block, hidden in blocks:
                scores = (q_rows[:, rows] * softmax_scale) @ k_heads[:, block].mT
                # A row with nothing to attend to has LSE +inf, and so probabilities 0.
                p = torch.exp(_masked(scores, hidden) - lse_rows[:, rows])
                dv_heads[:, block] += p.mT @ d_rows[:, rows]
                d_scores = p * (d_rows[:, rows] @ v_heads[:, block].mT - shift_rows[:, rows])
                dq_rows[:, rows] += d_scores @ k_heads[:, block] * softmax_scale
                dk_heads[:, block] += d_scores.mT @ q_rows[:, rows] * softmax_scale
        dq[tokens] = _ungroup_heads(dq_rows, h_q).to(q.dtype)
        dk[keys] = _ungroup_heads(dk_heads, h_kv).to(k.dtype)
        dv[keys] = _ungroup_heads(dv_heads, h_kv).to(v.dtype)
    return dq, dk, dv


def _sequences(
    cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, total_q: int, total_kv: int
) -> Iterator[tuple[slice, slice]]:
    """Where each sequence's queries and keys stand; nothing outside the tensors."""
    cu_q = cu_seqlens_qo.clamp(0, total_q).tolist()
    cu_kv = cu_seqlens_kv.clamp(0, total_kv).tolist()
    for i in range(len(cu_q) - 1):
        yield slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])


def _tiles(
    tokens: slice, keys: slice, group: int, causal: bool, device: torch.device
) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Blocks of rows, and for each the blocks of keys that some row sees and what is hidden there.

    A row is a query token and one of the ``group`` heads that share a KV head.
    """
    s_q, s_k = tokens.stop - tokens.start, keys.stop - keys.start
    for first in range(0, s_q, _QUERIES):
        last = min(first + _QUERIES, s_q)
        seen = torch.arange(first, last, device=device).repeat_interleave(group) + s_k - s_q + 1
        blocks: list[tuple[slice, Tensor | None]] = []
        for start in range(0, min(s_k, s_k - s_q + last) if causal else s_k, _KEYS):
            stop = min(start + _KEYS, s_k)
            hidden = None
            if causal and stop > s_k - s_q + first + 1:
                hidden = torch.arange(start, stop, device=device) >= seen.unsqueeze(1)
            blocks.append((slice(start, stop), hidden))
        yield slice(first * group, last * group), blocks


def _masked(scores: Tensor, hidden: Tensor | None) -> Tensor:
    return scores if hidden is None else scores.masked_fill_(hidden, -_INF)


def _group_heads(x: Tensor, h_kv: int) -> Tensor:
    """[s, h, d] -> float32 [h_kv, s * h / h_kv, d]: rows that share a KV head stand together."""
    s, h, d = x.shape
    return x.reshape(s, h_kv, h // h_kv, d).transpose(0, 1).reshape(h_kv, -1, d).float()


def _ungroup_heads(rows: Tensor, h: int) -> Tensor:
    """The inverse of :func:`_group_heads`: [h_kv, s * h / h_kv, d] -> [s, h, d]."""
    h_kv, _, d = rows.shape
    return rows.reshape(h_kv, -1, h // h_kv, d).transpose(0, 1).reshape(-1, h, d)
