"""Sparse prefill, the indexer and top-k as public operations."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from cases import SPARSE_DECODE_CASES, SPARSE_PREFILL_CASES, to_numpy

import flashmla
from flashmla.lab.check import assert_lse_close, assert_out_close
from flashmla.reference import dsa as reference


@pytest.fixture(autouse=True)
def _no_value_checks(monkeypatch):
    monkeypatch.delenv("FLASHMLA_CHECK", raising=False)


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES[:3], ids=lambda c: c.name)
def test_sparse_prefill(case):
    x = case.build()
    out, max_logits, lse = flashmla.flash_mla_sparse_fwd(
        x.q, x.kv, x.indices, x.scale, attn_sink=x.attn_sink, topk_length=x.topk_length
    )
    want_out, want_max, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(max_logits, want_max)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES[5:7], ids=lambda c: c.name)
def test_sparse_decode(case):
    x = case.build()
    plan, _ = flashmla.get_mla_metadata()
    for _ in range(2):
        out, lse = flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, None, None, 512, plan, None, None, False, True, x.indices,
            x.attn_sink, None, None, x.topk_length,
        )  # fmt: skip
        want_out, want_lse = x.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_index_score_choose_attend():
    """The stages together: the indexer's scores, the top-k in cache coordinates, attention."""
    torch.manual_seed(3)
    lengths = torch.tensor([200, 70], dtype=torch.int32)
    index_cache = torch.zeros(8, 64, 1, 132, dtype=torch.uint8)
    codes = torch.randn(8, 64 * 128).to(torch.float8_e4m3fn).view(torch.uint8)
    index_cache.view(8, -1)[:, :8192] = codes
    index_cache.view(8, -1)[:, 8192:] = torch.rand(8, 64).view(torch.uint8)
    table = torch.randperm(8).view(2, 4).int()
    q = torch.randn(2, 1, 4, 128).to(torch.float8_e4m3fn)
    weights = torch.rand(2, 4)
    logits = flashmla.indexer_logits_paged(q, index_cache, weights, table, lengths)
    indices = flashmla.topk(logits[:, 0], 100, lengths, table)
    arrays = [to_numpy(x) for x in (q, index_cache, weights[:, None], table, lengths)]
    want = reference.topk(
        reference.indexer_logits_paged(*arrays)[:, 0], 100, arrays[4], to_numpy(table)
    )
    np.testing.assert_array_equal(indices.numpy(), want)

    kv = (torch.randn(8, 64, 1, 576) * 0.1).bfloat16()
    query = (torch.randn(2, 1, 16, 576) * 10).bfloat16()
    out, lse = flashmla.flash_mla_with_kvcache(
        query, kv, None, None, 512, None, indices=indices[:, None]
    )
    want_out, want_lse = reference.sparse_decode(
        to_numpy(query), to_numpy(kv), want[:, None], 512, 576**-0.5
    )
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_arguments_stand_in_flashmlas_order():
    names = "q kv indices sm_scale d_v attn_sink topk_length lse_base_2"
    assert " ".join(inspect.signature(flashmla.flash_mla_sparse_fwd).parameters) == names


def test_an_lse_to_base_2():
    x = SPARSE_PREFILL_CASES[2].build()  # with queries that have nothing to attend to
    arguments = (x.q, x.kv, x.indices, x.scale, 512, x.attn_sink, x.topk_length)
    out, largest, lse = flashmla.flash_mla_sparse_fwd(*arguments)
    same_out, same_largest, lse_2 = flashmla.flash_mla_sparse_fwd(*arguments, lse_base_2=True)
    assert torch.equal(same_out, out) and torch.equal(same_largest, largest)
    assert_lse_close(lse_2, x.expected(lse_base_2=True)[2])
    assert torch.equal(lse_2.isinf(), lse.isinf()) and lse.isinf().any()


