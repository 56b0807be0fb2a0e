"""flash_attn_varlen_func and its packed forms: gradients, thread-proof dispatch, bad input."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import PREFILL_CASES, PrefillCase

import flashmla
from flashmla import backend
from flashmla.lab.check import assert_gradient_close, assert_lse_close, assert_out_close


@pytest.fixture(autouse=True)
def _no_value_checks(monkeypatch):
    monkeypatch.delenv("FLASHMLA_CHECK", raising=False)


def lengths(x):
    return x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv


def leaves(x):
    return [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]


def test_arguments_stand_in_flashmlas_order():
    want = (
        "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p softmax_scale "
        "causal deterministic is_varlen"
    )
    assert " ".join(inspect.signature(flashmla.flash_attn_varlen_func).parameters) == want


@pytest.mark.parametrize("case", PREFILL_CASES[1:5], ids=lambda c: c.name)
def test_forward_and_backward(case):
    x = case.build()
    q, k, v = leaves(x)
    out, lse = flashmla.flash_attn_varlen_func(q, k, v, *lengths(x), causal=case.causal)
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    out.backward(x.d_out)
    for name, got, want in zip(("dq", "dk", "dv"), (q, k, v), x.expected_gradients(), strict=True):
        assert_gradient_close(got.grad, want, name=name)


def plain(q, k, v, scale):
    scores = torch.einsum("shd,thd->hst", q, k) * scale
    lse = scores.logsumexp(-1)
    return torch.einsum("hst,thd->shd", torch.exp(scores - lse[..., None]), v), lse.T


@pytest.mark.parametrize("use", ["out", "lse", "both", "expanded"])
def test_gradients_of_either_result(use):
    """Against torch's own gradients of the formula."""
    x = PrefillCase("one", ((7, 9),), 2, 2, 128, dtype=torch.float32, seed=4).build()
    gradients = []
    for function in (
        lambda q, k, v: flashmla.flash_attn_varlen_func(q, k, v, *lengths(x)),
        lambda q, k, v: plain(q, k, v, 128**-0.5),
    ):
        inputs = leaves(x)
        out, lse = function(*inputs)
        loss = {
            "out": lambda out=out: (out * x.d_out).sum(),
            "lse": lambda lse=lse: (lse**2).sum(),
            "both": lambda out=out, lse=lse: (out * x.d_out).sum() + (lse**2).sum(),
            "expanded": lambda out=out: out.sum(),
        }[use]()
        gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for name, got, want in zip(("dq", "dk", "dv"), *gradients, strict=True):
        if want is None:
            assert not got.any()
        else:
            assert_gradient_close(got, want, name=name)


def test_no_graph_where_none_is_wanted():
    x = PREFILL_CASES[2].build()
    q, k, v = leaves(x)
    with torch.no_grad():
        assert not flashmla.flash_attn_varlen_func(q, k, v, *lengths(x))[0].requires_grad
    assert not flashmla.flash_attn_varlen_func(x.q, x.k, x.v, *lengths(x))[0].requires_grad


def test_backward_keeps_the_tier_of_its_forward(monkeypatch):
    x = PREFILL_CASES[2].build()
    q, k, v = leaves(x)
    with flashmla.use_backend("torch"):
        out, _ = flashmla.flash_attn_varlen_func(q, k, v, *lengths(x))
    seen = []
    inner = backend.call
    monkeypatch.setattr(
        backend, "call", lambda *a: (seen.append((a[0], backend.forced_backend())), inner(*a))[1]
    )
    out.backward(x.d_out)
    assert seen == [("mha.backward", "torch")]


def test_packed_forms():
    case = PrefillCase("packed", ((30, 30), (65, 65)), 2, 2, 192, causal=True, seed=8)
    x = case.build()
    want = flashmla.flash_attn_varlen_func(x.q, x.k, x.v, *lengths(x), causal=True)
    qkv = torch.cat([x.q, x.k, x.v], -1).requires_grad_()
    kv = torch.cat([x.k, x.v], -1)
    forms = [
        flashmla.flash_attn_varlen_qkvpacked_func(qkv, x.cu_seqlens_qo, 65, 192, causal=True),
        flashmla.flash_attn_varlen_kvpacked_func(x.q, kv, *lengths(x), 192, causal=True),
    ]
    for got in forms:
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    forms[0][0].backward(x.d_out)
    for got, expected in zip(
        qkv.grad.split([192, 192, 128], -1), x.expected_gradients(), strict=True
    ):
        assert_gradient_close(got, expected)


