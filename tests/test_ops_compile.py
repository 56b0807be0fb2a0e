"""The operations under torch.compile: one graph, the same results, honest fake functions."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DECODE_CASES,
    DENSE_FP8_CASES,
    PREFILL_CASES,
    SPARSE_DECODE_CASES,
    SPARSE_PREFILL_CASES,
)

import flashmla
from flashmla import fp8

ops = torch.ops.flashmla


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_dense_decode_with_both_forms_of_the_plan():
    x = DECODE_CASES[8].build()

    def old(q, cache, table, lengths):
        plan = flashmla.get_mla_metadata(lengths, 32, 1)
        return flashmla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *plan, causal=True)

    def two_layers(q, cache, table, lengths):
        plan, _ = flashmla.get_mla_metadata()
        out, _ = flashmla.flash_mla_with_kvcache(q, cache, table, lengths, 512, plan)
        again = torch.cat([out, q[..., 512:]], -1)
        return flashmla.flash_mla_with_kvcache(again, cache, table, lengths, 512, plan)

    arguments = (x.q, x.k_cache, x.block_table, x.cache_seqlens)
    for function in (old, two_layers):
        assert_same(compiled(function)(*arguments), function(*arguments))


def test_dense_decode_over_the_fp8_cache():
    x = DENSE_FP8_CASES[2].build()

    def step(q, cache, table, lengths):
        plan = flashmla.get_mla_metadata(lengths, 32, 1)
        return flashmla.flash_mla_with_kvcache(
            q, cache, table, lengths, 512, *plan, causal=True, is_fp8_kvcache=True
        )

    arguments = (x.q, x.k_cache, x.block_table, x.cache_seqlens)
    assert_same(compiled(step)(*arguments), step(*arguments))


def test_rescheduling_in_place():
    lengths = torch.tensor([640, 5], dtype=torch.int32)
    plan = flashmla.get_mla_metadata(lengths, 16, 1)

    def reschedule(lengths):
        return flashmla.get_mla_metadata(lengths + 100, 16, 1, out=plan)

    got = compiled(reschedule)(lengths)
    assert all(x is y for x, y in zip(got, plan, strict=True))
    assert_same(plan, flashmla.get_mla_metadata(lengths + 100, 16, 1))


def test_prefill_with_gradients():
    x = PREFILL_CASES[1].build()

    def step(q, k, v):
        out, lse = flashmla.flash_attn_varlen_func(
            q, k, v, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv, causal=True
        )
        return out * 2, lse

    results = []
    for function in (step, compiled(step)):
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
        out, lse = function(*leaves)
        finite = lse.masked_fill(lse.isinf(), 0.0)
        gradients = torch.autograd.grad([out, finite.sum()], leaves, [x.d_out, torch.tensor(1.0)])
        results.append((out, lse, *gradients))
    assert_same(*results)


def test_sparse_attention():
    x = SPARSE_DECODE_CASES[6].build()
    y = SPARSE_PREFILL_CASES[2].build()

    def both(q, cache, indices, sink, length):
        decoded = flashmla.flash_mla_with_kvcache(
            q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices, attn_sink=sink,
            topk_length=length,
        )  # fmt: skip
        filled = flashmla.flash_mla_sparse_fwd(
            y.q, y.kv, y.indices, y.scale, topk_length=y.topk_length
        )
        return *decoded, *filled

    arguments = (x.q, x.k_cache, x.indices, x.attn_sink, x.topk_length)
    assert_same(compiled(both)(*arguments), both(*arguments))


def test_indexer_and_topk_and_fp8_and_merge():
    k_scale, weights = torch.rand(40), torch.rand(3, 2)
    start, end = torch.zeros(3).int(), torch.tensor([40, 5, 0]).int()

    def choose(q, k, x):
        codes = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
        logits = flashmla.indexer_logits(*codes, k_scale, weights, start, end)
        chosen = flashmla.topk(logits, 7)
        cache = torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
        fp8.append(cache, chosen[0], x)
        values = fp8.unpack(cache)
        flashmla.paged_append(values, chosen[1], x.unsqueeze(1))
        keys = torch.zeros(1, 64, 1, 132, dtype=torch.uint8)
        fp8.index_append(keys, chosen[0], fp8.rotate(x[:, :128]))
        merged = flashmla.merge_state(x, x[:, 0], 2 * x, x[:, 1])
        return logits, chosen, values, fp8.pack(x), keys, *fp8.index_pack(x[:, :128]), *merged

    arguments = torch.randn(3, 2, 128), torch.randn(40, 128), torch.randn(7, 576)
    results = compiled(choose)(*arguments)
    assert_same(results, choose(*arguments))
    assert results[2].any()


def test_a_scale_given_as_a_number():
    x = DECODE_CASES[8].build()
    plan = flashmla.get_mla_metadata(x.cache_seqlens, 32, 1)

    def decode(q, scale):
        return flashmla.flash_mla_with_kvcache(
            q, x.k_cache, x.block_table, x.cache_seqlens, 512, *plan, softmax_scale=scale
        )

    fast = compiled(decode)
    for scale in (0.04, 0.05, 0.06):
        assert_same(fast(x.q, scale), decode(x.q, scale))


def test_bad_input_is_reported_from_compiled_code_as_well():
    with pytest.raises(Exception, match="k must be at least 0, got -1"):
        compiled(lambda x: flashmla.topk(x, -1))(torch.zeros(2, 3))


def operator_calls():
    """Every operator with arguments that it takes."""
    d = DECODE_CASES[12].build()
    plan = flashmla.get_mla_metadata(d.cache_seqlens, 8, 2)
    d8 = DENSE_FP8_CASES[2].build()
    plan8 = flashmla.get_mla_metadata(d8.cache_seqlens, 32, 1)
    s, f, m = (
        SPARSE_DECODE_CASES[6].build(),
        SPARSE_PREFILL_CASES[1].build(),
        PREFILL_CASES[2].build(),
    )
    mha = (m.q, m.k, m.v, m.cu_seqlens_qo, m.cu_seqlens_kv, 65, 130, 0.1, True)
    out, lse = ops.mha_forward(*mha)
    merge = torch.randn(5, 4), torch.zeros(5), torch.randn(5, 4), torch.zeros(5)
    codes = torch.randn(3, 2, 128).to(torch.float8_e4m3fn)
    keys = torch.randn(9, 128).to(torch.float8_e4m3fn)
    bounds = torch.tensor([0, 3, 9]).int()
    pages = torch.zeros(4, 64, 1, 132, dtype=torch.uint8)
    table = torch.arange(6).view(3, 2).int() % 4
    cache, x = torch.zeros(2, 4, 1, 656, dtype=torch.uint8), torch.randn(3, 576)
    return {
        "mla_dense_decode": (
            d.q, d.k_cache, d.block_table, d.cache_seqlens, 512, *plan, 0.04, True
        ),
        "fp8_dense_decode": (
            d8.q, d8.k_cache, d8.block_table, d8.cache_seqlens, 512, *plan8, 0.04, True
        ),
        "split_kv_get_metadata": (d.cache_seqlens, 7),
        "split_kv_merge_state": merge,
        "mha_forward": mha,
        "mha_backward": (m.d_out, *mha[:3], out, lse, *mha[3:], True, None),
        "dsa_sparse_decode": (
            s.q, s.k_cache, s.indices, 512, 0.04, True, s.attn_sink, s.topk_length
        ),
        "dsa_sparse_prefill": (f.q, f.kv, f.indices, 0.04, 512, f.attn_sink, None, True),
        "dsa_indexer_logits": (codes, keys, torch.rand(9), torch.rand(3, 2), 0 * bounds, bounds),
        "dsa_indexer_logits_paged": (
            codes[:, None], pages, torch.rand(3, 1, 2), table, bounds * 10
        ),
        "dsa_topk": (torch.randn(3, 50), 6, None, table, 64),
        "fp8_pack": (x, True),
        "fp8_unpack": (cache,),
        "fp8_append": (cache, torch.tensor([0, 5, -1]), x),
        "fp8_index_pack": (x[:, :128].contiguous(), True),
        "fp8_index_append": (pages, torch.tensor([0, 70, -1]), x[:, :128]),
        "paged_kv_append": (
            torch.zeros(2, 4, 1, 576), torch.tensor([0, 5, -1]), x.unsqueeze(1)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(operator_calls()))
def test_operators_keep_to_their_schema_and_fakes_to_their_results(name):
    arguments = operator_calls()[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if arguments[0].dtype == torch.float8_e4m3fn:
        checks.remove("test_schema")  # torch's checker multiplies its arguments, and has no FP8 *
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)
