"""Dense MLA decode over the paged cache, in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from flashmla.schedule import METADATA_COLUMNS, TILE, max_slots
from flashmla.torch.online_softmax import OnlineSoftmax, apply_sink
from flashmla.torch.split_kv import combine

__all__ = ["attend_to_pages", "dense_decode"]

_BLOCK = 1024  # keys that one step of the online softmax takes
_BATCH_KEYS = 16384  # keys gathered at a time, over all the splits worked on together


@torch.no_grad()
def dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each split of the plan, several splits at a time, then the merge of each
    request's splits."""
    return attend_to_pages(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
        softmax_scale, causal, attn_sink, Tensor.float,
    )  # fmt: skip


def attend_to_pages(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool,
    attn_sink: Tensor | None,
    values: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Dense decode over a cache [blocks, page, h_kv, any] whose tokens ``values`` makes float32
    [..., d_qk] of."""
    batch, s_q, h_q, d_qk = q.shape
    h_kv = k_cache.shape[2]
    reach = block_table.shape[1] * k_cache.shape[1] if k_cache.shape[0] else 0
    lengths = cache_seqlens.long().clamp(0, reach)
    prefix = _bounded(num_splits.tolist(), max_slots(tile_scheduler_metadata.shape, batch, reach))
    splits = _splits(tile_scheduler_metadata.tolist(), prefix, lengths.tolist())

    # Rows that share a KV head stand together: [b, h_kv, s_q * group, d_qk].
    rows = q.view(batch, s_q, h_kv, h_q // h_kv, d_qk).transpose(1, 2).flatten(2, 3).float()
    # One slot more than the plan has: where a foreign plan gives a request no split at all.
    shape = (prefix[-1] + 1, h_kv, rows.shape[2])
    out_partial = torch.zeros(*shape, head_dim_v, device=q.device)
    lse_partial = torch.full(shape, float("-inf"), device=q.device)
    if causal:  # the last query is aligned with the last key
        seen = lengths.unsqueeze(1) - s_q + 1 + torch.arange(s_q, device=q.device)
    else:
        seen = lengths.unsqueeze(1).expand(batch, s_q)
    seen = seen.repeat_interleave(h_q // h_kv, dim=1)  # keys that each row sees: [b, rows]

    # In a batch-invariant plan each alone: how a product sums follows from its shape.
    alone = tile_scheduler_metadata.shape[1] > METADATA_COLUMNS
    for group in [[split] for split in splits] if alone else _batches(splits):
        slot, request, begin, end = torch.tensor(group, device=q.device).unbind(1)
        softmax = OnlineSoftmax((len(group), *shape[1:]), head_dim_v, q.device)
        scaled = rows[request] * softmax_scale
        longest = max(last - first for _, _, first, last in group)
        for offset in range(0, longest, _BLOCK):
            block = torch.arange(offset, min(offset + _BLOCK, longest), device=q.device)
            position = begin.unsqueeze(1) + block
            found = _gather(k_cache, block_table[request], position, position < end.unsqueeze(1))
            keys = values(found).transpose(1, 2)
            visible = position.unsqueeze(1) < torch.minimum(end[:, None], seen[request])[..., None]
            scores = (scaled @ keys.mT).masked_fill_(~visible.unsqueeze(1), float("-inf"))
            softmax.update(scores, keys[..., :head_dim_v])
        out_partial[slot], lse_partial[slot] = softmax.finish()

    out, lse = combine(out_partial, lse_partial, prefix)
    out = out.view(batch, h_kv, s_q, -1, head_dim_v).transpose(1, 2).flatten(2, 3)
    lse = lse.view(batch, h_kv, s_q, -1).transpose(2, 3).flatten(1, 2)
    out = apply_sink(out, lse.transpose(1, 2), attn_sink)
    return out.to(q.dtype), lse.contiguous()


Split = tuple[int, int, int, int]  # slot, request, first key, end of keys


def _bounded(num_splits: list[int], slots: int) -> list[int]:
    """Prefix sums as they are; anything else made to rise from 0 or more to at most ``slots``."""
    return list(accumulate((min(max(0, count), slots) for count in num_splits), max))


def _splits(metadata: list[list[int]], num_splits: list[int], lengths: list[int]) -> list[Split]:
    """The splits of a plan: what each part does of each request that it touches."""
    splits = []
    for begin_request, begin_tile, end_request, end_tile, begin_split, chunk, *_ in metadata:
        for request in range(max(0, begin_request), min(end_request + 1, len(lengths))):
            first = begin_tile if request == begin_request else 0
            length = lengths[request]
            end = min(length, end_tile * TILE) if request == end_request else length
            slot = num_splits[request] + (begin_split if request == begin_request else 0)
            step = chunk * TILE if chunk > 0 else max(1, end - first * TILE)
            for begin in range(max(0, first) * TILE, end, step):
                # A plan made for other lengths may not fit: a wrong result and no more.
                if num_splits[request] <= slot < num_splits[request + 1]:
                    splits.append((slot, request, begin, min(end, begin + step)))
                slot += 1
    return splits


def _batches(splits: list[Split]) -> Iterator[list[Split]]:
    """Splits to work on together: neighbours, until their keys fill the buffer."""
    group: list[Split] = []
    longest = 0
    for split in splits:
        longest = max(longest, min(_BLOCK, split[3] - split[2]))
        if group and longest * (len(group) + 1) > _BATCH_KEYS:
            yield group
            group, longest = [], min(_BLOCK, split[3] - split[2])
        group.append(split)
    if group:
        yield group


def _gather(k_cache: Tensor, block_table: Tensor, position: Tensor, valid: Tensor) -> Tensor:
    """Keys at token positions [n, keys] of n block tables: [n, keys, h_kv, d_qk] as in the cache.

    What is not valid is not read. The request's first token stands in for it, with weight zero: it
    is within the length, and so brings in no NaN that is not in the result anyway.
    """
    num_blocks, page = k_cache.shape[:2]
    position = position.masked_fill(~valid, 0)
    block = block_table.gather(1, position // page).long()
    block = block.clamp(0, num_blocks - 1)  # a caller's wrong block number stays inside the cache
    return k_cache[block, position % page]
