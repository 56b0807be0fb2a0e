"""Split plan and merging of partial results, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.schedule import (
    CHUNK,
    FEW,
    FULL,
    LEAST,
    MOST_SLACK,
    OVERHEAD,
    SLACK,
    TILE,
    metadata_columns,
)

__all__ = ["combine", "get_metadata", "merge_state"]

_INF = float("inf")


@torch.no_grad()
def get_metadata(
    cache_seqlens: Tensor,
    parts: int,
    batch_invariant: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The plan of :func:`flashmla.schedule.plan`, made on the tensors' device with no sync."""
    device = cache_seqlens.device
    batch = cache_seqlens.shape[0]
    if out is None:
        columns = metadata_columns(batch_invariant)
        metadata = torch.empty(parts, columns, dtype=torch.int32, device=device)
        num_splits = torch.empty(batch + 1, dtype=torch.int32, device=device)
    else:
        metadata, num_splits = out
    metadata.zero_()
    num_splits.zero_()
    if batch_invariant:
        metadata[:, 5] = CHUNK
    if batch == 0:
        return metadata, num_splits

    tiles = (cache_seqlens.long().clamp(min=0) + TILE - 1) // TILE
    chunks = ((tiles + CHUNK - 1) // CHUNK).clamp(min=1, max=None if batch_invariant else 1)
    starts = torch.nn.functional.pad(torch.cumsum(OVERHEAD * chunks + tiles, 0), (1, 0))  # C_0 ..
    total = starts[-1]
    active = total.clamp(max=parts)
    if not batch_invariant:
        active = torch.maximum(total // FULL, total.clamp(max=FEW)).clamp(max=parts)
        over = active % batch
        active = torch.where((over < active) & (over * 8 <= active), active - over, active)

    part = torch.arange(parts + 1, device=device)
    position = torch.where(part < active, part * total // active, total)
    request = torch.searchsorted(starts, position, right=True) - 1
    before, after = starts[request], starts[(request + 1).clamp(max=batch)]
    if batch_invariant:
        before = before + (position - before) // (OVERHEAD + CHUNK) * (OVERHEAD + CHUNK)
        after = torch.minimum(after, before + OVERHEAD + CHUNK)
    nearest = torch.where(after - position < position - before, after, before)
    share = (total + active - 1) // active
    slack = (share // 2).clamp(SLACK, MOST_SLACK)
    whole = nearest.diff().amax() <= share + slack
    pieces = active // batch  # of each request, where all are cut alike
    most = (tiles.amax() + pieces - 1) // pieces.clamp(min=1)
    alike = ~whole & (active % batch == 0) & (tiles.amin() >= LEAST * pieces) & (most <= share)
    if batch_invariant:
        position = nearest
    else:
        each = pieces.clamp(min=1)
        owner, piece = (part // each).clamp(max=batch - 1), part % each
        equal = starts[owner] + (OVERHEAD + piece * tiles[owner] // each) * (piece > 0)
        position = torch.where(alike & (part < active), equal, position)
        position = torch.where(whole, nearest, position)
    request = torch.searchsorted(starts, position, right=True) - 1
    tile = (position - starts[request] - OVERHEAD).clamp(min=0)
    if batch_invariant:
        tile = (position - starts[request]) // (OVERHEAD + CHUNK) * CHUNK
    metadata[:, 0], metadata[:, 1] = request[:-1], tile[:-1]
    metadata[:, 2], metadata[:, 3] = request[1:], tile[1:]
    if batch_invariant:
        num_splits[1:] = torch.cumsum(chunks, 0)
        metadata[:, 4] = tile[:-1] // CHUNK
        return metadata, num_splits

    def last_part_at_or_before(place: Tensor) -> Tensor:
        return torch.minimum(active - 1, ((place + 1) * active - 1) // total)

    first = last_part_at_or_before(starts[:-1] + OVERHEAD)  # the part that holds tile 0
    last = last_part_at_or_before(starts[1:] - 1)
    splits = torch.where(alike, pieces, (last - first + 1).clamp(min=1)).masked_fill(whole, 1)
    num_splits[1:] = torch.cumsum(splits, 0)
    earlier_parts = part[:-1] - first[request[:-1].clamp(max=batch - 1)]
    earlier_parts = torch.where(alike, part[:-1] % each, earlier_parts)
    metadata[:, 4] = torch.where(tile[:-1] > 0, earlier_parts, 0)
    return metadata, num_splits


@torch.no_grad()
def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each."""
    empty_a, empty_b = torch.isinf(lse_a), torch.isinf(lse_b)
    a = lse_a.masked_fill(empty_a, -_INF)
    b = lse_b.masked_fill(empty_b, -_INF)
    both_empty = empty_a & empty_b
    maximum = torch.maximum(a, b).masked_fill(both_empty, 0.0)
    weight_a, weight_b = torch.exp(a - maximum), torch.exp(b - maximum)
    total = (weight_a + weight_b).masked_fill(both_empty, 1.0)
    # An empty half is left out, not multiplied by zero: it may hold anything.
    out = _weighted(out_a, weight_a / total, empty_a) + _weighted(out_b, weight_b / total, empty_b)
    lse = (maximum + torch.log(total)).masked_fill(both_empty, _INF)
    return out.to(out_a.dtype), lse


def _weighted(out: Tensor, weight: Tensor, empty: Tensor) -> Tensor:
    return (out.float() * weight.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)


def combine(
    out_partial: Tensor, lse_partial: Tensor, num_splits: list[int]
) -> tuple[Tensor, Tensor]:
    """Merge each request's partial results.

    Args:
        out_partial: [slots, ..., d_v] float32.
        lse_partial: [slots, ...] float32, -inf where a split held no key for the row.
        num_splits: [b + 1] prefix sums: request r has the slots num_splits[r] to num_splits[r + 1].

    Returns:
        (out [b, ..., d_v], lse [b, ...]) in float32; a row with no key has out 0 and lse +inf.
    """
    batch = len(num_splits) - 1
    first = torch.tensor(num_splits[:-1], dtype=torch.long, device=out_partial.device)
    out, lse = out_partial[first], lse_partial[first]
    for request in range(batch):
        slots = slice(num_splits[request], num_splits[request + 1])
        if slots.stop - slots.start > 1:
            lse[request] = torch.logsumexp(lse_partial[slots], 0)
            # exp(-inf - -inf) is NaN, and a row that no split saw is to stay 0.
            weight = torch.nan_to_num(torch.exp(lse_partial[slots] - lse[request]), nan=0.0)
            out[request] = torch.einsum("k...,k...d->...d", weight, out_partial[slots])
    return out, lse.masked_fill(lse == -_INF, _INF)
