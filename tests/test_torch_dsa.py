"""The torch tier's sparse attention, indexer and top-k against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import SPARSE_DECODE_CASES, SPARSE_PREFILL_CASES, WILD, case_id, to_numpy

from flashmla.lab.check import assert_lse_close, assert_out_close, compare
from flashmla.reference import dsa as reference
from flashmla.torch import dsa

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES, ids=case_id)
def test_sparse_decode(case):
    x = case.build()
    out, lse = dsa.sparse_decode(
        x.q, x.k_cache, x.indices, 512, x.scale, case.fp8, x.attn_sink, x.topk_length
    )
    want_out, want_lse = x.expected()
    assert out.dtype == case.dtype
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_sparse_decode_takes_any_byte_dtype(dtype):
    x = SPARSE_DECODE_CASES[0].build()
    arguments = (x.indices, 512, x.scale, True, None, None)
    want = dsa.sparse_decode(x.q, x.k_cache, *arguments)
    got = dsa.sparse_decode(x.q, x.k_cache.view(dtype), *arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES, ids=case_id)
def test_sparse_prefill(case):
    x = case.build()
    out, max_logits, lse = dsa.sparse_prefill(
        x.q, x.kv, x.indices, x.scale, 512, x.attn_sink, x.topk_length
    )
    want_out, want_max, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(max_logits, want_max, name="max_logits")
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("sink", [INF, -INF])
@pytest.mark.parametrize("case", [SPARSE_PREFILL_CASES[0], SPARSE_PREFILL_CASES[2]], ids=case_id)
def test_a_sink_without_bounds(case, sink):
    x = case.build()
    sinks = torch.full((16,), sink)
    arguments = (x.q, x.kv, x.indices, x.scale, 512)
    plain, _, want_lse = dsa.sparse_prefill(*arguments, None, x.topk_length)
    out, _, lse = dsa.sparse_prefill(*arguments, sinks, x.topk_length)
    assert torch.equal(out, plain if sink == -INF else torch.zeros_like(plain))
    assert torch.equal(lse, want_lse)


def test_nothing_to_choose_from():
    x = SPARSE_PREFILL_CASES[0].build()
    for kv, indices in ((x.kv[:0], x.indices), (x.kv, x.indices[..., :0])):
        out, largest, lse = dsa.sparse_prefill(x.q, kv, indices, 1.0, 512, None, None)
        assert not out.any() and (largest == -INF).all() and (lse == INF).all()


def e4m3(*shape):
    return (torch.randn(shape) * 2).to(torch.float8_e4m3fn)


def assert_logits_close(logits, want):
    compare("logits", logits, want, abs_tol=2e-3, rel_tol=1e-5)


def test_indexer_logits():
    s_q, s_kv, h = 9, 200, 4
    q, k = e4m3(s_q, h, 128), e4m3(s_kv, 128)
    k_scale, weights = torch.rand(s_kv) + 0.5, torch.randn(s_q, h)
    start = torch.tensor([0, 0, 5, 199, 200, 7, 50, 0, 120], dtype=torch.int32)
    end = torch.tensor([200, 0, 6, 200, 200, 3, 150, 1, 190], dtype=torch.int32)
    k.view(torch.uint8)[195:] = 255  # NaN: queries that see it have it, the others don't
    got = dsa.indexer_logits(q, k, k_scale, weights, start, end)
    arrays = [to_numpy(x) for x in (q, k, k_scale, weights, start, end)]
    want = reference.indexer_logits(*arrays)
    assert got.isnan().any(1).tolist() == [True, *[False] * 2, True, *[False] * 5]
    assert_logits_close(got, want)


def test_indexer_logits_paged():
    b, s_q, h, blocks = 5, 2, 3, 9
    lengths = torch.tensor([0, 1, 64, 65, 130], dtype=torch.int32)
    q, weights = e4m3(b, s_q, h, 128), torch.randn(b, s_q, h)
    cache = torch.full((blocks, 2, 64, 1, 132), 255, dtype=torch.uint8)[:, 1]
    table = torch.full((b, 4), WILD, dtype=torch.int32)
    free = torch.randperm(blocks).int()
    taken = 0
    for i, length in enumerate(lengths.tolist()):
        for j in range(-(-length // 64)):
            used, block = min(64, length - 64 * j), int(free[taken])
            table[i, j], taken = block, taken + 1
            page = cache[block].view(-1)
            page[: used * 128] = e4m3(used, 128).view(torch.uint8).flatten()
            page[8192 : 8192 + used * 4] = torch.rand(used).view(torch.uint8)
    got = dsa.indexer_logits_paged(q, cache, weights, table, lengths)
    arrays = [to_numpy(x) for x in (q, cache, weights, table, lengths)]
    assert got.shape == (b, s_q, 256)
    assert_logits_close(got, reference.indexer_logits_paged(*arrays))


def tied_logits(rows, n):
    """Few different values, so that ties decide, and everything that must not be chosen."""
    logits = torch.randint(-3, 4, (rows, n)).float()
    logits[torch.rand(rows, n) < 0.1] = NAN
    logits[torch.rand(rows, n) < 0.1] = -INF
    logits[torch.rand(rows, n) < 0.02] = INF
    logits[torch.rand(rows, n) < 0.05] = -0.0
    return logits


@pytest.mark.parametrize("k", [0, 1, 7, 64, 100, 199, 200, 300])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_table", [False, True])
def test_topk(k, with_lengths, with_table):
    logits = tied_logits(12, 200)
    logits[0], logits[1], logits[2] = NAN, -INF, 1.0
    lengths = torch.randint(0, 201, (12,)).int() if with_lengths else None
    table = torch.randperm(12 * 13).view(12, 13).int() if with_table else None
    got = dsa.topk(logits, k, lengths, table, 16)
    want = reference.topk(to_numpy(logits), k, to_numpy(lengths), to_numpy(table), 16)
    assert got.dtype == torch.int32 and got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), want)


def test_topk_never_uses_the_table_behind_the_length():
    table = torch.full((1, 3), WILD, dtype=torch.int32)
    table[0, 0] = 5
    got = dsa.topk(torch.ones(1, 192), 100, torch.tensor([64], dtype=torch.int32), table, 64)
    assert got[0, :64].tolist() == list(range(320, 384)) and (got[0, 64:] == -1).all()
