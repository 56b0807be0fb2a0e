"""The split plan of dense decode: which part of the card does which tiles of which request.

The plan is a pure function of the lengths and of the number of parts, and every tier makes the
same one. All requests are laid on one line. Request i takes up OVERHEAD + tiles_i places of it,
where tiles_i = ceil(length_i / TILE) and OVERHEAD is what starting a request costs, in tiles. The
line is cut into pieces of equal length, one a part. A cut inside a request's overhead is moved back
to the request's start. So a part holds a range of (request, tile) pairs, and a long request is
split over several parts, whose partial results are merged by their log-sum-exp.

Splitting has a price: partial results are written and read again. Where moving every
cut to the nearest start of a request leaves the longest part not much longer than the equal share
(SLACK places, or up to MOST_SLACK where a share is long), the plan does that instead, and no
request is split. Parts with too little to do are not made at all: see :func:`active_parts`. And
where there are as many parts to every request, and the requests so nearly of one length that no
part gets more than the equal share of the line, each is cut by its own length into so many pieces
of LEAST tiles or more. Then each part opens one piece; on the line, where only a request's first
piece has an overhead, that one would be the shortest.

Tiles have 64 tokens whatever the page size of the cache.

A **batch-invariant** plan gives a request the same bits whatever shares the batch with it. Where
floating-point sums are cut decides their bits, so here that follows from the request's own length:
it is cut into chunks of CHUNK tiles, each of which is a partial result of its own whoever computes
it, and these are merged in an order that depends on their number alone. The line is made of chunks,
each with an OVERHEAD, and every cut moves to the nearest start of a chunk. What it costs: partial
results of every request longer than a chunk, and room for as many as the block table could need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "CHUNK",
    "CPU_NUM_SMS",
    "FEW",
    "FULL",
    "LEAST",
    "MAX_PARTS",
    "METADATA_COLUMNS",
    "MOST_SLACK",
    "OVERHEAD",
    "SLACK",
    "TILE",
    "active_parts",
    "max_slots",
    "metadata_columns",
    "num_parts",
    "plan",
]

TILE = 64
"""Tokens in a tile."""

OVERHEAD = 5
"""What starting a request costs, counted in tiles."""

SLACK = 2 * OVERHEAD
"""How much longer than the equal share a part may be, in tiles, for requests to stay whole."""

MOST_SLACK = 24
"""What that grows to, for shares of more than twice SLACK: half the share, up to this."""

FULL = 6
"""Places that are worth a part of its own, however many parts there are."""

FEW = 32
"""Parts that get work whether they are full or not."""

LEAST = 4
"""Tiles that every piece has at least where requests are cut alike."""

CPU_NUM_SMS = 132
"""Streaming multiprocessors assumed for CPU tensors: an H100's, so that plans look the same."""

CHUNK = 16
"""Tiles in a chunk of a batch-invariant plan: 1024 tokens."""

MAX_PARTS = 1024
"""Parts of a plan at most: more than any card has SMs, and what the kernels have room for."""

METADATA_COLUMNS = 8
"""begin_request, begin_tile, end_request, end_tile, begin_split, chunk (0 unless the plan is
batch-invariant) and two zeros. A batch-invariant plan has eight more, all zero: its shape says what
it is, and goes on saying so in copies."""

_ROWS_PER_PART = 64  # query rows that one thread block serves


