"""Sparse prefill of at most 32 heads on a Hopper card: a kernel of its own, whose tiles are as wide
as 8, 16 or 32 heads. What holds for any number of heads is in test_sparse_prefill_cuda.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import SparsePrefillCase, case_id
from test_sparse_prefill_cuda import (
    DEVICE,
    assert_right,
    assert_same,
    poison_free_memory,
    prefill,
)

pytestmark = pytest.mark.gpu
REPEATS = 10
Case = SparsePrefillCase

WIDTHS = (8, 16, 32)
TYPES = (torch.bfloat16, torch.float16)

HEADS = tuple(
    Case(f"h{h_q}_{dtype}", 7, 400, h_q, 200, d_qk=576 if h_q % 3 else 512, sink=h_q % 2 == 0,
         dtype=dtype, seed=h_q)
    for h_q in (1, 3, 7, 8, 9, 12, 15, 16, 17, 24, 25, 31, 32, 33)
    for dtype in TYPES
)  # fmt: skip
LISTS = tuple(
    Case(f"h{h_q}_topk{topk}", 3, 500, h_q, topk, invalid=0.1, seed=topk)
    for h_q in WIDTHS
    for topk in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 500)
)
# Several queries an SM, so that the ring and what is kept of it pass from one to the next.
QUERIES = tuple(
    case
    for h_q in WIDTHS
    for case in (
        Case(f"h{h_q}_long", 5, 5000, h_q, 2048, invalid=0.02, seed=40),
        Case(f"h{h_q}_many", 300, 700, h_q - 1, 140, sink=True, seed=41),
        Case(f"h{h_q}_many_lengths", 400, 700, h_q, 200, sink=True, seed=42,
             topk_length=tuple(i * 37 % 201 for i in range(400))),
        Case(f"h{h_q}_every_other_empty", 280, 300, h_q, 100, topk_length=(0, 100) * 140, seed=43),
        Case(f"h{h_q}_one_tile_or_none", 600, 300, h_q, 60, topk_length=(0, 1, 60, 60, 0) * 120,
             seed=44),
        Case(f"h{h_q}_mostly_invalid", 200, 300, h_q, 300, invalid=0.95, seed=45),
    )
)  # fmt: skip


@pytest.mark.parametrize("case", (*HEADS, *LISTS, *QUERIES), ids=case_id)
def test_against_oracle(case: SparsePrefillCase) -> None:
    x = case.build(DEVICE)
    poison_free_memory()
    assert_right(prefill(x), x)


@pytest.mark.parametrize("h_q", WIDTHS)
@pytest.mark.parametrize("name", ["long", "many_lengths", "one_tile_or_none"])
def test_repeats_bit_for_bit(h_q: int, name: str) -> None:
    x = next(case for case in QUERIES if case.name == f"h{h_q}_{name}").build(DEVICE)
    first = prefill(x)
    for _ in range(REPEATS):
        poison_free_memory()
        assert_same(prefill(x), first)


@pytest.mark.parametrize("h_q", WIDTHS)
def test_a_query_does_not_depend_on_its_neighbours(h_q: int) -> None:
    x = Case("alone", 9, 900, h_q, 700, seed=50).build(DEVICE)
    want = prefill(x)
    for i in range(9):
        alone = replace(x, q=x.q[i : i + 1], indices=x.indices[i : i + 1])
        assert_same(prefill(alone), tuple(t[i : i + 1] for t in want))


@pytest.mark.parametrize("h_q", WIDTHS)
def test_heads_whose_scores_grow_at_different_times(h_q: int) -> None:
    """The maximum in use lags behind: some heads outgrow it tile by tile, some never."""
    x = Case("growing", 2, 640, h_q, 640, invalid=0.0, seed=51).build(DEVICE)
    x.q, x.kv = torch.zeros_like(x.q), torch.zeros_like(x.kv)
    x.q[..., 0] = torch.arange(h_q, device=DEVICE).to(x.q.dtype)
    x.kv[..., 0] = (torch.arange(640, device=DEVICE) * 0.125).view(640, 1).to(x.kv.dtype)
    x.indices = torch.arange(640, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
    for indices in (x.indices, x.indices.flip(-1)):
        assert_right(prefill(replace(x, indices=indices)), replace(x, indices=indices))


@pytest.mark.parametrize("h_q", WIDTHS)
def test_a_first_tile_without_a_valid_token(h_q: int) -> None:
    """Nothing to take a maximum from, in any of the first tiles of either half of the kernel."""
    x = Case("late", 4, 300, h_q, 300, invalid=0.0, seed=52).build(DEVICE)
    for tiles in (1, 2, 3, 4):
        indices = x.indices.clone()
        indices[..., : 64 * tiles] = -1
        assert_right(prefill(replace(x, indices=indices)), replace(x, indices=indices))


@pytest.mark.parametrize("h_q", WIDTHS)
def test_more_queries_than_a_grid_dimension(h_q: int) -> None:
    """70,000 queries: the same few over and over."""
    x = Case("rows", 70, 200, h_q, 65, seed=53).build(DEVICE)
    want = prefill(x)
    q, indices = x.q.repeat(1000, 1, 1), x.indices.repeat(1000, 1, 1)
    got = prefill(replace(x, q=q, indices=indices))
    assert_same(got, (want[0].repeat(1000, 1, 1), *(t.repeat(1000, 1) for t in want[1:])))
