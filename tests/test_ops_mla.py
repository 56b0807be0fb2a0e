"""flash_mla_with_kvcache and get_mla_metadata: both forms of the plan, and bad input."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import DECODE_CASES, DENSE_FP8_CASES, SPARSE_DECODE_CASES, DecodeCase

import flashmla
from flashmla import backend, fp8, schedule
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.ops import split_kv

NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_value_checks(monkeypatch):
    monkeypatch.delenv("FLASHMLA_CHECK", raising=False)


def arguments(**changes):
    """A small valid dense call, with changes."""
    inputs = DecodeCase("small", (65, 3), 2, 4, seed=3).build()
    plan = flashmla.get_mla_metadata(inputs.cache_seqlens, 8, 1)
    given = dict(
        q=inputs.q, k_cache=inputs.k_cache, block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens, head_dim_v=512, tile_scheduler_metadata=plan[0],
        num_splits=plan[1],
    )  # fmt: skip
    return given | {
        k: v(SimpleNamespace(**given)) if callable(v) else v for k, v in changes.items()
    }


def sparse_arguments(**changes):
    inputs = SPARSE_DECODE_CASES[0].build()
    given = dict(
        q=inputs.q, k_cache=inputs.k_cache, block_table=None, cache_seqlens=None, head_dim_v=512,
        tile_scheduler_metadata=None, is_fp8_kvcache=True, indices=inputs.indices,
    )  # fmt: skip
    return given | {
        k: v(SimpleNamespace(**given)) if callable(v) else v for k, v in changes.items()
    }


def call(given):
    return flashmla.flash_mla_with_kvcache(**given)


def test_arguments_stand_in_flashmlas_order():
    want = (
        "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits "
        "softmax_scale causal is_fp8_kvcache indices attn_sink extra_k_cache "
        "extra_indices_in_kvcache topk_length extra_topk_length"
    )
    assert " ".join(inspect.signature(flashmla.flash_mla_with_kvcache).parameters) == want
    want = (
        "cache_seqlens num_q_tokens_per_head_k num_heads_k num_heads_q is_fp8_kvcache topk "
        "batch_invariant out"
    )
    assert " ".join(inspect.signature(flashmla.get_mla_metadata).parameters) == want


@pytest.mark.parametrize("case", DECODE_CASES[8:12], ids=lambda c: c.name)
def test_both_forms_give_the_same(case):
    x = case.build()
    old = flashmla.get_mla_metadata(x.cache_seqlens, case.s_q * case.h_q // case.h_kv, case.h_kv)
    new = flashmla.get_mla_metadata()
    assert new[1] is None and new[0].tile_scheduler_metadata is None
    results = [
        flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, x.block_table, x.cache_seqlens, 512, *plan, causal=case.causal
        )
        for plan in (old, new, new)
    ]
    want_out, want_lse = x.expected()
    assert_out_close(results[0][0], want_out)
    assert_lse_close(results[0][1], want_lse)
    for out, lse in results[1:]:
        assert_identical("out", out, results[0][0])
        assert_identical("lse", lse, results[0][1])
    assert torch.equal(new[0].tile_scheduler_metadata, old[0])
    assert torch.equal(new[0].num_splits, old[1])


def test_the_scale_is_that_of_576_unless_given():
    given = arguments()
    for name, got, want in zip(
        ("out", "lse"), call(given), call(given | {"softmax_scale": 576**-0.5}), strict=True
    ):
        assert_identical(name, got, want)
    assert not torch.equal(call(given)[1], call(given | {"softmax_scale": 0.1})[1])


def test_metadata_is_the_plan():
    seqlens = torch.tensor([1000, 0, 64], dtype=torch.int32)
    metadata, num_splits = flashmla.get_mla_metadata(seqlens, 128, 1)
    want = schedule.plan([1000, 0, 64], 66)
    np.testing.assert_array_equal(metadata.numpy(), want[0])
    np.testing.assert_array_equal(num_splits.numpy(), want[1])
    sparse = flashmla.get_mla_metadata(seqlens, 128, 1, 128, True, 2048)
    np.testing.assert_array_equal(sparse[0].numpy(), schedule.plan([2048] * 3, 66)[0])


def test_out_is_rewritten_in_place():
    seqlens = torch.tensor([1000, 0, 64], dtype=torch.int32)
    plan = flashmla.get_mla_metadata(seqlens, 128, 1)
    pointers = [x.data_ptr() for x in plan]
    seqlens.copy_(torch.tensor([5, 9000, 1]))
    again = flashmla.get_mla_metadata(seqlens, 128, 1, out=plan)
    assert [x.data_ptr() for x in again] == pointers
    for got, want in zip(plan, schedule.plan([5, 9000, 1], 66), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


def test_no_gradients():
    """Whoever decodes with weights that want gradients gets plain results, and no error."""
    given = arguments(q=lambda x: x.q.float().requires_grad_(), k_cache=lambda x: x.k_cache.float())
    out, lse = call(given)
    assert not out.requires_grad and not lse.requires_grad
    indices = torch.arange(20).view(2, 2, 5).int()
    out, _ = call(given | {"indices": indices, "k_cache": given["k_cache"].nan_to_num()})
    assert not out.requires_grad


def test_empty_batch():
    given = arguments(
        q=lambda x: x.q[:0], block_table=lambda x: x.block_table[:0],
        cache_seqlens=lambda x: x.cache_seqlens[:0], num_splits=lambda x: x.num_splits[:1],
    )  # fmt: skip
    out, lse = call(given)
    assert out.shape == (0, 2, 4, 512) and lse.shape == (0, 4, 2) and lse.dtype == torch.float32
    metadata, num_splits = flashmla.get_mla_metadata(torch.empty(0, dtype=torch.int32), 8, 1)
    assert metadata.shape == (132, 8) and not metadata.any() and num_splits.tolist() == [0]


BAD_DENSE = [
    ({"q": [1]}, TypeError, r"q must be a torch.Tensor \[b, s_q, h_q, 576], got list"),
    ({"q": lambda x: x.q[0]}, ValueError, r"q must have 4 dimensions \[b, s_q, h_q, 576], got 3"),
    ({"q": lambda x: x.q.double()}, TypeError,
     "q must be of dtype bfloat16 or float16 or float32, got float64"),
    ({"q": lambda x: x.q[..., :448]}, ValueError,
     "q must have head size 576 or 512, got 448"),
    ({"q": lambda x: x.q.contiguous().mT.contiguous().mT}, ValueError,
     "q must be contiguous in its last dimension .* call .contiguous"),
    ({"q": lambda x: x.q[:, :0]}, ValueError, "q must have at least one token and one head"),
    ({"head_dim_v": 256}, ValueError, "head_dim_v must be 512, the only one supported, got 256"),
    ({"head_dim_v": "512"}, TypeError, "head_dim_v must be an int, got str"),
    ({"k_cache": None}, TypeError,
     r"k_cache must be a torch.Tensor \[blocks, page, h_kv, 576], got NoneType"),
    ({"k_cache": lambda x: x.k_cache.half()}, TypeError,
     "k_cache must be of dtype bfloat16, got float16"),
    ({"k_cache": lambda x: x.k_cache[..., :512]}, ValueError,
     r"k_cache must have shape \[blocks, page, h_kv, 576] = \[any, any, any, 576], got"),
    ({"k_cache": lambda x: x.k_cache.expand(-1, -1, 3, -1).contiguous()}, ValueError,
     "q has 4 heads, which k_cache's 3 heads do not divide"),
    ({"k_cache": lambda x: x.k_cache[:, ::2]}, ValueError,
     "must be contiguous within a page .only the stride between pages is free., got strides"),
    ({"k_cache": lambda x: x.k_cache[:, :0]}, ValueError, "pages of at least one token"),
    ({"block_table": None}, TypeError,
     r"block_table must be a torch.Tensor \[b, max_blocks], got NoneType"),
    ({"block_table": lambda x: x.block_table.long()}, TypeError,
     "block_table must be of dtype int32, got int64"),
    ({"block_table": lambda x: x.block_table[:1]}, ValueError,
     r"block_table must have shape \[b, max_blocks] = \[2, any], got \[1, 4]"),
    ({"cache_seqlens": None}, TypeError,
     r"cache_seqlens must be a torch.Tensor \[b], got NoneType"),
    ({"cache_seqlens": lambda x: x.cache_seqlens[:1]}, ValueError,
     r"cache_seqlens must have shape \[b] = \[2], got \[1]"),
    ({"cache_seqlens": lambda x: x.cache_seqlens.to("meta")}, ValueError,
     "cache_seqlens must be on cpu, where the other tensors are, got meta"),
    ({"cache_seqlens": lambda x: x.cache_seqlens.repeat_interleave(2)[::2]}, ValueError,
     "cache_seqlens must be contiguous in its last dimension"),
    ({"tile_scheduler_metadata": None}, TypeError,
     r"tile_scheduler_metadata must be a torch.Tensor \[parts, 8], got NoneType"),
    ({"tile_scheduler_metadata": torch.zeros(9, 5).int()}, ValueError,
     r"tile_scheduler_metadata must have shape \[parts, 8] = \[any, 8], got"),
    ({"num_splits": None}, TypeError, r"num_splits must be a torch.Tensor \[b \+ 1], got NoneType"),
    ({"num_splits": torch.zeros(6, dtype=torch.int32)}, ValueError,
     "num_splits has 6 entries, a plan for batch size 5, but the batch size is 2"),
    ({"num_splits": torch.zeros(0, dtype=torch.int32)}, ValueError,
     "num_splits has 0 entries, but the batch size is 2: it must have shape"),
    ({"tile_scheduler_metadata": torch.zeros(0, 8).int()}, ValueError,
     "tile_scheduler_metadata must have from 1 to 1024 parts, got 0"),
    ({"tile_scheduler_metadata": torch.zeros(1025, 8).int()}, ValueError,
     "tile_scheduler_metadata must have from 1 to 1024 parts, got 1025"),
    ({"tile_scheduler_metadata": torch.zeros(9, 16).int()[:, :8]}, ValueError,
     "tile_scheduler_metadata must be contiguous, got strides"),
    ({"tile_scheduler_metadata": torch.zeros(73).int()[1:].view(9, 8)}, ValueError,
     "tile_scheduler_metadata must begin at a multiple of 16 bytes, got one that begins 4 bytes"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    ({"softmax_scale": -float("inf")}, ValueError, "softmax_scale must be finite, got -inf"),
    ({"softmax_scale": 10**400}, ValueError, "softmax_scale must be finite, got inf"),
    ({"k_cache": lambda x: x.k_cache[:, :, :0]}, ValueError,
     "q has 4 heads, which k_cache's 0 heads do not divide"),
    ({"num_splits": lambda x: x.num_splits.long()}, TypeError, "num_splits must be of dtype int32"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got str"),
    ({"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale must be a number, got Tensor"),
    ({"causal": 1}, TypeError, "causal must be True or False, got int 1"),
    ({"is_fp8_kvcache": True}, TypeError,
     "k_cache must be of dtype float8_e4m3fn or uint8 or int8, got bfloat16"),
    ({"is_fp8_kvcache": 1}, TypeError, "is_fp8_kvcache must be True or False, got int 1"),
    ({"attn_sink": torch.zeros(5)}, ValueError,
     r"attn_sink must have shape \[h_q] = \[4], got \[5]"),
    ({"attn_sink": torch.zeros(4).half()}, TypeError,
     "attn_sink must be of dtype float32, got float16"),
    ({"attn_sink": torch.zeros(4).to("meta")}, ValueError, "attn_sink must be on cpu, .* got meta"),
    ({"attn_sink": torch.zeros(8)[::2]}, ValueError, "attn_sink must be contiguous in its last"),
    ({"attn_sink": 1.0}, TypeError, r"attn_sink must be a torch.Tensor \[h_q], got float"),
    ({"topk_length": torch.zeros(2).int()}, ValueError, "topk_length must be None without indices"),
    ({"extra_k_cache": torch.zeros(1)}, NotImplementedError, "extra_k_cache must be None"),
    ({"extra_topk_length": torch.zeros(1)}, NotImplementedError, "extra_topk_length must be None"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_DENSE, ids=lambda x: str(x)[:24])
def test_bad_dense_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(arguments(**changes))


def fp8_arguments(**changes):
    """A small valid dense call over an FP8 cache, with changes."""
    inputs = DecodeCase("small", (65, 3), 2, 4, fp8=True, seed=3).build()
    return arguments(is_fp8_kvcache=True, k_cache=inputs.k_cache) | {
        name: value(inputs) if callable(value) else value for name, value in changes.items()
    }


BAD_DENSE_FP8 = [
    ({"q": lambda x: x.q[..., :512]}, ValueError,
     "q must have head size 576 with is_fp8_kvcache=True, got 512"),
    ({"k_cache": lambda x: x.k_cache.float()}, TypeError,
     "k_cache must be of dtype float8_e4m3fn or uint8 or int8, got float32"),
    ({"k_cache": lambda x: x.k_cache[..., :576]}, ValueError,
     r"must have shape \[blocks, page, 1, 656] = \[any, any, 1, 656], got \[8, 64, 1, 576]"),
    ({"k_cache": lambda x: x.k_cache.expand(-1, -1, 2, -1).contiguous()}, ValueError,
     r"k_cache must have shape \[blocks, page, 1, 656] = .*, got \[8, 64, 2, 656]"),
    ({"k_cache": lambda x: x.k_cache[:, ::2]}, ValueError, "must be contiguous within a page"),
    ({"k_cache": lambda x: x.k_cache[:, :0]}, ValueError, "pages of at least one token"),
    ({"block_table": None}, TypeError, r"block_table must be a torch.Tensor .*, got NoneType"),
    ({"cache_seqlens": None}, TypeError, r"cache_seqlens must be a torch.Tensor .*, got NoneType"),
    ({"tile_scheduler_metadata": None}, TypeError, "metadata must be a torch.Tensor .* NoneType"),
    ({"topk_length": torch.zeros(2).int()}, ValueError, "topk_length must be None without indices"),
    ({"causal": 1}, TypeError, "causal must be True or False, got int 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_DENSE_FP8, ids=lambda x: str(x)[:24])
def test_bad_dense_fp8_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(fp8_arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", DENSE_FP8_CASES[2:4], ids=lambda c: c.name)
def test_dense_decode_over_the_fp8_cache(case, dtype):
    x = case.build()
    old = flashmla.get_mla_metadata(x.cache_seqlens, case.s_q * case.h_q, 1)
    chunked = flashmla.get_mla_metadata(
        x.cache_seqlens, case.s_q * case.h_q, 1, batch_invariant=True
    )
    want_out, want_lse = x.expected()
    for plan in (old, chunked, flashmla.get_mla_metadata()):
        out, lse = flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache.view(dtype), x.block_table, x.cache_seqlens, 512, *plan,
            causal=case.causal, is_fp8_kvcache=True,
        )  # fmt: skip
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)
    assert backend.last_tier("fp8.dense_decode") == "torch"


def test_dense_and_sparse_decode_over_the_fp8_cache_agree():
    """All the tokens of a request, named one by one, are all its tokens."""
    given = fp8_arguments()
    page = given["k_cache"].shape[1]
    indices = torch.full((2, 2, 65), -1, dtype=torch.int32)
    for request, length in enumerate(given["cache_seqlens"].tolist()):
        tokens = torch.arange(length)
        blocks = given["block_table"][request, tokens // page]
        indices[request, :, :length] = blocks * page + tokens % page
    sparse = dict(block_table=None, cache_seqlens=None, tile_scheduler_metadata=None)
    sparse |= dict(num_splits=None, indices=indices)
    for got, want in zip(call(given), call(given | sparse), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)


SPLITS = torch.tensor([0, 1, 2], dtype=torch.int32)
BAD_SPARSE = [
    ({"causal": True}, ValueError, "causal must be False with indices"),
    ({"tile_scheduler_metadata": torch.zeros(9, 8).int(), "num_splits": torch.zeros(4).int()},
     ValueError, "num_splits has 4 entries, a plan for batch size 3, but the batch size is 2"),
    ({"tile_scheduler_metadata": torch.zeros(9, 8).int()}, TypeError, "num_splits must be a torch"),
    ({"num_splits": torch.zeros(3).int()}, TypeError,
     "num_splits must be None without tile_scheduler_metadata"),
    ({"tile_scheduler_metadata": flashmla.SplitPlan(), "num_splits": 1}, TypeError,
     "num_splits must be None with a plan object"),
    ({"tile_scheduler_metadata": flashmla.SplitPlan(torch.zeros(9, 5).int(), SPLITS)}, ValueError,
     r"tile_scheduler_metadata must have shape \[parts, 8]"),
    ({"block_table": "junk"}, TypeError, r"block_table must be a torch.Tensor .*, got str"),
    ({"block_table": torch.zeros(3, 4).int()}, ValueError, r"block_table must have shape .*\[2, a"),
    ({"cache_seqlens": 3.5}, TypeError, r"cache_seqlens must be a torch.Tensor \[b], got float"),
    ({"cache_seqlens": torch.zeros(3).int()}, ValueError, r"cache_seqlens must have shape \[b]"),
    ({"indices": lambda x: x.indices[:, :1]}, ValueError,
     r"indices must have shape \[b, s_q, topk] = \[2, 2, any], got \[2, 1, 100]"),
    ({"indices": lambda x: x.indices.long()}, TypeError,
     "indices must be of dtype int32, got int64"),
    ({"k_cache": lambda x: x.k_cache.float()}, TypeError,
     "k_cache must be of dtype float8_e4m3fn or uint8 or int8, got float32"),
    ({"k_cache": lambda x: x.k_cache[..., :576]}, ValueError,
     r"must have shape \[blocks, page, 1, 656] = \[any, any, 1, 656], got \[6, 64, 1, 576]"),
    ({"is_fp8_kvcache": False}, TypeError, "k_cache must be of dtype bfloat16, got uint8"),
    ({"attn_sink": torch.zeros(3)}, ValueError,
     r"attn_sink must have shape \[h_q] = \[16], got \[3]"),
    ({"attn_sink": torch.zeros(16).double()}, TypeError, "attn_sink must be of dtype float32"),
    ({"topk_length": torch.zeros(3).int()}, ValueError,
     r"topk_length must have shape \[b] = \[2], got \[3]"),
    ({"topk_length": torch.zeros(2, 3).int()}, ValueError,
     r"topk_length must have shape \[b, s_q] = \[2, 2], got \[2, 3]"),
    ({"topk_length": torch.zeros(2)}, TypeError, "topk_length must be of dtype int32, got float32"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_SPARSE, ids=lambda x: str(x)[:24])
def test_bad_sparse_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(sparse_arguments(**changes))


SEQLENS = torch.ones(3, dtype=torch.int32)
BAD_METADATA = [
    ((SEQLENS,), {}, TypeError, "takes no argument at all, or cache_seqlens, num_q_tokens"),
    ((None, 1, 1), {}, TypeError, "takes no argument at all"),
    (([1, 2], 1, 1), {}, TypeError, r"cache_seqlens must be a torch.Tensor \[b], got list"),
    ((SEQLENS.long(), 1, 1), {}, TypeError, "cache_seqlens must be of dtype int32, got int64"),
    ((SEQLENS[None], 1, 1), {}, ValueError, r"cache_seqlens must have 1 dimension \[b], got 2"),
    ((SEQLENS, 0, 1), {}, ValueError, "num_q_tokens_per_head_k must be at least 1, got 0"),
    ((SEQLENS, 1, -2), {}, ValueError, "num_heads_k must be at least 1, got -2"),
    ((SEQLENS, 1.0, 1), {}, TypeError, "num_q_tokens_per_head_k must be an int, got float"),
    ((SEQLENS, True, 1), {}, TypeError, "num_q_tokens_per_head_k must be an int, got bool"),
    ((SEQLENS, 1, 1), {"topk": -1}, ValueError, "topk must be at least 0, got -1"),
    ((SEQLENS, 1, 1), {"topk": 2**40}, ValueError, "topk must be at most 2147483647, got 1099511"),
    ((SEQLENS, 1, 1, "zz"), {}, TypeError, "num_heads_q must be an int, got str"),
    ((SEQLENS, 1, 1, 0), {}, ValueError, "num_heads_q must be at least 1, got 0"),
    ((SEQLENS, 1, 1, 4, "x"), {}, TypeError, "is_fp8_kvcache must be True or False, got str 'x'"),
    ((SEQLENS.to("meta"), 1, 1), {}, ValueError, "cache_seqlens must be on a device .*, got meta"),
    ((None, None, None, 4, True, 5), {}, TypeError, "num_heads_q needs cache_seqlens"),
    ((), {"topk": 5}, TypeError, "topk needs cache_seqlens"),
    ((), {"is_fp8_kvcache": True}, TypeError, "is_fp8_kvcache needs cache_seqlens"),
    ((), {"out": ()}, TypeError, "out needs cache_seqlens"),
    ((SEQLENS, 1, 1), {"out": SEQLENS}, TypeError, "out must be the tuple"),
    ((SEQLENS, 1, 1), {"out": (torch.zeros(9, 8).int(), torch.zeros(4).int())}, ValueError,
     r"out\[0] must have shape \[parts, 8] = \[132, 8], got \[9, 8]"),
    ((SEQLENS, 1, 1), {"out": (torch.zeros(132, 8).int(), torch.zeros(9).int())}, ValueError,
     r"out\[1] has 9 entries, a plan for batch size 8, but the batch size is 3"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_METADATA)
def test_bad_metadata_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        flashmla.get_mla_metadata(*args, **kwargs)


def test_a_plan_of_another_batch_size():
    plan, _ = flashmla.get_mla_metadata()
    call(arguments(tile_scheduler_metadata=plan, num_splits=None))
    three = DecodeCase("three", (1, 2, 3), h_q=4).build()
    with pytest.raises(
        ValueError, match="is a plan for batch size 2, but q has batch size 3; call"
    ):
        flashmla.flash_mla_with_kvcache(
            three.q, three.k_cache, three.block_table, three.cache_seqlens, 512, plan
        )


def test_a_plan_serves_one_kind_of_call():
    plan, _ = flashmla.get_mla_metadata()
    call(sparse_arguments(tile_scheduler_metadata=plan))
    with pytest.raises(ValueError, match="a plan of a sparse call and cannot serve a dense one"):
        call(arguments(tile_scheduler_metadata=plan, num_splits=None))
    with pytest.raises(TypeError, match="num_splits must be None with a plan object"):
        call(arguments(tile_scheduler_metadata=flashmla.get_mla_metadata()[0]))


def test_a_stale_plan_is_noticed_when_the_host_can_know():
    plan, _ = flashmla.get_mla_metadata()
    given = arguments(tile_scheduler_metadata=plan, num_splits=None)
    call(given)
    call(given)
    call(given | {"cache_seqlens": given["cache_seqlens"].clone()})  # as long, another tensor
    given["cache_seqlens"] += 1
    with pytest.raises(ValueError, match="is a stale plan: cache_seqlens was written since"):
        call(given)
    with torch.inference_mode():  # tensors without a version: nothing to compare, no error
        plan, _ = flashmla.get_mla_metadata()
        given = arguments(tile_scheduler_metadata=plan, num_splits=None)
        given["cache_seqlens"] = given["cache_seqlens"] + 0
        call(given)
        call(given)


@pytest.mark.parametrize(
    ("metadata", "splits", "error", "message"),
    [
        (
            torch.zeros(9, 8).int().to("meta"),
            SPLITS,
            ValueError,
            "metadata must be on cpu, .* meta",
        ),
        (torch.zeros(9, 8).int(), SPLITS.to("meta"), ValueError, "num_splits must be on cpu, wher"),
        (torch.zeros(9, 8), SPLITS, TypeError, "metadata must be of dtype int32, got float32"),
        (torch.zeros(0, 8).int(), SPLITS, ValueError, "metadata must have from 1 to 1024 parts"),
        (
            torch.zeros(9, 8).int(),
            SPLITS[:2],
            ValueError,
            "num_splits has 2 entries, a plan for ba",
        ),
        (torch.zeros(9, 8).int(), None, TypeError, "num_splits must be a torch.Tensor"),
        (None, SPLITS, TypeError, "tile_scheduler_metadata must be a torch.Tensor"),
    ],
)
def test_a_plan_object_is_checked_like_two_tensors(metadata, splits, error, message):
    plan = flashmla.SplitPlan(metadata, splits)
    for given in (arguments(), sparse_arguments()):
        with pytest.raises(error, match=message):
            call(given | {"tile_scheduler_metadata": plan, "num_splits": None})
    given = arguments()
    made = flashmla.SplitPlan(given["tile_scheduler_metadata"], given["num_splits"])
    want = call(given)
    got = call(given | {"tile_scheduler_metadata": made, "num_splits": None})
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    made.tile_scheduler_metadata = metadata  # another one after a good one is looked at again
    made.num_splits = splits
    with pytest.raises(error, match=message):
        call(given | {"tile_scheduler_metadata": made, "num_splits": None})


def test_a_call_that_fails_leaves_the_plan_free(monkeypatch):
    plan, _ = flashmla.get_mla_metadata()
    with pytest.raises(ValueError, match="indices must have shape"):
        call(sparse_arguments(tile_scheduler_metadata=plan, indices=torch.zeros(2, 1, 5).int()))
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    with pytest.raises(ValueError, match="but a length"):
        call(
            arguments(
                tile_scheduler_metadata=plan, num_splits=None,
                cache_seqlens=torch.tensor([65, -1]).int(),
            )
        )  # fmt: skip
    monkeypatch.delenv("FLASHMLA_CHECK")

    def fails(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(split_kv, "get_mla_metadata", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            call(arguments(tile_scheduler_metadata=plan, num_splits=None))
    assert plan.empty
    three = DecodeCase("three", (1, 2, 3), h_q=4).build()
    out, _ = flashmla.flash_mla_with_kvcache(
        three.q, three.k_cache, three.block_table, three.cache_seqlens, 512, plan
    )
    assert out.shape[0] == 3


BAD_VALUES = [
    ({"cache_seqlens": torch.tensor([65, -1]).int()},
     r"cache_seqlens\[1] is -1, but a length .* from 0 to 256"),
    ({"cache_seqlens": torch.tensor([257, 3]).int()}, r"cache_seqlens\[0] is 257, but .* 0 to 256"),
    ({"block_table": lambda x: x.block_table.clone().index_fill_(1, torch.tensor(1), 99)},
     r"block_table\[0, 1] is 99, but a block number within the length must be from 0 to 7"),
    ({"cache_seqlens": torch.tensor([64, 3]).int()}, "is a stale plan: it was made from other le"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_values_are_checked_when_asked_for(changes, message, monkeypatch):
    given = arguments(**changes)
    call(given)
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        call(given)
    call(arguments())
    monkeypatch.setenv("FLASHMLA_CHECK", "0")
    call(given)


@pytest.mark.parametrize(("scale", "shown"), [(-0.5, "-0.5"), (0.0, "0.0"), (NAN, "nan")])
def test_scales_within_the_lengths_are_checked_when_asked_for(scale, shown, monkeypatch):
    given = fp8_arguments()
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    call(given)  # NaN scales everywhere else are nobody's business
    block = int(given["block_table"][0, 1])  # its one token is the 65th of the first request
    cache = given["k_cache"].clone()
    cache[block, 0, 0, 524:528] = torch.tensor([scale]).view(torch.uint8)
    with pytest.raises(
        ValueError,
        match=rf"k_cache\[{block}, 0, 0] has the scale {shown} in tile 3, but a scale must be "
        r"positive and finite \(1 such scales\)",
    ):
        call(given | {"k_cache": cache})
    with pytest.raises(ValueError, match=r"block_table\[1, 0] is 99, but a block number within"):
        call(given | {"block_table": torch.tensor([[0, 1], [99, 1]]).int()})
    monkeypatch.setenv("FLASHMLA_CHECK", "0")
    call(given | {"k_cache": cache})


def test_sparse_values_are_checked_when_asked_for(monkeypatch):
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    with pytest.raises(
        ValueError, match=r"indices\[\d, \d, \d+] is .*-1 to skip, must be from -1 to 383"
    ):
        call(sparse_arguments())
    valid = torch.arange(400).view(2, 2, 100).int().clamp(max=383)
    page = SPARSE_DECODE_CASES[0].build().k_cache.shape[1]
    k_cache = fp8.pack(torch.randn(384 // page, page, 1, 576))
    call(sparse_arguments(k_cache=k_cache, indices=valid))
    with pytest.raises(
        ValueError, match=r"topk_length\[0] is 101, but a number of indices .* 0 to 100"
    ):
        call(sparse_arguments(indices=valid, topk_length=torch.tensor([101, 0]).int()))
    valid[1] = 99999
    call(
        sparse_arguments(
            k_cache=k_cache, indices=valid, topk_length=torch.tensor([100, 0]).int()
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "shown"),
    [(-0.5, "-0.5"), (0.0, "0.0"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_scales_that_are_read_are_checked_when_asked_for(scale, shown, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    k_cache = fp8.pack(torch.randn(6, 64, 1, 576))
    k_cache[2, 7, 0, 520:524] = torch.tensor([scale]).view(torch.uint8)
    k_cache[3, 1, 0, 512:516] = torch.tensor([scale]).view(torch.uint8)
    indices = torch.tensor([[[0, 5, -1, 134], [9, 135, 193, 7]], [[383, 1, 2, 3]] * 2]).int()
    with pytest.raises(
        ValueError,
        match=rf"k_cache\[2, 7, 0] has the scale {shown} in tile 2, but a scale must be positive "
        r"and finite \(2 such scales\)",
    ):
        call(sparse_arguments(k_cache=k_cache, indices=indices))
    call(sparse_arguments(k_cache=k_cache, indices=indices.masked_fill(indices > 134, -1)))
    call(sparse_arguments(k_cache=k_cache, indices=indices, topk_length=torch.ones(2, 2).int()))
    monkeypatch.setenv("FLASHMLA_CHECK", "0")
    call(sparse_arguments(k_cache=k_cache, indices=indices))
