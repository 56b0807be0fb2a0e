"""Sparse attention, the indexer's scores and exact top-k, in torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashmla.torch.fp8 import unpack
from flashmla.torch.online_softmax import OnlineSoftmax, apply_sink

__all__ = ["indexer_logits", "indexer_logits_paged", "sparse_decode", "sparse_prefill", "topk"]

_BLOCK = 1024  # tokens that one step of the online softmax takes
_BATCH_KEYS = 16384  # tokens gathered at a time, over all the queries worked on together
_BATCH_SCORES = 1 << 23  # indexer scores, one a head, held at a time
_INF = float("inf")


@torch.no_grad()
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
    """Attention of each query with the tokens of the cache that its indices name."""
    b, s_q, h_q, _ = q.shape
    page = k_cache.shape[1]
    tokens = k_cache.shape[0] * page
    if is_fp8_kvcache:
        k_cache = k_cache.view(torch.uint8)

    def fetch(index: Tensor) -> Tensor:
        rows = k_cache[index // page, index % page, 0]
        return unpack(rows) if is_fp8_kvcache else rows.float()

    limit = None
    if topk_length is not None:
        limit = topk_length.view(b, -1).expand(b, s_q).flatten()
    out, _, lse = _attend(
        q.flatten(0, 1), indices.flatten(0, 1), tokens, limit, fetch, softmax_scale, head_dim_v
    )
    out = apply_sink(out, lse, attn_sink).view(b, s_q, h_q, head_dim_v)
    return out.to(q.dtype), lse.view(b, s_q, h_q).transpose(1, 2).contiguous()


@torch.no_grad()
def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int,
    attn_sink: Tensor | None,
    topk_length: Tensor | None,
    lse_base_2: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query with the rows of kv that its indices name."""

    def fetch(index: Tensor) -> Tensor:
        return kv[index, 0].float()

    out, largest, lse = _attend(q, indices[:, 0], kv.shape[0], topk_length, fetch, sm_scale, d_v)
    out = apply_sink(out, lse, attn_sink).to(q.dtype)
    return out, largest, lse / math.log(2.0) if lse_base_2 else lse


def _attend(
    q: Tensor,
    indices: Tensor,
    tokens: int,
    limit: Tensor | None,
    fetch: Callable[[Tensor], Tensor],
    scale: float,
    d_v: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [n, h, d_v], largest score [n, h], lse [n, h]) in float32, for q [n, h, d_qk] and
    indices [n, topk] into a number of tokens that ``fetch`` reads."""
    n, h, _ = q.shape
    topk = indices.shape[1]
    out = torch.zeros(n, h, d_v, device=q.device)
    largest = torch.full((n, h), -_INF, device=q.device)
    lse = torch.full((n, h), -_INF, device=q.device)
    valid = (indices >= 0) & (indices < tokens)
    if limit is not None:
        valid &= torch.arange(topk, device=q.device) < limit.unsqueeze(1)
    together = max(1, _BATCH_KEYS // max(1, min(topk, _BLOCK)))
    for first in range(0, n if tokens else 0, together):
        rows = slice(first, first + together)
        scaled = q[rows].float() * scale
        softmax = OnlineSoftmax(scaled.shape[:2], d_v, q.device)
        for start in range(0, topk, _BLOCK):
            read = valid[rows, start : start + _BLOCK]
            index = indices[rows, start : start + _BLOCK].masked_fill(~read, 0)
            # What is not valid took token 0's place; zeros go over it, it may hold NaN.
            keys = fetch(index.long()).masked_fill_(~read.unsqueeze(-1), 0.0)
            scores = (scaled @ keys.mT).masked_fill_(~read.unsqueeze(1), -_INF)
            softmax.update(scores, keys[..., :d_v])
        largest[rows] = softmax.maximum()
        out[rows], lse[rows] = softmax.finish()
    return out, largest, lse.masked_fill_(lse == -_INF, _INF)


@torch.no_grad()
def indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Scores of all keys for a few queries at a time, then the mask."""
    s_q, h, _ = q.shape
    s_kv = k.shape[0]
    logits = torch.empty(s_q, s_kv, device=q.device)
    keys = k.float()
    position = torch.arange(s_kv, device=q.device)
    together = max(1, _BATCH_SCORES // max(1, h * s_kv))
    for first in range(0, s_q, together):
        rows = slice(first, first + together)
        scores = torch.relu(q[rows].float() @ keys.T)
        summed = (weights[rows].unsqueeze(1) @ scores).squeeze(1) * k_scale
        outside = (position < start[rows, None]) | (position >= end[rows, None])
        logits[rows] = summed.masked_fill_(outside, -_INF)
    return logits


@torch.no_grad()
def indexer_logits_paged(
    q: Tensor, cache: Tensor, weights: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    """Request by request: gather the used pages, then as without pages."""
    b, s_q, _, d = q.shape
    blocks, page = cache.shape[:2]
    width = block_table.shape[1] * page
    logits = torch.full((b, s_q, width), -_INF, device=q.device)
    for request, length in enumerate(lengths.clamp(0, width if blocks else 0).tolist()):
        used = block_table[request, : -(-length // page)].long().clamp(0, blocks - 1)
        pages = cache.view(torch.uint8)[used].flatten(1)
        codes = pages[:, : page * d].view(torch.float8_e4m3fn).reshape(-1, d)[:length]
        scales = pages[:, page * d :].contiguous().view(torch.float32).flatten()[:length]
        end = length - s_q + 1 + torch.arange(s_q, device=q.device)
        logits[request, :, :length] = indexer_logits(
            q[request], codes, scales, weights[request], torch.zeros_like(end), end
        )
    return logits


@torch.no_grad()
def topk(
    logits: Tensor, k: int, lengths: Tensor | None, block_table: Tensor | None, page: int
) -> Tensor:
    """Exact: everything above the k-th largest value, and of its equals the first ones."""
    rows, n = logits.shape
    position = torch.arange(n, device=logits.device)
    allowed = logits > -_INF  # false for NaN, too
    if lengths is not None:
        allowed &= position < lengths.unsqueeze(1)
    chosen = torch.full((rows, k + 1), -1, dtype=torch.int32, device=logits.device)
    count = min(k, n)
    if count == 0 or rows == 0:
        return chosen[:, :k]
    values = logits.masked_fill(~allowed, -_INF)
    threshold = values.topk(count, sorted=True).values[:, -1:]
    above = values > threshold
    equal = allowed & (values == threshold)
    taken = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    # The i-th token taken goes to column i; everything else goes to a column that is cut off.
    column = torch.where(taken, taken.cumsum(1) - 1, k)
    token = position.expand(rows, n)
    if block_table is not None and block_table.shape[1]:
        block = block_table.gather(
            1, (position // page).clamp(max=block_table.shape[1] - 1).expand(rows, n)
        )
        token = block * page + position % page
    chosen.scatter_(1, column, torch.where(taken, token, -1).int())
    return chosen[:, :k].contiguous()
