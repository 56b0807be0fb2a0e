"""The torch tier on CUDA tensors: the way out where neither CUDA nor Triton serves a call."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DECODE_CASES,
    PREFILL_CASES,
    SPARSE_DECODE_CASES,
    SPARSE_PREFILL_CASES,
    case_id,
)

import flashmla
from flashmla import backend, fp8
from flashmla.lab.check import assert_gradient_close, assert_lse_close, assert_out_close
from flashmla.torch.split_kv import get_metadata

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _torch_tier():
    with flashmla.use_backend("torch"):
        yield


@pytest.mark.parametrize("case", DECODE_CASES[6:14], ids=case_id)
def test_dense_decode(case):
    x = case.build("cuda")
    plan, _ = flashmla.get_mla_metadata()
    out, lse = flashmla.flash_mla_with_kvcache(
        x.q, x.k_cache, x.block_table, x.cache_seqlens, 512, plan, causal=case.causal
    )
    assert backend.last_tier("mla.dense_decode") == "torch" and out.is_cuda
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("seqlens", [[0, 5, 70000, 64], [1] * 300, [4096] * 8], ids=str)
def test_the_plan_is_made_without_a_synchronisation(seqlens):
    lengths = torch.tensor(seqlens, dtype=torch.int32)
    on_card = lengths.cuda()
    out = tuple(torch.empty_like(x, device="cuda") for x in get_metadata(lengths, 66))
    get_metadata(on_card, 66)  # what is loaded or allocated at first use may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        get_metadata(on_card, 66, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(out, get_metadata(lengths, 66), strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("case", PREFILL_CASES[1:5], ids=case_id)
def test_dense_prefill(case):
    x = case.build("cuda")
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse = flashmla.flash_attn_varlen_func(
        *leaves, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv,
        causal=case.causal,
    )  # fmt: skip
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    out.backward(x.d_out)
    for leaf, want in zip(leaves, x.expected_gradients(), strict=True):
        assert_gradient_close(leaf.grad, want)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES[3:8], ids=case_id)
def test_sparse_decode(case):
    x = case.build("cuda")
    out, lse = flashmla.flash_mla_with_kvcache(
        x.q, x.k_cache, None, None, 512, None, is_fp8_kvcache=case.fp8, indices=x.indices,
        attn_sink=x.attn_sink, topk_length=x.topk_length,
    )  # fmt: skip
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES[:4], ids=case_id)
def test_sparse_prefill(case):
    x = case.build("cuda")
    out, max_logits, lse = flashmla.flash_mla_sparse_fwd(
        x.q, x.kv, x.indices, x.scale, attn_sink=x.attn_sink, topk_length=x.topk_length
    )
    want_out, want_max, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(max_logits, want_max)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_bytes_are_those_of_the_cpu(power_of_two):
    x = torch.randn(200, 576) * torch.logspace(-4, 3, 200).unsqueeze(1)
    packed = fp8.pack(x, power_of_two)
    assert torch.equal(fp8.pack(x.cuda(), power_of_two).cpu(), packed)
    assert torch.equal(fp8.unpack(packed.cuda()).cpu(), fp8.unpack(packed))
    cache = torch.zeros(4, 64, 1, 656, dtype=torch.uint8, device="cuda")
    slots = torch.randperm(256)[:200]
    fp8.append(cache, slots.cuda(), x.cuda())
    assert torch.equal(cache.view(256, 656)[slots.cuda()].cpu(), fp8.pack(x))


def test_indexer_and_topk_are_those_of_the_cpu():
    q = torch.randn(5, 4, 128).to(torch.float8_e4m3fn)
    k = torch.randn(300, 128).to(torch.float8_e4m3fn)
    start, end = torch.arange(5).int(), torch.arange(5).int() * 70
    arguments = (q, k, torch.rand(300), torch.randn(5, 4), start, end)
    logits = flashmla.indexer_logits(*arguments)
    on_card = flashmla.indexer_logits(*(x.cuda() for x in arguments))
    torch.testing.assert_close(on_card.cpu(), logits, rtol=1e-5, atol=1e-3)
    tied = torch.randint(-2, 3, (7, 500)).float()
    want = flashmla.topk(tied, 64)
    assert torch.equal(flashmla.topk(tied.cuda(), 64).cpu(), want)
