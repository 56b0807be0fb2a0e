"""The torch tier's dense decode against the oracle, everything unused poisoned."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch
from cases import DECODE_CASES, DecodeCase, case_id

import flashmla
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.torch import mla, split_kv


def decode(inputs, parts, batch_invariant=False):
    case = inputs.case
    plan = split_kv.get_metadata(inputs.cache_seqlens, parts, batch_invariant)
    return mla.dense_decode(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan,
        case.scale, case.causal, inputs.attn_sink,
    )  # fmt: skip


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
def test_against_the_oracle(case, batch_invariant):
    inputs = case.build()
    out, lse = decode(inputs, 132, batch_invariant)
    want_out, want_lse = inputs.expected()
    assert out.dtype == case.dtype and out.is_contiguous() and lse.is_contiguous()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_any_number_of_parts(parts):
    inputs = DecodeCase("parts", (0, 700, 64, 3, 1500), 2, 8, causal=True, seed=77).build()
    out, lse = decode(inputs, parts)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_splits_longer_than_a_block_and_more_than_a_batch():
    """One split of 2500 keys, and so many keys that the gathering is done in several goes."""
    for lengths, parts in (((2500, 1030), 1), ((900,) * 24, 30)):
        inputs = DecodeCase("long", lengths, h_q=2, seed=78).build()
        out, lse = decode(inputs, parts)
        want_out, want_lse = inputs.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_float32():
    inputs = dataclasses.replace(DECODE_CASES[8], dtype=torch.float32).build()
    out, lse = decode(inputs, 132)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_repeats_agree_bit_for_bit():
    inputs = DECODE_CASES[0].build()
    first = decode(inputs, 132)
    for _ in range(3):
        for name, got, want in zip(("out", "lse"), decode(inputs, 132), first, strict=True):
            assert_identical(name, got, want)


def test_wrong_block_numbers_stay_inside_the_cache():
    """Unspecified results, but the memory beside the cache is not touched and nothing raises."""
    inputs = DECODE_CASES[0].build()
    inputs.block_table[:] = torch.tensor([2147480000, -5]).int()[torch.arange(8) % 2]
    out, _ = decode(inputs, 132)
    assert out.shape == inputs.q.shape[:3] + (512,)


def test_lengths_beyond_the_table_stay_inside_it():
    inputs = DecodeCase("short", (64, 64), h_q=2, seed=1).build()
    whole = inputs.block_table[:, :1]
    want = decode(inputs, 4)
    long = dataclasses.replace(inputs, block_table=whole, cache_seqlens=inputs.cache_seqlens + 900)
    for got, expected in zip(decode(long, 4), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_bits_do_not_depend_on_the_batch():
    lengths = (1025, 0, 3000, 64, 1024, 1)
    x = DecodeCase("alone", lengths, 2, 8, causal=True, strided=False, seed=78).build()

    def chosen(requests, parts):
        rows = torch.tensor(requests)
        lengths = x.cache_seqlens[rows]
        plan = split_kv.get_metadata(lengths, parts, batch_invariant=True)
        return mla.dense_decode(
            x.q[rows], x.k_cache, x.block_table[rows], lengths, 512, *plan, 0.04, True
        )

    alone = [chosen([request], 132) for request in range(len(lengths))]
    for order, parts in (([5, 4, 3, 2, 1, 0], 132), ([2, 2, 0, 3] * 3, 7), ([4, 2], 1)):
        out, lse = chosen(order, parts)
        for at, request in enumerate(order):
            assert_identical("out", out[at], alone[request][0][0])
            assert_identical("lse", lse[at], alone[request][1][0])


def test_a_cache_without_pages():
    inputs = DecodeCase("none", (0, 0), h_q=2, seed=1).build()
    out, lse = decode(dataclasses.replace(inputs, k_cache=inputs.k_cache[:0]), 4)
    assert not out.any() and (lse == float("inf")).all()


def test_a_stale_plan_reads_nothing_outside():
    inputs = DECODE_CASES[0].build()
    for other in ([5000] * 10, [0] * 10, [1] * 10):
        plan = split_kv.get_metadata(torch.tensor(other, dtype=torch.int32), 9)
        out, lse = mla.dense_decode(
            inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan,
            0.04, False,
        )  # fmt: skip
        assert not out.isnan().any() and not lse.isnan().any()


def of_plan(inputs, metadata, num_splits):
    return mla.dense_decode(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, metadata,
        num_splits, inputs.case.scale, False,
    )  # fmt: skip


def test_a_foreign_plan_gives_a_wrong_result_and_no_more():
    inputs = DecodeCase("foreign", (700, 65), 2, 4, seed=79).build()
    many, _ = split_kv.get_metadata(torch.full((40,), 300, dtype=torch.int32), 9)
    own, num_splits = split_kv.get_metadata(inputs.cache_seqlens, 9)
    out, lse = of_plan(inputs, many, num_splits)
    assert out.shape == (2, 2, 4, 512) and not out.isnan().any() and not lse.isnan().any()

    want = of_plan(inputs, own, num_splits)
    low, high = -(2**31), 2**31 - 1
    for garbage in ([-7, 0, 1], [low] * 3, [high] * 3, [5, 2, 0], [high, low, 3], [0, 0, 0]):
        out, lse = of_plan(inputs, own, torch.tensor(garbage, dtype=torch.int32))
        assert not out.isnan().any() and not lse.isnan().any()
    for column, value in itertools.product(range(5), (low, -7, -1, 3, 1000, high)):
        wrong = own.clone()
        wrong[::2, column] = value
        out, lse = of_plan(inputs, wrong, num_splits)
        assert not out.isnan().any() and not lse.isnan().any()
    torch.manual_seed(5)
    for _ in range(50):
        wrong = torch.randint(-3, 12, own.shape, dtype=torch.int32)
        out, lse = of_plan(inputs, wrong, torch.randint(-3, 20, (3,), dtype=torch.int32))
        assert not out.isnan().any() and not lse.isnan().any()
    for got, expected in zip(of_plan(inputs, own, num_splits), want, strict=True):
        assert torch.equal(got, expected)


def test_a_part_of_no_request_leaves_the_others_right():
    """Requests outside the batch are skipped, and what is inside is done."""
    inputs = DecodeCase("outside", (300, 65), 2, 4, seed=80).build()
    metadata = torch.tensor([[-7, 3, 0, 5, 0, 0, 0, 0], [1, 0, 9, 4, 0, 0, 0, 0]]).int()
    out, lse = of_plan(inputs, metadata, torch.tensor([0, 1, 2]).int())
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_fast_enough_for_a_notebook():
    inputs = DecodeCase("speed", (1024,) * 4, h_q=16).build()
    plan, _ = flashmla.get_mla_metadata()
    begin = time.process_time()
    for _ in range(3):
        flashmla.flash_mla_with_kvcache(
            inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, plan
        )
    assert (time.process_time() - begin) / 3 < 1.0