def prefill(**changes):
    x = SPARSE_PREFILL_CASES[0].build()
    given = dict(q=x.q, kv=x.kv, indices=x.indices, sm_scale=x.scale)
    changed = {k: v(x) if callable(v) else v for k, v in changes.items()}
    return flashmla.flash_mla_sparse_fwd(**(given | changed))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": lambda x: x.q[None]},
            ValueError,
            r"q must have 3 dimensions \[s_q, h_q, d_qk], got",
        ),
        ({"q": lambda x: x.q[..., :500]}, ValueError, "q must have head size 576 or 512, got 500"),
        ({"kv": lambda x: x.kv[..., :512]}, ValueError, r"kv must have shape .* = \[any, 1, 576]"),
        ({"kv": lambda x: x.kv.half()}, TypeError, "kv must be of dtype bfloat16, got float16"),
        ({"indices": lambda x: x.indices[:3]}, ValueError, r"\[s_q, 1, topk] = \[10, 1, any], got"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale must be finite, got nan"),
        ({"d_v": 256}, ValueError, "d_v must be 512, the only one supported, got 256"),
        ({"attn_sink": torch.zeros(1)}, ValueError, r"attn_sink must have shape \[h_q] = \[16]"),
        ({"topk_length": torch.zeros(2).int()}, ValueError, r"topk_length must have shape \[s_q]"),
        ({"lse_base_2": 2}, TypeError, "lse_base_2 must be True or False, got int 2"),
    ],
)
def test_bad_prefill_input(changes, error, message):
    with pytest.raises(error, match=message):
        prefill(**changes)


CODES = torch.zeros(3, 4, 128).to(torch.float8_e4m3fn)
KEYS = torch.zeros(5, 128).to(torch.float8_e4m3fn)
BOUNDS = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, CODES.float(), TypeError, "q must be of dtype float8_e4m3fn, got float32"),
        (0, CODES[..., :64], ValueError, r"q must have shape \[s_q, h, 128], got \[3, 4, 64]"),
        (1, KEYS[:, :64], ValueError, r"k must have shape \[s_kv, 128] = \[any, 128], got"),
        (2, torch.ones(4), ValueError, r"k_scale must have shape \[s_kv] = \[5], got \[4]"),
        (3, torch.ones(3, 5), ValueError, r"weights must have shape \[s_q, h] = \[3, 4], got"),
        (4, BOUNDS.long(), TypeError, "start must be of dtype int32, got int64"),
        (5, BOUNDS[:1], ValueError, r"end must have shape \[s_q] = \[3], got \[1]"),
    ],
)
def test_bad_indexer_input(place, value, error, message):
    given = [CODES, KEYS, torch.ones(5), torch.ones(3, 4), BOUNDS, BOUNDS]
    flashmla.indexer_logits(*given)
    given[place] = value
    with pytest.raises(error, match=message):
        flashmla.indexer_logits(*given)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, CODES, ValueError, r"q must have 4 dimensions \[b, s_q, h, 128], got 3"),
        (1, torch.zeros(6, 32, 1, 132).byte(), ValueError, r"\[any, 64, 1, 132], got \[6, 32, 1"),
        (2, torch.ones(2, 4), ValueError, r"weights must have 3 dimensions \[b, s_q, h], got 2"),
        (3, torch.zeros(1, 2).int(), ValueError, r"block_table must have shape .* = \[3, any]"),
        (4, torch.zeros(3), TypeError, "lengths must be of dtype int32, got float32"),
    ],
)
def test_bad_paged_indexer_input(place, value, error, message):
    cache, table = torch.zeros(6, 64, 1, 132).byte(), torch.zeros(3, 2).int()
    given = [CODES[:, None], cache, torch.ones(3, 1, 4), table, BOUNDS]
    assert flashmla.indexer_logits_paged(*given).shape == (3, 1, 128)
    given[place] = value
    with pytest.raises(error, match=message):
        flashmla.indexer_logits_paged(*given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), 2), ValueError, r"logits must have 2 dimensions \[rows, n], got 1"),
        ((torch.zeros(3, 9).half(), 2), TypeError, "logits must be of dtype float32, got float16"),
        ((torch.zeros(3, 9), -1), ValueError, "k must be at least 0, got -1"),
        ((torch.zeros(3, 9), 2, BOUNDS[:2]), ValueError, r"lengths must have shape \[rows] = \[3]"),
        ((torch.zeros(3, 9), 2, None, torch.zeros(3, 2).int(), 4), ValueError,
         "block_table has 2 blocks of 4 tokens a row, too few for the 9 positions of logits"),
    ],
)  # fmt: skip
def test_bad_topk_input(arguments, error, message):
    with pytest.raises(error, match=message):
        flashmla.topk(*arguments)


