"""The split plan: closed form against the definition, and what every plan has to keep to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla import schedule
from flashmla.reference.split_kv import plan_slow
from flashmla.torch.split_kv import get_metadata

LENGTHS = [
    [0],
    [1],
    [64],
    [65],
    [0, 0, 0],
    [0, 64, 0, 129, 0],
    [4096] * 8,
    [131072],
    [1] * 300,
    [5, 100000, 0, 63, 64, 65],
    [9000, 8900, 9100],
]
PARTS = [1, 2, 3, 7, 66, 132]


ANY = st.lists(st.integers(0, 3000), min_size=1, max_size=40)
NEARLY_ALIKE = st.tuples(  # those that may be cut alike
    st.integers(0, 5000), st.lists(st.integers(0, 400), min_size=1, max_size=40)
).map(lambda x: [x[0] + more for more in x[1]])

BOTH_KINDS = pytest.mark.parametrize("batch_invariant", [False, True])


@BOTH_KINDS
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("seqlens", LENGTHS, ids=lambda x: f"b{len(x)}_{sum(x)}")
def test_closed_form_is_the_definition(seqlens, parts, batch_invariant):
    metadata, num_splits = schedule.plan(seqlens, parts, batch_invariant)
    slow_metadata, slow_splits = plan_slow(seqlens, parts, batch_invariant)
    np.testing.assert_array_equal(metadata, slow_metadata)
    np.testing.assert_array_equal(num_splits, slow_splits)
    assert metadata.dtype == num_splits.dtype == np.int32


@settings(max_examples=150, deadline=None)
@given(ANY | NEARLY_ALIKE, st.integers(1, 140), st.booleans())
def test_closed_form_is_the_definition_for_any_lengths(seqlens, parts, batch_invariant):
    plans = (make(seqlens, parts, batch_invariant) for make in (schedule.plan, plan_slow))
    for fast, slow in zip(*plans, strict=True):
        np.testing.assert_array_equal(fast, slow)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-3, 9000), min_size=1, max_size=40) | NEARLY_ALIKE,
    st.integers(1, 140),
    st.booleans(),
)
def test_torch_makes_the_same_plan(seqlens, parts, batch_invariant):
    made = get_metadata(torch.tensor(seqlens, dtype=torch.int32), parts, batch_invariant)
    for tensor, array in zip(made, schedule.plan(seqlens, parts, batch_invariant), strict=True):
        assert tensor.dtype == torch.int32
        np.testing.assert_array_equal(tensor.numpy(), array)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=40) | NEARLY_ALIKE, st.integers(1, 140))
def test_every_tile_is_done_once_and_by_about_equal_parts(seqlens, parts):
    metadata, num_splits = schedule.plan(seqlens, parts)
    tiles = [-(-length // schedule.TILE) for length in seqlens]
    done = [np.zeros(n, dtype=int) for n in tiles]
    slots = set()
    work = []
    for begin_request, begin_tile, end_request, end_tile, begin_split, *zeros in metadata:
        assert zeros == [0, 0, 0]
        own = 0
        for request in range(begin_request, min(end_request, len(seqlens) - 1) + 1):
            first = begin_tile if request == begin_request else 0
            last = end_tile if request == end_request else tiles[request]
            if first < last:
                done[request][first:last] += 1
                slot = num_splits[request] + (begin_split if request == begin_request else 0)
                assert slot < num_splits[request + 1] and slot not in slots
                slots.add(slot)
                own += last - first
        work.append(own)
    assert all((count == 1).all() for count in done)
    total = sum(tiles) + schedule.OVERHEAD * len(tiles)
    split = num_splits[-1] > len(seqlens)
    spare = schedule.OVERHEAD if split else schedule.MOST_SLACK
    active = schedule.active_parts(total, parts, len(tiles))
    assert max(work) <= -(-total // active) + spare
    empty = sum(n == 0 for n in tiles)
    assert num_splits[-1] == len(slots) + empty <= len(seqlens) + parts


@pytest.mark.parametrize(
    ("places", "parts", "batch", "want"),
    [(6, 10, 1, 6), (21, 66, 1, 21), (69, 66, 1, 32), (261, 66, 1, 43), (10_000, 66, 1, 66),
     (1104, 66, 16, 64), (2208, 66, 32, 64), (3036, 66, 44, 66), (13_800, 66, 200, 66),
     (10_000, 9, 9, 9), (10_000, 9, 8, 8), (10_000, 10, 8, 10)],
)  # fmt: skip
def test_active_parts(places, parts, batch, want):
    """Up to 32, then those with six places; a multiple of the batch if an eighth idles at most."""
    assert schedule.active_parts(places, parts, batch) == want


def test_no_overflow_of_32_bits():
    seqlens = [2**31 - 1] * 70
    metadata, num_splits = schedule.plan(seqlens, 132)
    made = get_metadata(torch.tensor(seqlens, dtype=torch.int32), 132)
    np.testing.assert_array_equal(made[0].numpy(), metadata)
    np.testing.assert_array_equal(made[1].numpy(), num_splits)
    assert (np.diff(metadata[:, 0]) >= 0).all() and metadata[-1, 0] == 69
    assert tuple(metadata[-1, 2:4]) == (70, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=40), st.integers(1, 140))
def test_a_plan_has_no_more_results_than_there_is_room_for(seqlens, parts):
    for batch_invariant in (False, True):
        metadata, num_splits = schedule.plan(seqlens, parts, batch_invariant)
        room = schedule.max_slots(metadata.shape, len(seqlens), max(seqlens))
        assert num_splits[-1] <= room
        if batch_invariant and len(set(seqlens)) == 1:
            assert num_splits[-1] == room


def test_empty_batch():
    metadata, num_splits = schedule.plan([], 4)
    assert metadata.shape == (4, 8) and not metadata.any()
    assert num_splits.tolist() == [0]
    made = get_metadata(torch.empty(0, dtype=torch.int32), 4)
    assert not made[0].any() and made[1].tolist() == [0]


def test_cuts_of_equal_places_by_hand():
    # 20 tiles and 1, each with 5 of overhead, over 5 parts: cuts at places 0, 6, 12, 18 and 24 of
    # 31, the last of them one short of request 1.
    metadata, num_splits = schedule.plan([1280, 1], 5)
    rows = [[0, 0, 0, 1, 0], [0, 1, 0, 7, 1], [0, 7, 0, 13, 2], [0, 13, 0, 19, 3], [0, 19, 2, 0, 4]]
    assert metadata[:, :5].tolist() == rows
    assert num_splits.tolist() == [0, 5, 6]


def test_one_request_is_cut_equally():
    metadata, num_splits = schedule.plan([1280], 4)
    rows = [[0, 0, 0, 5, 0], [0, 5, 0, 10, 1], [0, 10, 0, 15, 2], [0, 15, 1, 0, 3]]
    assert metadata[:, :5].tolist() == rows
    assert num_splits.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("seqlens", "parts", "want"),
    [
        ([4096] * 8, 66, True),  # eight parts a request, of 8 tiles; 2 of the 66 stay idle
        ([4096] * 16 + [4097] * 16, 66, True),  # 32 and 33 tiles; a share has 35 places
        ([4096] * 15 + [4480], 66, True),  # a piece of 18 tiles; a share has 18 places
        ([4096] * 15 + [4672], 66, False),  # of 19
        ([4096] * 7 + [2048], 66, True),  # 32 tiles in eight pieces
        ([4096] * 7 + [1984], 66, False),  # 31 tiles in as many: less than four each
        ([4096], 66, False),  # 64 tiles in 32 pieces
        ([4096] * 25, 66, False),  # 66 parts for 25 requests
    ],
)
def test_requests_of_about_one_length_are_cut_alike(seqlens, parts, want):
    metadata, num_splits = schedule.plan(seqlens, parts)
    tiles = [-(-length // schedule.TILE) for length in seqlens]
    active = schedule.active_parts(sum(tiles) + 5 * len(tiles), parts, len(tiles))
    pieces, over = divmod(active, len(tiles))
    equal = [(r, i * n // max(1, pieces)) for r, n in enumerate(tiles) for i in range(pieces)]
    got = [tuple(row) for row in metadata[:active, :2].tolist()]
    assert (got == equal and over == 0) == want
    if want:
        assert (metadata[active:, 0] == len(seqlens)).all()
        assert metadata[:active, 4].tolist() == list(range(pieces)) * len(seqlens)
        assert num_splits.tolist() == [pieces * r for r in range(len(seqlens) + 1)]


def test_long_shares_leave_more_slack():
    # 44 requests of 69 places on 66 parts: whole ones exceed the share of 46 by 23, half of it.
    assert (np.diff(schedule.plan([4096] * 44, 66)[1]) == 1).all()
    assert (np.diff(schedule.plan([4096] * 43, 66)[1]) > 1).any()  # a share of 45
    # Twice as long, they would exceed 90 by more than 24.
    assert (np.diff(schedule.plan([8192] * 44, 66)[1]) > 1).any()


def test_a_request_stays_whole_by_hand():
    # 10 tiles and 5 of overhead over 3 parts: one part of 15 places exceeds a share of 5 by no
    # more than the slack of 10. The cuts at places 5 and 10 move to the ends, 0 and 15.
    metadata, num_splits = schedule.plan([640], 3)
    assert metadata[:, :5].tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
    assert num_splits.tolist() == [0, 1]
    assert schedule.plan([705], 3)[1].tolist() == [0, 3]  # 17 places are one too many


@pytest.mark.parametrize(
    ("rows", "heads", "sms", "want"),
    [(128, 1, 132, 66), (16, 1, 132, 132), (64, 1, 132, 132), (65, 1, 132, 66),
     (1, 200, 132, 1), (256, 2, 132, 16), (128, 1, 78, 39)],
)  # fmt: skip
def test_num_parts(rows, heads, sms, want):
    assert schedule.num_parts(rows, heads, sms) == want


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"parts must be at least 1, got 0"):
        schedule.plan([1], 0)
    with pytest.raises(ValueError, match=r"cache_seqlens must have shape \[b\], got shape \[1, 1]"):
        schedule.plan(np.zeros((1, 1), int), 1)
