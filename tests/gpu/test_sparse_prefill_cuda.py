"""Sparse prefill on a Hopper card: the CUDA tier against the oracle, poisoned, and bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import SPARSE_PREFILL_CASES, SparsePrefillCase, SparsePrefillInputs, case_id

import flashmla
from flashmla import backend
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
REPEATS = 20
Case = SparsePrefillCase
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

HEADS = tuple(
    Case(f"h{h_q}", 7, 400, h_q, 200, d_qk=576 if h_q % 2 else 512, sink=h_q % 3 == 0, seed=h_q)
    for h_q in (1, 2, 7, 8, 16, 24, 32, 48, 63, 64, 65, 96, 127, 128)
)
LISTS = tuple(
    Case(f"topk{topk}", 3, 500, 72, topk, invalid=0.1, seed=topk)
    for topk in (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 500)
)
LARGE = (
    Case("long", 5, 5000, 128, 2048, invalid=0.02, seed=40),
    Case("long_few_heads", 5, 5000, 8, 2048, invalid=0.0, seed=41),
    Case("many_queries", 300, 700, 128, 140, sink=True, seed=42),
    Case("many_lengths", 400, 700, 80, 200, topk_length=tuple(i * 37 % 201 for i in range(400)),
         sink=True, seed=43),
    Case("every_other_empty", 280, 300, 128, 100, topk_length=(0, 100) * 140, seed=44),
    Case("lengths_beyond_the_list", 6, 300, 64, 70, topk_length=(70, 71, 1000, -1, -5, 3), seed=45),
    Case("fp16_long", 3, 2000, 100, 1500, dtype=torch.float16, sink=True, seed=46),
)  # fmt: skip
CASES = (*SPARSE_PREFILL_CASES, *HEADS, *LISTS, *LARGE)


def prefill(x: SparsePrefillInputs, lse_base_2: bool = False) -> Result:
    """The public call, served by CUDA or not at all."""
    with backend.use_backend("cuda"):
        return flashmla.flash_mla_sparse_fwd(
            x.q, x.kv, x.indices, x.scale, x.case.d_v, x.attn_sink, x.topk_length,
            lse_base_2=lse_base_2,
        )  # fmt: skip


def poison_free_memory() -> None:
    """Fills what the allocator will hand out next with NaN: an unwritten output is then seen."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)
    torch.cuda.synchronize()


def named(name: str) -> SparsePrefillCase:
    return next(case for case in CASES if case.name == name)


def assert_right(got: Result, x: SparsePrefillInputs, lse_base_2: bool = False) -> None:
    if x.topk_length is not None:  # the kernel clips lengths; the oracle counts from behind
        x = replace(x, topk_length=x.topk_length.clamp(0, x.case.topk))
    want_out, want_max, want_lse = x.expected(lse_base_2)
    assert_out_close(got[0], want_out)
    assert_lse_close(got[1], want_max, name="max_logits")
    assert_lse_close(got[2], want_lse)


def assert_same(got: Result, want: Result) -> None:
    for name, a, b in zip(("out", "max_logits", "lse"), got, want, strict=True):
        assert_identical(name, a, b)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_oracle(case: SparsePrefillCase) -> None:
    x = case.build(DEVICE)
    poison_free_memory()
    assert_right(prefill(x), x)


@pytest.mark.parametrize("name", ["long", "many_lengths", "every_other_empty", "h128", "h16"])
def test_repeats_bit_for_bit(name: str) -> None:
    x = named(name).build(DEVICE)
    first = prefill(x)
    for _ in range(REPEATS):
        poison_free_memory()
        assert_same(prefill(x), first)


@pytest.mark.parametrize("name", ["length", "long", "nothing_valid"])
def test_an_lse_to_base_2(name: str) -> None:
    x = named(name).build(DEVICE)
    got = prefill(x, lse_base_2=True)
    assert_right(got, x, lse_base_2=True)
    assert_same(got[:2] + got[:1], prefill(x)[:2] + got[:1])


@pytest.mark.parametrize("wild", [-1, -2, -(2**31), 300, 301, 2**31 - 1])
def test_indices_that_point_nowhere(wild: int) -> None:
    """Every other index is one that points to nothing: as if the list were the other half."""
    x = Case("wild", 4, 300, 96, 150, invalid=0.0, seed=50).build(DEVICE)
    chosen = x.indices.clone()
    x.indices = torch.full((4, 1, 300), wild, dtype=torch.int32, device=DEVICE)
    x.indices[..., ::2] = chosen
    assert_right(prefill(x), replace(x, indices=chosen))


