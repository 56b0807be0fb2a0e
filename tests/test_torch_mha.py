"""The torch tier's dense prefill against the oracle, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import PREFILL_CASES, PrefillCase, case_id, to_numpy

from flashmla.lab.check import assert_gradient_close, assert_lse_close, assert_out_close
from flashmla.reference import mha as reference
from flashmla.torch import mha


def forward(x):
    return mha.forward(
        x.q, x.k, x.v, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv,
        x.scale, x.case.causal,
    )  # fmt: skip


def backward(x, out, lse, d_lse=None):
    return mha.backward(
        x.d_out, x.q, x.k, x.v, out, lse, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo,
        x.max_seqlen_kv, x.scale, x.case.causal, True, d_lse,
    )  # fmt: skip


def assert_gradients_close(gradients, expected):
    for name, got, want in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        if want.any():
            assert_gradient_close(got, want, name=name)
        else:  # with one key a score's gradient is a difference of equals
            assert got.abs().max().item() < 1e-6


@pytest.mark.parametrize("case", PREFILL_CASES, ids=case_id)
def test_against_the_oracle(case):
    inputs = case.build()
    out, lse = forward(inputs)
    want_out, want_lse = inputs.expected()
    assert out.dtype == case.dtype and out.is_contiguous()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    gradients = backward(inputs, out, lse)
    assert [g.dtype for g in gradients] == [case.dtype] * 3
    assert_gradients_close(gradients, inputs.expected_gradients())


@pytest.mark.parametrize("case", PREFILL_CASES[1::4], ids=case_id)
def test_gradient_of_the_lse(case):
    inputs = dataclasses.replace(case, dtype=torch.float32).build()
    out, lse = forward(inputs)
    d_lse = torch.randn(lse.shape)
    want = reference.attention_varlen_backward(
        *(to_numpy(x) for x in (inputs.d_out, inputs.q, inputs.k, inputs.v)),
        to_numpy(inputs.cu_seqlens_qo), to_numpy(inputs.cu_seqlens_kv), inputs.scale,
        case.causal, to_numpy(d_lse),
    )  # fmt: skip
    assert_gradients_close(backward(inputs, out, lse, d_lse), want)


@pytest.mark.parametrize("causal", [False, True])
def test_more_than_one_block_each_way(causal):
    """Queries beyond 256 and keys beyond 512, in float32 so that a wrong block can't hide."""
    sequences = ((300, 1100), (600, 520), (257, 513))
    case = PrefillCase("blocks", sequences, 2, 1, 128, causal=causal, dtype=torch.float32, seed=5)
    inputs = case.build()
    out, lse = forward(inputs)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    assert_gradients_close(backward(inputs, out, lse), inputs.expected_gradients())


def test_tokens_behind_the_last_sequence_are_not_read():
    inputs = PREFILL_CASES[1].build()
    want_out, want_lse = forward(inputs)
    tail = {name: getattr(inputs, name) for name in ("q", "k", "v")}
    longer = {
        name: torch.cat([x, torch.full_like(x[:3], float("nan"))]) for name, x in tail.items()
    }
    out, lse = forward(dataclasses.replace(inputs, **longer))
    assert torch.equal(out[:-3], want_out) and torch.equal(lse[:-3], want_lse)
    assert not out[-3:].any() and (lse[-3:] == float("inf")).all()
