"""The oracle's merge as an algebra, and its plan by the properties a plan must have."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DECODE_CASES, case_id, to_numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashmla.reference import mha, split_kv
from flashmla.reference.split_kv import OVERHEAD, TILE

LSES = st.one_of(st.sampled_from([np.inf, -np.inf]), st.floats(-50, 50))
SEEDS = st.integers(0, 2**16)


def summary(lse, seed):
    """out [3], lse [] of some set of keys; an empty set's out is 0."""
    out = np.zeros(3) if np.isinf(lse) else np.random.default_rng(seed).normal(size=3)
    return out, np.float64(lse)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@given(LSES, LSES, LSES, SEEDS)
@settings(max_examples=150, deadline=None)
@example(np.inf, -np.inf, 0.0, 0)
@example(np.inf, np.inf, -np.inf, 0)
def test_merge_is_associative_and_commutative(lse_a, lse_b, lse_c, seed):
    a, b, c = (summary(lse, seed + i) for i, lse in enumerate((lse_a, lse_b, lse_c)))
    left = split_kv.merge(*split_kv.merge(*a, *b), *c)
    right = split_kv.merge(*a, *split_kv.merge(*b, *c))
    assert_same(left, right)
    assert_same(split_kv.merge(*a, *b), split_kv.merge(*b, *a))
    assert_same(split_kv.merge_many(*zip(a, b, c, strict=True)), left)
    assert not any(np.isnan(x).any() for x in left)


@pytest.mark.parametrize("mark", [np.inf, -np.inf])
@pytest.mark.parametrize("rubbish", [0.0, np.nan, np.inf])
def test_an_empty_half_is_the_identity_whatever_its_out_holds(mark, rubbish):
    a = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, np.inf])
    a[0][1] = 0.0
    empty = np.full((2, 2), rubbish), np.full(2, mark)
    for merged in (split_kv.merge(*a, *empty), split_kv.merge(*empty, *a)):
        np.testing.assert_array_equal(merged[0], a[0])
        np.testing.assert_array_equal(merged[1], a[1])


def test_a_merge_by_hand():
    out, lse = split_kv.merge([1.0, 0.0], np.log(3.0), [5.0, 8.0], np.log(1.0))
    np.testing.assert_allclose(out, [2.0, 2.0], rtol=1e-14)
    np.testing.assert_allclose(lse, np.log(4.0), rtol=1e-14)


def test_merge_does_not_overflow():
    out, lse = split_kv.merge([1.0], 5000.0, [3.0], 5000.0)
    np.testing.assert_allclose(out, [2.0])
    np.testing.assert_allclose(lse, 5000.0 + np.log(2.0))
    out, lse = split_kv.merge([1.0], -5000.0, [3.0], 5000.0)
    assert out == [3.0] and lse == 5000.0


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=5), st.booleans(), SEEDS)
@settings(max_examples=50, deadline=None)
def test_partials_over_any_cuts_merge_to_the_whole(s_k, cuts, causal, seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, 4, 6)), rng.normal(size=(s_k, 2, 6)), rng.normal(size=(s_k, 2, 5))
    edges = [0, *sorted(min(cut, s_k) for cut in cuts), s_k]
    parts = [
        split_kv.partial(q, k, v, *edges[i : i + 2], causal=causal) for i in range(len(edges) - 1)
    ]
    rng.shuffle(parts)
    merged = split_kv.merge_many(*zip(*parts, strict=True))
    assert_same(merged, mha.attention(q, k, v, causal=causal))


SEQLENS = st.lists(st.one_of(st.integers(0, 200), st.integers(0, 9000)), min_size=1, max_size=12)