def test_values_are_checked_when_asked_for(monkeypatch):
    lengths = torch.tensor([3, 10, 9], dtype=torch.int32)
    flashmla.topk(torch.zeros(3, 9), 2, lengths)
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    with pytest.raises(ValueError, match=r"lengths\[1] is 10, but a length must be from 0 to 9"):
        flashmla.topk(torch.zeros(3, 9), 2, lengths)
    with pytest.raises(
        ValueError, match=r"end\[2] is 6, but a token's position must be from 0 to 5"
    ):
        end = torch.tensor([0, 0, 6], dtype=torch.int32)
        flashmla.indexer_logits(CODES, KEYS, torch.ones(5), torch.ones(3, 4), BOUNDS, end)
    backwards = torch.tensor([3, 4, 0]).int(), torch.tensor([3, 2, 5]).int()
    with pytest.raises(
        ValueError,
        match=r"end\[1] is 2, but must be at least start\[1], which is 4 \(1 such",
    ):
        flashmla.indexer_logits(CODES, KEYS, torch.ones(5), torch.ones(3, 4), *backwards)
    monkeypatch.setenv("FLASHMLA_CHECK", "0")
    logits = flashmla.indexer_logits(CODES, KEYS, torch.ones(5), torch.ones(3, 4), *backwards)
    assert logits.isneginf().sum(1).tolist() == [5, 5, 0]  # empty, backwards, whole
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    table = torch.tensor([[5, 1], [7, -1], [-3, 2]], dtype=torch.int32)
    flashmla.topk(torch.zeros(3, 8), 2, torch.tensor([8, 4, 0]).int(), table, 4)
    for lengths, place in (([8, 5, 0], "1, 1"), ([8, 4, 1], "2, 0")):
        with pytest.raises(ValueError, match=rf"block_table\[{place}] is -\d, but a block number"):
            flashmla.topk(torch.zeros(3, 8), 2, torch.tensor(lengths).int(), table, 4)
    with pytest.raises(ValueError, match=r"block_table\[1, 1] is -1, but a block number within"):
        flashmla.topk(torch.zeros(3, 8), 2, None, table, 4)
    with pytest.raises(ValueError, match=r"topk_length\[3] is 101"):
        prefill(topk_length=torch.full((10,), 7).index_fill(0, torch.tensor(3), 101).int())
    with pytest.raises(ValueError, match=r"indices\[2, 0, 1] is 9077, but a row of kv, or -1 "):
        wild = torch.zeros(10, 1, 100).int()
        wild[2, 0, 1], wild[0, 0, 50:] = 9077, 99999
        prefill(indices=wild, topk_length=torch.full((10,), 50).int())


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan"), float("inf")])
def test_the_indexers_scales_are_checked_when_asked_for(scale, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    cache = torch.zeros(4, 64, 1, 132, dtype=torch.uint8)
    table = torch.tensor([[3, 1], [0, 9]], dtype=torch.int32)
    lengths = torch.tensor([70, 20], dtype=torch.int32)
    flashmla.fp8.index_append(cache, torch.arange(256), torch.randn(256, 128))
    scales = cache.view(4, -1)[:, 64 * 128 :].view(torch.float32)
    scales[1, 6:], scales[0, 20:], scales[2] = scale, scale, scale
    arguments = torch.zeros(2, 1, 4, 128).to(torch.float8_e4m3fn), cache, torch.ones(2, 1, 4), table
    flashmla.indexer_logits_paged(*arguments, lengths)
    with pytest.raises(
        ValueError,
        match=rf"cache has the scale {scale} for token 6 of block 1, but a scale must be positive "
        r"and finite \(1 such scales\)",
    ):
        flashmla.indexer_logits_paged(*arguments, lengths + 1 - torch.tensor([0, 1]).int())


@pytest.mark.parametrize(("blocks", "topk"), [(2, 0), (0, 3), (0, 0)])
def test_no_index_or_no_cache_is_nothing_to_attend_to(blocks, topk):
    q = torch.randn(2, 3, 4, 576)
    indices = torch.zeros(2, 3, topk, dtype=torch.int32)
    caches = {False: torch.randn(blocks, 4, 1, 576), True: torch.zeros(blocks, 4, 1, 656).byte()}
    for is_fp8, cache in caches.items():
        out, lse = flashmla.flash_mla_with_kvcache(
            q, cache, None, None, 512, None, is_fp8_kvcache=is_fp8, indices=indices
        )
        assert (out == 0).all() and (lse == float("inf")).all() and lse.shape == (2, 4, 3)
    out, largest, lse = flashmla.flash_mla_sparse_fwd(
        q[0], torch.randn(blocks, 1, 576), indices[0].unsqueeze(1), 0.1
    )
    assert (out == 0).all() and (lse == float("inf")).all() and (largest == -float("inf")).all()