def test_nothing_at_all():
    empty = torch.empty(0, 2, 128).bfloat16()
    cu = torch.zeros(3, dtype=torch.int32)
    out, lse = flashmla.flash_attn_varlen_func(empty, empty, empty, cu, cu, 0, 0)
    assert out.shape == (0, 2, 128) and lse.shape == (0, 2)


BAD = [
    ({"q": 1}, TypeError, r"q must be a torch.Tensor \[total_q, h_q, d_qk], got int"),
    ({"q": lambda x: x.q.double()}, TypeError, "q must be of dtype bfloat16 or float16 or float32"),
    ({"k": lambda x: x.k.half()}, TypeError, "k must be of dtype bfloat16, got float16"),
    ({"k": lambda x: x.k[..., :128]}, ValueError,
     r"k must have shape \[total_kv, h_kv, d_qk] = \[any, any, 192], got"),
    ({"v": lambda x: x.v[1:]}, ValueError, r"v must have shape \[total_kv, h_kv, d_v] = "),
    ({"v": lambda x: x.v[..., :64]}, ValueError,
     r"head sizes \(d_qk, d_v\) = \(192, 64\); supported are \(192, 128\) and \(128, 128\)"),
    ({"k": lambda x: x.k[:, :3], "v": lambda x: x.v[:, :3]}, ValueError,
     "q has 4 heads, which k's 3 do not divide"),
    ({"cu_seqlens_qo": lambda x: x.cu_seqlens_qo.long()}, TypeError,
     "cu_seqlens_qo must be of dtype int32, got int64"),
    ({"cu_seqlens_kv": lambda x: x.cu_seqlens_kv[1:]}, ValueError,
     r"cu_seqlens_kv must have shape \[sequences \+ 1] = \[6], got \[5]"),
    ({"max_seqlen_qo": 1.5}, TypeError, "max_seqlen_qo must be an int, got float"),
    ({"max_seqlen_kv": -1}, ValueError, "max_seqlen_kv must be at least 0, got -1"),
    ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0: dropout is not supported, got 0.1"),
    ({"dropout_p": "0"}, TypeError, "dropout_p must be a number, got str"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite, got inf"),
    ({"is_varlen": "x"}, TypeError, "is_varlen must be True or False, got str 'x'"),
    ({"causal": None}, TypeError, "causal must be True or False, got NoneType None"),
]  # fmt: skip


def call(**changes):
    x = PREFILL_CASES[0].build()
    names = "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv".split()
    given = {name: getattr(x, name) for name in names}
    changed = {k: v(x) if callable(v) else v for k, v in changes.items()}
    return flashmla.flash_attn_varlen_func(**(given | changed))


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda x: str(x)[:24])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_packed_input():
    cu = torch.tensor([0, 4], dtype=torch.int32)
    qkv = torch.zeros(4, 2, 512).bfloat16()
    with pytest.raises(ValueError, match=r"head_dim_qk must be one of \[128, 192], got 64"):
        flashmla.flash_attn_varlen_qkvpacked_func(qkv, cu, 4, 64)
    with pytest.raises(
        ValueError, match="qkv must have a last dimension of 384 for head_dim_qk 128"
    ):
        flashmla.flash_attn_varlen_qkvpacked_func(qkv, cu, 4, 128)
    with pytest.raises(
        ValueError, match="kv must have a last dimension of 320 for head_dim_qk 192"
    ):
        flashmla.flash_attn_varlen_kvpacked_func(qkv, qkv, cu, cu, 4, 4, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_qo": torch.tensor([1, 65, 66, 66, 96, 101]).int()}, r"cu_seqlens_qo\[0] mu"),
        ({"cu_seqlens_kv": torch.tensor([0, 65, 60, 66, 96, 101]).int()},
         r"cu_seqlens_kv\[2] is 60, but prefix sums must not fall \(the one before is 65\)"),
        ({"cu_seqlens_qo": torch.tensor([0, 65, 66, 66, 96, 999]).int()}, "number of tokens, 101"),
        ({"max_seqlen_kv": 64}, "max_seqlen_kv is 64, but sequence 0 of cu_seqlens_kv has 65"),
    ],
)  # fmt: skip
def test_values_are_checked_when_asked_for(changes, message, monkeypatch):
    call(**changes)
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)