@given(SEQLENS, st.integers(1, 140))
@settings(max_examples=150, deadline=None)
@example([0], 1)
@example([0, 0, 0], 132)
@example([1], 132)
@example([64 * 500], 132)
@example([0, 64, 0, 4096, 0], 7)
def test_every_tile_is_done_once_in_order_and_nobody_does_much_more_than_a_share(seqlens, parts):
    metadata, num_splits = split_kv.plan_slow(seqlens, parts)
    assert metadata.shape == (parts, 8) and metadata.dtype == num_splits.dtype == np.int32
    assert (metadata[:, 5:] == 0).all()
    done, touched, writers = [], [], np.zeros(len(seqlens), int)
    for row in metadata:
        work = split_kv.work_of(row, seqlens)
        touched += [request for request, _, _ in work]
        for request, first, end in work:
            done += [(request, tile) for tile in range(first, end)]
            writers[request] += 1
    tiles = [-(-seqlen // TILE) for seqlen in seqlens]
    assert done == [(request, tile) for request, n in enumerate(tiles) for tile in range(n)]
    assert set(touched) == set(range(len(seqlens)))  # the empty ones, too: each by one part
    np.testing.assert_array_equal(np.diff(num_splits), writers)
    assert num_splits[0] == 0 and num_splits[-1] <= len(seqlens) + parts
    line = sum(tiles) + OVERHEAD * len(seqlens)
    share = -(-line // split_kv.worthwhile(line, parts, len(seqlens)))
    for row in metadata:
        work = split_kv.work_of(row, seqlens)
        assert sum(end - first for _, first, end in work) <= share + split_kv.MOST_SLACK


@given(SEQLENS, st.integers(1, 140))
@settings(max_examples=100, deadline=None)
def test_begin_split_numbers_the_parts_of_a_request(seqlens, parts):
    metadata, num_splits = split_kv.plan_slow(seqlens, parts)
    seen = np.zeros(len(seqlens), int)
    for row in metadata:
        for request, first, _ in split_kv.work_of(row, seqlens):
            if request == row[0]:
                assert row[4] == (seen[request] if first > 0 else 0) == seen[request]
            else:
                assert first == 0 and seen[request] == 0
            seen[request] += 1
    np.testing.assert_array_equal(seen, np.diff(num_splits))


@given(SEQLENS, st.integers(1, 140))
@settings(max_examples=100, deadline=None)
def test_a_part_begins_where_the_one_before_ended(seqlens, parts):
    metadata, _ = split_kv.plan_slow(seqlens, parts)
    assert metadata[0, :2].tolist() == [0, 0]
    assert metadata[-1, 2:4].tolist() == [len(seqlens), 0]
    np.testing.assert_array_equal(metadata[1:, :2], metadata[:-1, 2:4])


@given(SEQLENS, st.integers(1, 140))
@settings(max_examples=150, deadline=None)
@example([0], 1)
@example([64 * 16 * 40], 132)
@example([1024, 1025, 0, 1023], 3)
def test_a_batch_invariant_plan_cuts_each_request_by_its_own_length(seqlens, parts):
    metadata, num_splits = split_kv.plan_slow(seqlens, parts, batch_invariant=True)
    assert metadata.shape == (parts, 16) and metadata.dtype == num_splits.dtype == np.int32
    assert (metadata[:, 5] == split_kv.CHUNK).all() and not metadata[:, 6:].any()
    work = [piece for row in metadata for piece in split_kv.work_of(row, seqlens)]
    alone = []
    for request, seqlen in enumerate(seqlens):
        (row,), _ = split_kv.plan_slow([seqlen], 1, batch_invariant=True)
        alone += [(request, first, end) for _, first, end in split_kv.work_of(row, [seqlen])]
    assert work == alone
    chunks = [request for request, _, _ in work]
    np.testing.assert_array_equal(np.diff(num_splits), np.bincount(chunks, minlength=len(seqlens)))
    for row in metadata:  # the first piece's number among its request's
        if split_kv.work_of(row, seqlens):
            request, first, _ = split_kv.work_of(row, seqlens)[0]
            assert row[4] == first // split_kv.CHUNK and row[0] == request
    line = sum(OVERHEAD * max(1, -(-s // 1024)) + -(-s // TILE) for s in seqlens)
    for row in metadata:
        own = sum(OVERHEAD + end - first for _, first, end in split_kv.work_of(row, seqlens))
        assert own <= -(-line // min(parts, line)) + OVERHEAD + split_kv.CHUNK


def test_a_batch_invariant_plan_by_hand():
    # Chunks of 16, 16 and 8 tiles, none, and 3: places 0 to 20, 21 to 41, 42 to 54, 55 to 59 and 60
    # to 67. Cuts at 0, 17, 34 and 51 of 68 move to the nearest starts: 0, 21, 42, and 55, not 42.
    metadata, num_splits = split_kv.plan_slow([2560, 0, 130], 4, batch_invariant=True)
    rows = [[0, 0, 0, 16, 0], [0, 16, 0, 32, 1], [0, 32, 1, 0, 2], [1, 0, 3, 0, 0]]
    assert metadata[:, :5].tolist() == rows
    assert num_splits.tolist() == [0, 3, 4, 5]


def test_a_plan_by_hand():
    # Request 0 has 3 tiles, request 1 none, request 2 has 7: a line of 8 + 5 + 12 = 25 positions,
    # cut at 0, 8 and 16.  16 is request 2 with 3 of its 5 positions of overhead behind it.
    metadata, num_splits = split_kv.plan_slow([130, 0, 448], 3)
    assert metadata[:, :5].tolist() == [[0, 0, 1, 0, 0], [1, 0, 2, 0, 0], [2, 0, 3, 0, 0]]
    assert num_splits.tolist() == [0, 1, 2, 3]
    # 20 tiles, none and 3: a line of 25 + 5 + 8 = 38.  Whole requests would make one part 25 long,
    # more than the share of 10 and its slack of 10, so the cuts stay at 0, 9, 19 and 28: tiles 4
    # and 14 of request 0, and request 1, of whose overhead 28 is a part.
    metadata, num_splits = split_kv.plan_slow([1280, 0, 130], 4)
    assert metadata[:, :5].tolist() == [
        [0, 0, 0, 4, 0],
        [0, 4, 0, 14, 1],
        [0, 14, 1, 0, 2],
        [1, 0, 3, 0, 0],
    ]
    assert num_splits.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize(("parts", "most"), [(132, 1), (66, 2), (33, 4)])
def test_equal_requests_stay_whole_where_that_balances(parts, most):
    metadata, num_splits = split_kv.plan_slow([4096] * 128, parts)
    assert num_splits.tolist() == list(range(129))
    assert (metadata[:, 2] - metadata[:, 0]).max() == most


def test_parts_beyond_the_line_are_empty():
    metadata, num_splits = split_kv.plan_slow([1], 10)  # a line of 6 positions
    # Places 0 to 3 are nearest to the request's start, 3 by a tie; 4 and 5 to its end.
    assert metadata[3].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert (metadata[:3, :4] == 0).all()
    assert (metadata[4:] == [1, 0, 1, 0, 0, 0, 0, 0]).all()
    assert num_splits.tolist() == [0, 1]


@pytest.mark.parametrize("parts", [1, 7, 132])
@pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
def test_split_decode_equals_paged_decode(case, parts):
    inputs = case.build()
    arrays = [
        to_numpy(x) for x in (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    ]
    for batch_invariant in (False, True):
        metadata, _ = split_kv.plan_slow(case.lengths, parts, batch_invariant)
        got = split_kv.split_decode(*arrays, metadata, case.d_v, case.scale, case.causal)
        for x, y in zip(got, inputs.expected(sink=False), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