def num_parts(num_q_tokens_per_head_k: int, num_heads_k: int, num_sms: int = CPU_NUM_SMS) -> int:
    """Parts into which the work is cut: thread blocks that run at the same time for one KV head.

    Args:
        num_q_tokens_per_head_k: s_q * h_q / h_kv, the query rows that read the same KV head.
        num_heads_k: h_kv.
        num_sms: streaming multiprocessors of the card; CPU tensors are planned as if for 132.

    Returns:
        max(1, num_sms // (h_kv * ceil(num_q_tokens_per_head_k / 64))).
    """
    row_blocks = -(-num_q_tokens_per_head_k // _ROWS_PER_PART)
    return max(1, num_sms // (num_heads_k * row_blocks))


def metadata_columns(batch_invariant: bool) -> int:
    """The width of a plan's first tensor, by which its two kinds are told apart."""
    return METADATA_COLUMNS * (2 if batch_invariant else 1)


def max_slots(metadata_shape: Sequence[int], batch: int, max_tokens: int) -> int:
    """The most partial results that a plan can have, from what the host knows.

    Args:
        metadata_shape: of tile_scheduler_metadata, [parts, columns].
        batch: b.
        max_tokens: the longest length that the block table has room for.

    Returns:
        b + parts, since a cut adds one piece at most; of a batch-invariant plan
        b * max(1, ceil(max_tokens / (TILE * CHUNK))).
    """
    parts, columns = metadata_shape
    if columns == METADATA_COLUMNS:
        return batch + parts
    return batch * max(1, -(-max_tokens // (TILE * CHUNK)))


def active_parts(total: int, parts: int, batch: int) -> int:
    """Parts that get anything: not all, where the last ones would cost more than they save.

    Args:
        total: places on the line.
        parts: parts to be had.
        batch: requests.

    Returns:
        As many as have FULL places each, or FEW if those are more; then, if that idles no more
        than an eighth of these, the next multiple of the batch size below: requests of the same
        length are then cut alike.
    """
    active = min(parts, max(total // FULL, min(total, FEW)))
    over = active % batch
    return active - over if over < active and over * 8 <= active else active


def plan(
    cache_seqlens: Sequence[int] | npt.NDArray[np.integer],
    parts: int,
    batch_invariant: bool = False,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The split plan in closed form.

    Args:
        cache_seqlens: [b] tokens of each request; below zero counts as zero.
        parts: how many pieces to cut the work into, at least 1.
        batch_invariant: cut each request by its own length only.

    Returns:
        (tile_scheduler_metadata, num_splits), both int32. Row p of the [parts, 8] metadata is
        begin_request, begin_tile, end_request, end_tile, begin_split, chunk, 0, 0: part p does the
        half-open lexicographic range of (request, tile) from its begin to its end; end_tile 0 means
        that end_request is not touched, begin == end that the part is empty, and begin_split is
        the number of partial results of begin_request before the part's first one. num_splits
        [b + 1] holds prefix sums, from 0, of each request's partial results (1 for an empty
        request): without ``batch_invariant`` the parts that hold tiles of it, and chunk is 0; with
        it the chunks of ``chunk`` tiles that it has, and the metadata is [parts, 16].

    Raises:
        ValueError: parts below 1, or cache_seqlens not of one dimension.
    """
    seqlens = np.asarray(cache_seqlens, dtype=np.int64)
    if seqlens.ndim != 1:
        raise ValueError(f"cache_seqlens must have shape [b], got shape {list(seqlens.shape)}")
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    metadata = np.zeros((parts, metadata_columns(batch_invariant)), dtype=np.int32)
    num_splits = np.zeros(len(seqlens) + 1, dtype=np.int32)
    if batch_invariant:
        metadata[:, 5] = CHUNK
    if len(seqlens) == 0:
        return metadata, num_splits

    tiles = (np.maximum(seqlens, 0) + TILE - 1) // TILE
    chunks = np.maximum(1, -(-tiles // CHUNK)) if batch_invariant else np.ones_like(tiles)
    ends = np.cumsum(OVERHEAD * chunks + tiles)
    starts = np.concatenate([[0], ends])  # C_0 .. C_b
    total = int(ends[-1])
    active = total if total < parts else parts
    if not batch_invariant:
        active = active_parts(total, parts, len(seqlens))

    # Where each part begins, and where the last one ends: request and tile of parts + 1 cuts.
    part = np.arange(parts + 1, dtype=np.int64)
    position = np.where(part < active, part * total // active, total)
    pieces = active // len(seqlens)  # of each request, where all are cut alike
    request = np.searchsorted(starts, position, side="right") - 1
    before, after = starts[request], starts[np.minimum(request + 1, len(seqlens))]
    if batch_invariant:
        before = before + (position - before) // (OVERHEAD + CHUNK) * (OVERHEAD + CHUNK)
        after = np.minimum(after, before + OVERHEAD + CHUNK)
    nearest = np.where(after - position < position - before, after, before)
    share = -(-total // active)
    slack = min(MOST_SLACK, max(SLACK, share // 2))
    whole = not batch_invariant and np.diff(nearest).max() <= share + slack
    alike = (
        not (whole or batch_invariant)
        and active % len(seqlens) == 0
        and tiles.min() >= LEAST * pieces
        and -(-tiles.max() // pieces) <= share
    )
    if whole or batch_invariant:
        position = nearest
    elif alike:
        request, piece = np.divmod(part[:active], pieces)
        inside = np.where(piece > 0, OVERHEAD + piece * tiles[request] // pieces, 0)
        position[:active] = starts[request] + inside
    request = np.searchsorted(starts, position, side="right") - 1
    tile = np.maximum(0, position - starts[request] - OVERHEAD)
    if batch_invariant:
        tile = (position - starts[request]) // (OVERHEAD + CHUNK) * CHUNK
    metadata[:, 0], metadata[:, 1] = request[:-1], tile[:-1]
    metadata[:, 2], metadata[:, 3] = request[1:], tile[1:]

    if whole or batch_invariant:
        num_splits[1:] = np.cumsum(chunks)
        metadata[:, 4] = tile[:-1] // CHUNK
        return metadata, num_splits
    if alike:
        num_splits[1:] = pieces * np.arange(1, len(seqlens) + 1)
        metadata[:active, 4] = part[:active] % pieces
        return metadata, num_splits

    def last_part_at_or_before(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.minimum(active - 1, ((place + 1) * active - 1) // total)

    first = last_part_at_or_before(starts[:-1] + OVERHEAD)  # the part that holds tile 0
    last = last_part_at_or_before(starts[1:] - 1)
    num_splits[1:] = np.cumsum(np.maximum(1, last - first + 1))
    inside = tile[:-1] > 0
    metadata[inside, 4] = part[:-1][inside] - first[request[:-1][inside]]
    return metadata, num_splits
