"""Stage 04: split-KV, in NumPy: partial results, their merge, and the plan that splits.

Attention over a set of keys is summed up by (out, LSE).  The summaries of two disjoint sets merge
into that of their union, in any order and any grouping, so that many processors can share one
long sequence.  The plan says who does what.

The plan lays all requests on one line: a request is OVERHEAD positions long, for what it costs to
start one, and then as many as it has tiles of TILE tokens.  The line is cut into equal parts,
unless parts of whole requests are almost as equal: merging is not free.  Where there are as many
parts to every request, and requests of about one length, each is cut equally by itself.

A batch-invariant plan cuts a request into chunks of CHUNK tiles, whatever else is on the line. Each
is OVERHEAD positions longer than its tiles, and no part ends within one.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from flashmla.reference.mha import scaled_scores, softmax, ungroup_heads
from flashmla.reference.paged_kv import gather

TILE = 64  # tokens in a tile of work, whatever the page size
OVERHEAD = 5  # what starting a request costs, in tiles
SLACK = 10  # places a part may exceed the equal share by, for requests to stay whole
MOST_SLACK = 24  # what that grows to for long shares: half the share, up to this
FULL = 6  # places that are worth a part of its own, however many parts there are
FEW = 32  # parts that get work whether they are full or not
LEAST = 4  # tiles that every piece has at least where requests are cut alike
CHUNK = 16  # tiles that a batch-invariant plan never cuts, counted from a request's start


def partial(q, k, v, begin, end, scale=None, causal=False):
    """Attention with keys begin to end - 1 only; the causal mask is that of the whole sequence.

    q [s_q, h_q, d_qk], k [s_k, h_kv, d_qk], v [s_k, h_kv, d_v]
    -> out [s_q, h_q, d_v], lse [s_q, h_q]
    """
    s_q, h_q, _ = q.shape
    probabilities, lse = softmax(scaled_scores(q, k, scale, causal)[..., begin:end])
    out = probabilities @ np.asarray(v, np.float64)[begin:end].transpose(1, 0, 2)
    return ungroup_heads(out, s_q, h_q), ungroup_heads(lse, s_q, h_q)


def merge(out_a, lse_a, out_b, lse_b):
    """The summary of a union of disjoint key sets: out [..., d], lse [...], natural log.

        lse = log(exp(lse_a) + exp(lse_b))    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    +inf and -inf both mark a set that is empty; two empty sets give out 0 and LSE +inf.
    """
    parts = [
        (np.asarray(out, np.float64), np.where(np.isinf(lse), -np.inf, np.asarray(lse, np.float64)))
        for out, lse in ((out_a, lse_a), (out_b, lse_b))
    ]
    lse = np.logaddexp(parts[0][1], parts[1][1])
    empty = lse == -np.inf
    total = np.zeros(np.broadcast_shapes(parts[0][0].shape, parts[1][0].shape))
    for out, part_lse in parts:
        weight = np.exp(part_lse - np.where(empty, 0.0, lse))[..., None]
        total = total + weight * np.where(weight == 0, 0.0, out)  # an empty set's out is not read
    return total, np.where(empty, np.inf, lse)


def merge_many(outs, lses):
    """Merge any number (>= 1) of summaries from left to right: lists of out [..., d], lse [...]."""
    return reduce(lambda a, b: merge(*a, *b), zip(outs, lses, strict=True))


def tiles_of(seqlen):
    """How many tiles of TILE tokens hold seqlen tokens."""
    return -(-int(seqlen) // TILE)


def chunks_of(seqlen, batch_invariant=True):
    """The tiles of one request, in the pieces that the plan lays on the line: ranges of tiles."""
    tiles = tiles_of(seqlen)
    size = CHUNK if batch_invariant else max(1, tiles)
    return [range(first, min(tiles, first + size)) for first in range(0, max(1, tiles), size)]


def worthwhile(places, parts, requests):
    """How many of the parts to use: merging many small pieces takes longer than it saves."""
    enough = [n for n in range(parts + 1) if n * FULL <= places or n <= min(places, FEW)]
    most = max(enough)
    alike = most // max(1, requests) * requests  # requests of one length are then cut alike
    return alike if alike and (most - alike) * 8 <= most else most


def cut_line(seqlens, parts, batch_invariant=False):
    """Where each part begins and ends, as parts + 1 cuts (request, tile), by walking the line.

    If cuts moved to the nearest start of a request make no part longer than an equal share and
    some SLACK, they stay there, and no request is split. In a batch-invariant plan they always
    stay at the nearest start, and it is that of a chunk. Else, if there are as many parts to every
    request, and equal pieces of each have LEAST tiles and fit into an equal share, those they are.
    """
    line: list[tuple[int, int]] = []
    starts = []
    for request, seqlen in enumerate(seqlens):
        for tiles in chunks_of(seqlen, batch_invariant):
            starts.append(len(line))
            line += [(request, tiles.start)] * OVERHEAD + [(request, tile) for tile in tiles]
    active = min(parts, len(line))
    if not batch_invariant:
        active = worthwhile(len(line), parts, len(seqlens))
    positions = [part * len(line) // active for part in range(active)]
    positions += [len(line)] * (parts + 1 - active)
    nearest = [min([*starts, len(line)], key=lambda s: (abs(s - p), s)) for p in positions]
    longest = max(end - begin for begin, end in zip(nearest[:-1], nearest[1:], strict=True))
    share = -(-len(line) // max(1, active))
    if batch_invariant or longest <= share + min(MOST_SLACK, max(SLACK, share // 2)):
        positions = nearest
    elif active % len(seqlens) == 0:
        tiles, each = [tiles_of(seqlen) for seqlen in seqlens], active // len(seqlens)
        if min(tiles) >= LEAST * each and -(-max(tiles) // each) <= share:
            cuts = [(r, piece * n // each) for r, n in enumerate(tiles) for piece in range(each)]
            return cuts + [(len(seqlens), 0)] * (parts + 1 - active)
    return [line[p] if p < len(line) else (len(seqlens), 0) for p in positions]


def plan_slow(seqlens, parts, batch_invariant=False):
    """The split plan from its definition: each part takes the tiles between its two cuts.

    seqlens [b] -> metadata int32 [parts, 8]: begin request and tile, end request and tile (end not
    included), how many partial results of the begin request earlier parts make, CHUNK or 0, and two
    zeros, in a batch-invariant plan ten; num_splits int32 [b + 1]: a request's partial results are
    numbered num_splits[i] onwards.
    """
    cuts = cut_line(seqlens, parts, batch_invariant)
    results = [0] * len(seqlens)  # partial results of the request, so far
    metadata = np.zeros((parts, 16 if batch_invariant else 8), np.int32)
    for part, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        earlier = results[begin[0]] if begin[1] > 0 else 0
        metadata[part, :6] = *begin, *end, earlier, CHUNK if batch_invariant else 0
        for request, seqlen in enumerate(seqlens):
            for tiles in chunks_of(seqlen, batch_invariant):
                results[request] += any(begin <= (request, tile) < end for tile in tiles)
    splits = [max(1, count) for count in results]
    return metadata, np.cumsum([0, *splits], dtype=np.int32)


def work_of(metadata_row, seqlens):
    """The stretches that one part computes, as (request, first tile, end tile); an empty request
    has (0, 0)."""
    begin, end, chunk = tuple(metadata_row[:2]), tuple(metadata_row[2:4]), metadata_row[5]
    work = []
    for request, seqlen in enumerate(seqlens):
        for tiles in chunks_of(seqlen, chunk > 0):
            mine = [t for t in tiles or [0] if begin <= (request, t) < end]
            if mine:
                work.append((request, mine[0], mine[-1] + 1 if seqlen else 0))
    return work


def split_decode(q, cache, block_table, seqlens, metadata, d_v, scale=None, causal=False):
    """Paged decode as the plan has it: each part summarises its tiles, then requests are merged.

    q [b, s_q, h_q, d_qk], cache [blocks, page, h_kv, d_qk], block_table [b, max_blocks],
    seqlens [b], metadata [parts, 8] -> out [b, s_q, h_q, d_v], lse [b, h_q, s_q]
    """
    summaries: list[list] = [[] for _ in q]
    for row in metadata:
        for request, first, end in work_of(row, seqlens):
            kv = gather(cache, block_table[request], seqlens[request])
            tokens = first * TILE, min(end * TILE, len(kv))
            part = partial(q[request], kv, kv[..., :d_v], *tokens, scale, causal)
            summaries[request].append(part)
    merged = [merge_many(*zip(*parts, strict=True)) for parts in summaries]
    return np.stack([out for out, _ in merged]), np.stack([lse.T for _, lse in merged])
