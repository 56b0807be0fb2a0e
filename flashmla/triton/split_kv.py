"""Stage 04 in Triton: the split plan made on the device, and the merging of partial results.

The plan lays all requests on one line, request i taking OVERHEAD + tiles_i places of it, and
cuts the line into equal parts; `flashmla.schedule` is the same in Python. Partial results
(out, LSE) merge associatively, so a request may be cut anywhere.
"""

import torch
import triton
import triton.language as tl

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
from flashmla.triton.common import on_device, sink_share, working_dtype

# Requests that one step of the plan's loops takes.
PLAN_BLOCK = 1024


# region: active_parts
@triton.jit
def active_parts(total, parts, b, CHUNK: tl.constexpr, FEW: tl.constexpr, FULL: tl.constexpr):
    """How many parts get anything: see `flashmla.schedule.active_parts`; total is int64."""
    parts = parts.to(tl.int64)
    if CHUNK > 0:
        return tl.minimum(parts, total)
    active = tl.minimum(parts, tl.maximum(total // FULL, tl.minimum(total, FEW)))
    over = active % tl.maximum(b, 1)
    return tl.where((over < active) & (over * 8 <= active), active - over, active)


# endregion: active_parts


# region: last_part_at
@triton.jit
def last_part_at(position, active, total):
    """The last part that begins at `position` or before, where part p begins at
    floor(p * total / active); all int64, any shape."""
    return tl.minimum(active - 1, ((position + 1) * active - 1) // total)


# endregion: last_part_at


# region: plan_starts_kernel
@triton.jit(do_not_specialize=["b"])
def plan_starts_kernel(
    cache_seqlens,  # [b] int32
    starts,  # [b + 1] int64: where each request begins on the line, and the line's length
    extremes,  # [2] int64: the fewest tiles that a request has, and the most
    b,
    OVERHEAD: tl.constexpr,
    CHUNK: tl.constexpr,  # tiles in a chunk of a batch-invariant plan, else 0
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program walks over all requests, BLOCK at a time.
    total = tl.zeros([], tl.int64)
    fewest = tl.full([], 1 << 40, tl.int64)
    most = tl.zeros([], tl.int64)
    for block in range(0, b, BLOCK):
        request = block + tl.arange(0, BLOCK)  # [BLOCK]
        length = tl.load(cache_seqlens + request, mask=request < b, other=0)
        tiles = (tl.maximum(length, 0).to(tl.int64) + TILE - 1) // TILE
        places = OVERHEAD + tiles  # [BLOCK] int64
        if CHUNK > 0:  # each chunk has an overhead of its own
            places = OVERHEAD * tl.maximum((tiles + CHUNK - 1) // CHUNK, 1) + tiles
        places = tl.where(request < b, places, 0)
        tl.store(starts + request, total + tl.cumsum(places) - places, mask=request < b)
        total += tl.sum(places)
        fewest = tl.minimum(fewest, tl.min(tl.where(request < b, tiles, 1 << 40)))
        most = tl.maximum(most, tl.max(tl.where(request < b, tiles, 0)))
    tl.store(starts + b, total)
    tl.store(extremes + 0, fewest)
    tl.store(extremes + 1, most)


# endregion: plan_starts_kernel


# region: cut
@triton.jit
def request_at(position, starts, b, SEARCH_STEPS: tl.constexpr):
    """The last request that starts at `position` [P] or before; b at the line's end."""
    low = tl.zeros_like(position)
    high = low + b
    for _ in range(SEARCH_STEPS):
        middle = (low + high + 1) // 2
        before = tl.load(starts + middle) <= position
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def cut(part, starts, b, active, total, SEARCH_STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """Where parts begin on the line, and the nearest start of a request, or of a chunk if WIDTH,
    the places of one, is not 0: part [P] int64 -> position [P], nearest [P]. Parts from `active`
    on begin at the line's end."""
    position = tl.where(part < active, part * total // tl.maximum(active, 1), total)  # [P]
    request = request_at(position, starts, b, SEARCH_STEPS)
    before = tl.load(starts + request)
    after = tl.load(starts + tl.minimum(request + 1, b))
    if WIDTH > 0:
        before += (position - before) // WIDTH * WIDTH
        after = tl.minimum(after, before + WIDTH)
    return position, tl.where(after - position < position - before, after, before)


@triton.jit
def equal_cut(part, starts, b, active, each, total, OVERHEAD: tl.constexpr):
    """The same where every request is cut by itself into `each` pieces."""
    request = tl.minimum(part // each, b)
    start = tl.load(starts + request)
    tiles = tl.load(starts + tl.minimum(request + 1, b)) - start - OVERHEAD
    piece = part % each
    position = start + tl.where(piece > 0, OVERHEAD + piece * tiles // each, 0)
    return tl.where(part < active, position, total)


# endregion: cut


# region: plan_parts_kernel
@triton.jit(do_not_specialize=["b", "parts"])
def plan_parts_kernel(
    starts,  # [b + 1] int64
    extremes,  # [2] int64
    tile_scheduler_metadata,  # [parts, 8] int32, with CHUNK [parts, 16]
    pieces_of_all,  # [1] int32: of every request; 0 where it depends on where cuts fall
    b,
    parts,
    OVERHEAD: tl.constexpr,
    SLACK: tl.constexpr,
    MOST_SLACK: tl.constexpr,
    LEAST: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    FULL: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # enough bisections for b + 1 candidates
    BLOCK: tl.constexpr,  # at least parts
):
    part = tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    total = tl.load(starts + b)
    active = active_parts(total, parts, b, CHUNK, FEW, FULL)
    WIDTH: tl.constexpr = OVERHEAD + CHUNK if CHUNK > 0 else 0
    begin, near_begin = cut(part, starts, b, active, total, SEARCH_STEPS, WIDTH)
    end, near_end = cut(part + 1, starts, b, active, total, SEARCH_STEPS, WIDTH)

    # Requests stay whole if that makes no part much longer than an equal share. Chunks always do.
    share = (total + active - 1) // tl.maximum(active, 1)
    slack = tl.minimum(tl.maximum(share // 2, SLACK), MOST_SLACK)
    whole = (CHUNK > 0) | (tl.max(near_end - near_begin) <= share + slack)
    begin = tl.where(whole, near_begin, begin)
    end = tl.where(whole, near_end, end)
    # Else, with as many parts to every request and nearly equal lengths, each is cut by itself.
    pieces = active // tl.maximum(b, 1)
    each = tl.maximum(pieces, 1)
    longest = (tl.load(extremes + 1) + each - 1) // each
    fits = (tl.load(extremes + 0) >= LEAST * pieces) & (longest <= share)
    alike = (whole == 0) & (pieces * b == active) & (pieces > 0) & fits
    tl.store(pieces_of_all, tl.where(whole, 1, tl.where(alike, pieces, 0)).to(tl.int32))
    begin = tl.where(alike, equal_cut(part, starts, b, active, each, total, OVERHEAD), begin)
    end = tl.where(alike, equal_cut(part + 1, starts, b, active, each, total, OVERHEAD), end)

    request = request_at(begin, starts, b, SEARCH_STEPS)
    end_request = request_at(end, starts, b, SEARCH_STEPS)
    start = tl.load(starts + request)
    end_start = tl.load(starts + end_request)
    if CHUNK > 0:
        begin_split = (begin - start) // WIDTH
        tile = begin_split * CHUNK
        end_tile = (end - end_start) // WIDTH * CHUNK
    else:
        # A place within a request's overhead counts as its tile 0.
        tile = tl.maximum(begin - start - OVERHEAD, 0)
        end_tile = tl.maximum(end - end_start - OVERHEAD, 0)
        # Parts before this one that hold tiles of the request it begins in: none at its tile 0.
        first = last_part_at(start + OVERHEAD, active, tl.maximum(total, 1))
        begin_split = tl.where(tile > 0, tl.where(alike, part % each, part - first), 0)

    COLUMNS: tl.constexpr = 16 if CHUNK > 0 else 8
    row = tile_scheduler_metadata + part * COLUMNS  # [BLOCK] pointers
    exists = part < parts
    tl.store(row + 0, request.to(tl.int32), mask=exists)
    tl.store(row + 1, tile.to(tl.int32), mask=exists)
    tl.store(row + 2, end_request.to(tl.int32), mask=exists)
    tl.store(row + 3, end_tile.to(tl.int32), mask=exists)
    tl.store(row + 4, begin_split.to(tl.int32), mask=exists)
    tl.store(row + 5, tl.full([BLOCK], CHUNK, tl.int32), mask=exists)
    for unused in range(6, COLUMNS):
        tl.store(row + unused, tl.zeros([BLOCK], tl.int32), mask=exists)


# endregion: plan_parts_kernel


# region: plan_splits_kernel
@triton.jit(do_not_specialize=["b", "parts"])
def plan_splits_kernel(
    starts,  # [b + 1] int64
    pieces_of_all,  # [1] int32
    num_splits,  # [b + 1] int32
    b,
    parts,
    OVERHEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # How many parts hold tiles of each request, or how many chunks it has, summed up.
    total = tl.load(starts + b)
    active = active_parts(total, parts, b, CHUNK, FEW, FULL)
    pieces = tl.load(pieces_of_all)
    used = tl.zeros([], tl.int64)
    tl.store(num_splits, 0)
    for block in range(0, b, BLOCK):
        request = block + tl.arange(0, BLOCK)  # [BLOCK]
        exists = request < b
        start = tl.load(starts + request, mask=exists, other=0)
        end = tl.load(starts + request + 1, mask=exists, other=0)
        if CHUNK > 0:
            splits = (end - start + OVERHEAD + CHUNK - 1) // (OVERHEAD + CHUNK)
        else:
            first = last_part_at(start + OVERHEAD, active, total)
            last = last_part_at(end - 1, active, total)
            splits = tl.where(pieces > 0, pieces, tl.maximum(last - first + 1, 1))
        splits = tl.where(exists, splits, 0)
        count = used + tl.cumsum(splits)
        tl.store(num_splits + 1 + request, count.to(tl.int32), mask=exists)
        used += tl.sum(splits)


# endregion: plan_splits_kernel


# region: get_metadata_launch
def get_metadata(
    cache_seqlens: torch.Tensor,
    parts: int,
    batch_invariant: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The split plan of `flashmla.schedule.plan`, computed where the lengths are.

    cache_seqlens [b] int32. Returns tile_scheduler_metadata [parts, 8], batch-invariant
    [parts, 16], and num_splits [b + 1], int32; `out` holds two such tensors, contiguous, to be
    rewritten in place. The host waits for nothing, so a CUDA graph can hold the call.
    """
    b = cache_seqlens.shape[0]
    if out is None:
        out = (
            torch.empty(
                parts,
                metadata_columns(batch_invariant),
                dtype=torch.int32,
                device=cache_seqlens.device,
            ),
            torch.empty(b + 1, dtype=torch.int32, device=cache_seqlens.device),
        )
    tile_scheduler_metadata, num_splits = out
    starts = torch.empty(b + 1, dtype=torch.int64, device=cache_seqlens.device)
    extremes = torch.empty(2, dtype=torch.int64, device=cache_seqlens.device)
    pieces = torch.empty(1, dtype=torch.int32, device=cache_seqlens.device)
    chunk = CHUNK if batch_invariant else 0
    with on_device(cache_seqlens.device):
        plan_starts_kernel[(1,)](
            cache_seqlens, starts, extremes, b, OVERHEAD=OVERHEAD, CHUNK=chunk, TILE=TILE,
            BLOCK=PLAN_BLOCK,
        )  # fmt: skip
        plan_parts_kernel[(1,)](
            starts, extremes, tile_scheduler_metadata, pieces, b, parts, OVERHEAD=OVERHEAD,
            SLACK=SLACK, MOST_SLACK=MOST_SLACK, LEAST=LEAST, CHUNK=chunk, FEW=FEW, FULL=FULL,
            SEARCH_STEPS=b.bit_length(), BLOCK=triton.next_power_of_2(parts),
        )  # fmt: skip
        plan_splits_kernel[(1,)](
            starts, pieces, num_splits, b, parts, OVERHEAD=OVERHEAD, CHUNK=chunk, FEW=FEW,
            FULL=FULL, BLOCK=PLAN_BLOCK,
        )  # fmt: skip
    return tile_scheduler_metadata, num_splits


# endregion: get_metadata_launch


# region: combine_kernel
@triton.jit
def combine_kernel(
    out_partial,  # [slots, s_q, h_q, d] float32
    lse_partial,  # [slots, h_q, s_q] float32
    num_splits,  # [b + 1] int32
    attn_sink,  # [h_q] float32; not read unless HAS_SINK
    out,  # [b, s_q, h_q, d]
    lse,  # [b, h_q, s_q] float32
    s_q,
    h_q,
    HAS_SINK: tl.constexpr,
    D: tl.constexpr,
):
    # One program for one row, that is one (request, query, head).
    program = tl.program_id(0)
    head = program % h_q
    query = program // h_q % s_q
    request = (program // h_q // s_q).to(tl.int64)
    first_slot = tl.load(num_splits + request)
    last_slot = tl.load(num_splits + request + 1)
    if last_slot - first_slot == 1:
        return  # the decode kernel has written this row already

    d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    best = tl.full([], float("-inf"), tl.float32)  # largest LSE so far
    weight_sum = tl.zeros([], tl.float32)
    for slot in range(first_slot, last_slot):
        index = tl.cast(slot, tl.int64)
        part_lse = tl.load(lse_partial + (index * h_q + head) * s_q + query)
        empty = part_lse == float("inf")  # this split had nothing for this row: weight 0
        part_lse = tl.where(empty, float("-inf"), part_lse)
        part_out = tl.load(out_partial + ((index * s_q + query) * h_q + head) * D + d)  # [D]
        new_best = tl.maximum(best, part_lse)
        finite_best = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp(part_lse - finite_best)
        rescale = tl.exp(best - finite_best)
        acc = acc * rescale + part_out * weight
        weight_sum = weight_sum * rescale + weight
        best = new_best

    nothing = weight_sum == 0.0
    divisor = tl.where(nothing, 1.0, weight_sum)
    result = acc / divisor  # [D]
    row_lse = tl.where(nothing, float("inf"), best + tl.log(divisor))
    if HAS_SINK:  # last: what a sink has scaled cannot be merged
        result *= sink_share(row_lse, tl.load(attn_sink + head))
    out_at = out + ((request * s_q + query) * h_q + head) * D + d
    tl.store(out_at, result.to(out.dtype.element_ty))
    tl.store(lse + (request * h_q + head) * s_q + query, row_lse)


# endregion: combine_kernel


def combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    num_splits: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_sink: torch.Tensor | None = None,
) -> None:
    """Merges the splits of each request into `out` and `lse`, in place, then applies the sink.

    out_partial [slots, s_q, h_q, d] and lse_partial [slots, h_q, s_q] float32, split k of
    request r at slot num_splits[r] + k; out [b, s_q, h_q, d], lse [b, h_q, s_q] float32; all
    contiguous, d a power of two; attn_sink [h_q] float32. Requests of one split are left as they
    are.
    """
    b, s_q, h_q, d = out.shape
    with on_device(out.device):
        combine_kernel[(b * s_q * h_q,)](
            out_partial, lse_partial, num_splits, lse if attn_sink is None else attn_sink, out, lse,
            s_q, h_q, HAS_SINK=attn_sink is not None, D=d, num_warps=4,
        )  # fmt: skip


# region: merge_state_kernel
@triton.jit(do_not_specialize=["rows"])
def merge_state_kernel(
    out_a,  # [rows, d]
    lse_a,  # [rows] float32
    out_b,  # [rows, d]
    lse_b,  # [rows] float32
    out,  # [rows, d]
    lse,  # [rows] float32
    rows,
    d,
    D: tl.constexpr,  # d, rounded up to a power of two
    ROWS: tl.constexpr,  # rows of a program
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R]
    column = tl.arange(0, D)  # [D]
    exists = row < rows
    a = tl.load(lse_a + row, mask=exists, other=0.0)  # [R]
    b = tl.load(lse_b + row, mask=exists, other=0.0)  # [R]
    # An empty half has LSE +inf or -inf; its out is not read.
    has_a = tl.abs(a) != float("inf")  # [R]
    has_b = tl.abs(b) != float("inf")  # [R]
    a = tl.where(has_a, a, float("-inf"))
    b = tl.where(has_b, b, float("-inf"))
    best = tl.where(has_a | has_b, tl.maximum(a, b), 0.0)  # [R]
    weight_a = tl.exp(a - best)
    weight_b = tl.exp(b - best)
    weight_sum = weight_a + weight_b  # [R], 0 if both halves are empty
    divisor = tl.where(weight_sum == 0.0, 1.0, weight_sum)

    at = row[:, None] * d + column  # [R, D]
    inside = exists[:, None] & (column < d)[None, :]
    value_a = tl.load(out_a + at, mask=inside & has_a[:, None], other=0.0).to(tl.float32)
    value_b = tl.load(out_b + at, mask=inside & has_b[:, None], other=0.0).to(tl.float32)
    merged = (value_a * weight_a[:, None] + value_b * weight_b[:, None]) / divisor[:, None]
    merged_lse = tl.where(weight_sum == 0.0, float("inf"), best + tl.log(divisor))
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, merged_lse, mask=exists)


# endregion: merge_state_kernel


def merge_state(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention over two sets of keys: out [..., d], lse [...] natural log.

    +inf and -inf mark an empty half; two empty halves give out 0 and LSE +inf. Returns out in
    out_a's dtype and lse float32.
    """
    d = out_a.shape[-1]
    out = torch.empty(out_a.shape, dtype=working_dtype(out_a.dtype), device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if out.numel():
        d_padded = triton.next_power_of_2(d)
        rows_each = max(1, 2048 // d_padded)
        with on_device(out.device):
            merge_state_kernel[(triton.cdiv(lse.numel(), rows_each),)](
                out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous(),
                out, lse, lse.numel(), d, D=d_padded, ROWS=rows_each,
            )  # fmt: skip
    return out.to(out_a.dtype), lse