def test_an_index_given_twice_counts_twice() -> None:
    x = Case("twice", 3, 200, 64, 35, invalid=0.0, seed=51).build(DEVICE)
    once = x.expected()
    x.indices = x.indices.repeat(1, 1, 2)
    out, largest, lse = prefill(x)
    assert_out_close(out, once[0])
    assert_lse_close(largest, once[1], name="max_logits")
    assert_lse_close(lse, once[2] + np.log(2.0))


def test_the_largest_score_is_that_of_all_tiles() -> None:
    """Scores that grow slowly from tile to tile: the maximum that is subtracted lags behind."""
    x = Case("growing", 2, 640, 64, 640, invalid=0.0, seed=52).build(DEVICE)
    x.q, x.kv = torch.zeros_like(x.q), torch.zeros_like(x.kv)
    x.q[..., 0] = 1.0
    x.kv[..., 0] = (torch.arange(640, device=DEVICE) * 0.125).view(640, 1).to(x.kv.dtype)
    x.indices = torch.arange(640, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
    for indices in (x.indices, x.indices.flip(-1)):
        assert_right(prefill(replace(x, indices=indices)), replace(x, indices=indices))


def test_more_queries_than_a_grid_dimension() -> None:
    """70,000 queries: the same few over and over."""
    x = Case("rows", 70, 200, 8, 65, seed=53).build(DEVICE)
    want = prefill(x)
    q, indices = x.q.repeat(1000, 1, 1), x.indices.repeat(1000, 1, 1)
    got = prefill(replace(x, q=q, indices=indices))
    assert_same(got, (want[0].repeat(1000, 1, 1), *(t.repeat(1000, 1) for t in want[1:])))


def test_more_than_4_gib_of_keys() -> None:
    x = Case("over_4_gib", 5, 300, 128, 100, seed=54).build(DEVICE)
    want = prefill(x)
    kv = torch.full(((5 << 30) // 1152, 1, 576), float("nan"), dtype=x.kv.dtype, device=DEVICE)
    kv[-300:] = x.kv
    valid = (x.indices >= 0) & (x.indices < 300)
    indices = torch.where(valid, x.indices + (len(kv) - 300), torch.full_like(x.indices, -1))
    assert_same(prefill(replace(x, kv=kv, indices=indices)), want)


def test_strided_views() -> None:
    """kv with gaps between tokens, q with gaps and where 16 bytes can't be read at once."""
    x = named("plain").build(DEVICE)
    want = prefill(x)
    kv = torch.full((len(x.kv), 2, 640), float("nan"), dtype=x.kv.dtype, device=DEVICE)
    kv[:, 1:, 64:] = x.kv
    assert_same(prefill(replace(x, kv=kv[:, 1:, 64:])), want)
    wide = torch.full((*x.q.shape[:2], 600), float("nan"), dtype=x.q.dtype, device=DEVICE)
    for first in (0, 1):
        q = wide[..., first : first + 576].copy_(x.q)
        assert_same(prefill(replace(x, q=q)), want)
    indices = torch.full((*x.indices.shape[:2], 333), 2**31 - 1, device=DEVICE).int()
    view = indices[..., 3 : 3 + x.case.topk].copy_(x.indices)
    assert_same(prefill(replace(x, indices=view)), want)


def test_graph_replays_with_other_indices() -> None:
    x = named("many_lengths").build(DEVICE)
    indices = x.indices.clone()
    prefill(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = prefill(x)
    for shift in (0, 7, 100):
        x.indices.copy_(indices.roll(shift, 0))
        graph.replay()
        assert_same(got, prefill(x))


def test_no_queries_and_no_keys() -> None:
    x = named("plain").build(DEVICE)
    out, largest, lse = prefill(replace(x, q=x.q[:0], indices=x.indices[:0]))
    assert out.shape == (0, 16, 512) and largest.shape == lse.shape == (0, 16)
    for kv, indices in ((x.kv[:0], x.indices), (x.kv, x.indices[..., :0])):
        out, largest, lse = prefill(replace(x, kv=kv, indices=indices))
        assert not out.any() and (largest == -np.inf).all() and (lse == np.inf).all()
