"""What dense decode promises beyond one right answer: graphs, size, batches, bits."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from cases import KV_STD, Q_STD, WILD, DecodeCase, DecodeInputs, to_numpy
from decoding import (
    DEVICE,
    assert_at_once_as_alone,
    decode,
    plan_for,
    poison_free_memory,
    tier_of,
)

import flashmla
from flashmla import backend, schedule
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.reference import paged_kv

pytestmark = pytest.mark.gpu
BOTH_KINDS = pytest.mark.parametrize("batch_invariant", [False, True], ids=["plain", "invariant"])


def select(inputs: DecodeInputs, requests: list[int]) -> DecodeInputs:
    """The same requests in another order, some of them left out or given again."""
    rows = torch.tensor(requests, device=DEVICE)
    return DecodeInputs(
        inputs.case, inputs.q[rows], inputs.k_cache, inputs.block_table[rows].contiguous(),
        inputs.cache_seqlens[rows], inputs.attn_sink,
    )  # fmt: skip


# ---- CUDA graphs -------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("h_q", [16, 128])
def test_a_graph_replays_with_other_lengths_tables_and_padding(h_q, batch_invariant) -> None:
    """Captured once; then other requests in the same buffers, some of them of length 0."""
    lengths = (700, 64, 1, 5000, 1900, 130, 2048, 3000)
    case = DecodeCase("graph", lengths, s_q=2, h_q=h_q, causal=True, strided=False, seed=5)
    pool = case.build(DEVICE)
    held = select(pool, [0, 1, 2, 3, 4, 5])
    plan = plan_for(held, batch_invariant)
    decode(held, plan, batch_invariant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_for(held, batch_invariant, out=plan)
        out, lse = decode(held, plan, batch_invariant)
    pointers = [tensor.data_ptr() for tensor in plan]

    for requests, used in (
        ([0, 1, 2, 3, 4, 5], 6),
        ([7, 3, 3, 6, 1, 0], 4),
        ([6, 2, 7, 0, 5, 4], 1),
    ):
        now = select(pool, requests)
        held.q.copy_(now.q)
        held.block_table.copy_(now.block_table)
        held.cache_seqlens.copy_(now.cache_seqlens)
        held.cache_seqlens[used:] = 0  # rows that only pad the batch: nothing of theirs is read
        held.block_table[used:] = WILD
        held.q[used:] = float("nan")
        out.fill_(float("nan"))
        graph.replay()
        want_out, want_lse = DecodeInputs(
            case, now.q[:used], pool.k_cache, now.block_table[:used], now.cache_seqlens[:used]
        ).expected()
        assert_out_close(out[:used], want_out)
        assert_lse_close(lse[:used], want_lse)
        assert (out[used:] == 0).all() and torch.isposinf(lse[used:]).all()
        made = schedule.plan(to_numpy(held.cache_seqlens), plan[0].shape[0], batch_invariant)
        for name, tensor, array in zip(("metadata", "num_splits"), plan, made, strict=True):
            assert_identical(name, tensor, array)
    assert [tensor.data_ptr() for tensor in plan] == pointers


def test_two_graphs_and_eager_calls_at_the_same_time() -> None:
    """Each on its stream; their memory for partial results must not be shared."""
    problems = [
        DecodeCase(f"stream_{i}", (4000, 100 * i, 9000), h_q=64 * (i + 1), seed=60 + i).build(
            DEVICE
        )
        for i in range(3)
    ]
    assert_at_once_as_alone(
        *(functools.partial(decode, inputs, plan_for(inputs)) for inputs in problems)
    )


# ---- size --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_cache():
    """60,000 pages of NaN: 4.4 GB, and more than 2^31 elements."""
    free, _ = torch.cuda.mem_get_info()
    assert free > 12 << 30, "this test needs 12 GB of the card's memory"
    cache = torch.full((60_000, 64, 1, 576), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert cache.numel() > 2**31 and cache.numel() * 2 > 4 << 30
    yield cache
    del cache
    torch.cuda.empty_cache()


@BOTH_KINDS
@pytest.mark.parametrize("h_q", [16, 128])
def test_a_cache_of_more_than_4_gib(large_cache, h_q, batch_invariant) -> None:
    """Pages at both ends and on either side of 2^31 elements and of 4 GiB."""
    edge = 2**31 // (64 * 576)
    pages = torch.tensor([59_999, edge, 0, edge + 1, edge - 1, 58_300, 1, 30_000]).int()
    lengths = (8 * 64 - 7, 64 * 3, 1)
    check_in(large_cache, pages, lengths, h_q, batch_invariant)


def test_a_stride_between_pages_of_a_gigabyte(large_cache) -> None:
    """A cache whose pages lie 2^29 elements apart: the fifth begins at element 2^31."""
    cache = large_cache.view(-1).as_strided((5, 64, 1, 576), (2**29, 576, 576, 1))
    pages = torch.tensor([4, 1, 0, 3, 2]).int()
    check_in(cache, pages, (300, 64), 64, False)


def check_in(cache, pages, lengths, h_q, batch_invariant) -> None:
    """Requests that share the pages, written into a cache of NaN and taken out again."""
    g = torch.Generator().manual_seed(7)
    number = len(pages)
    keys = (torch.randn(number, 64, 1, 576, generator=g) * KV_STD).bfloat16()
    keys.view(number * 64, 576)[max(lengths) :] = float("nan")
    q = (torch.randn(len(lengths), 1, h_q, 576, generator=g) * Q_STD).bfloat16()
    where = pages.long().to(DEVICE)
    cache[where] = keys.to(DEVICE)
    inputs = DecodeInputs(
        DecodeCase("large", lengths, h_q=h_q), q.to(DEVICE), cache,
        pages.repeat(len(lengths), 1).to(DEVICE), torch.tensor(lengths).int().to(DEVICE),
    )  # fmt: skip
    out, lse = decode(inputs, batch_invariant=batch_invariant)
    small = torch.arange(number).int().repeat(len(lengths), 1)
    want_out, want_lse = paged_kv.paged_decode(
        to_numpy(q), to_numpy(keys), to_numpy(small), np.array(lengths), 512
    )
    cache[where] = float("nan")
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize(("b", "s_q"), [(70_000, 1), (1000, 70)])
def test_more_query_tokens_than_a_grid_dimension_holds(b: int, s_q: int) -> None:
    """b * s_q = 70,000, above 65,535: every request is one of 40."""
    distinct = tuple((7 * i) % 140 for i in range(40))
    few = DecodeCase("few", distinct, s_q=s_q, h_q=4, causal=True, strided=False, seed=9)
    inputs = few.build(DEVICE)
    which = np.arange(b) * 17 % len(distinct)
    many = select(inputs, which.tolist())
    poison_free_memory()
    out, lse = decode(many)
    want_out, want_lse = inputs.expected()
    first = [int(np.argmax(which == i)) for i in range(len(distinct))]
    assert_out_close(out[first], want_out)
    assert_lse_close(lse[first], want_lse)
    same = torch.tensor(first, device=DEVICE)[torch.tensor(which, device=DEVICE)]
    assert_identical("out", out, out[same])
    assert_identical("lse", lse, lse[same])


# ---- bits that do not depend on the batch --------------------------------------------------------

ALONE = (1025, 0, 20_000, 64, 1024, 3000, 1, 1023, 7777, 2049)


@pytest.mark.parametrize(
    ("h_q", "h_kv", "s_q", "dtype"),
    [(128, 1, 1, torch.bfloat16), (128, 1, 2, torch.float16), (16, 1, 1, torch.bfloat16),
     (24, 1, 3, torch.bfloat16), (16, 2, 2, torch.bfloat16)],
)  # fmt: skip
def test_bits_do_not_depend_on_the_batch(h_q, h_kv, s_q, dtype) -> None:
    """Each request alone, then among others, in another order, twice over, and in a large batch."""
    case = DecodeCase("alone", ALONE, s_q, h_q, h_kv, causal=s_q > 1, dtype=dtype, seed=70)
    inputs = case.build(DEVICE)
    alone = [decode(select(inputs, [i]), batch_invariant=True) for i in range(case.b)]
    want_out, want_lse = inputs.expected()
    assert_out_close(torch.cat([out for out, _ in alone]), want_out)
    assert_lse_close(torch.cat([lse for _, lse in alone]), want_lse)
    orders = [
        list(range(case.b)), list(range(case.b))[::-1], [2, 0], [5, 5, 5, 2, 8, 8],
        [6, 3] * 200 + [9, 2, 4] + [7] * 130,
    ]  # fmt: skip
    for order in orders:
        poison_free_memory()
        out, lse = decode(select(inputs, order), batch_invariant=True)
        for at, request in enumerate(order):
            assert_identical(f"out of request {request}", out[at], alone[request][0][0])
            assert_identical(f"lse of request {request}", lse[at], alone[request][1][0])


def test_bits_do_not_depend_on_the_number_of_parts() -> None:
    """What another card's plan would look like, with more multiprocessors or fewer."""
    case = DecodeCase("parts", ALONE, h_q=128, seed=71)
    inputs = case.build(DEVICE)
    make = backend.implementation("split_kv.get_metadata", DEVICE)
    results = [
        decode(inputs, make(inputs.cache_seqlens, parts, True), True) for parts in (66, 1, 7, 132)
    ]
    for (out, lse), (want_out, want_lse) in itertools.pairwise(results):
        assert_identical("out", out, want_out)
        assert_identical("lse", lse, want_lse)


def test_bits_do_not_depend_on_the_width_of_the_block_table() -> None:
    inputs = DecodeCase("narrow", (3000, 1025), h_q=16, strided=False, seed=72).build(DEVICE)
    want_out, want_lse = decode(inputs, batch_invariant=True)
    wide = torch.full((2, 700), WILD, dtype=torch.int32, device=DEVICE)
    wide[:, : inputs.block_table.shape[1]] = inputs.block_table
    inputs.block_table = wide
    out, lse = decode(inputs, batch_invariant=True)
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


def test_an_object_makes_a_batch_invariant_plan() -> None:
    inputs = DecodeCase("object", (3000, 5), h_q=16, seed=73).build(DEVICE)
    plan, none = flashmla.get_mla_metadata(batch_invariant=True)
    want_out, want_lse = decode(inputs, batch_invariant=True)
    for _ in range(3):
        with backend.use_backend(tier_of(inputs.case)):
            out, lse = flashmla.flash_mla_with_kvcache(
                inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, plan, none
            )
        assert_identical("out", out, want_out)
        assert_identical("lse", lse, want_lse)
    assert plan.tile_scheduler_metadata.shape[1] == 16
