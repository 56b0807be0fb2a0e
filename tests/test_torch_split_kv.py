"""The torch tier's merging against the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla.lab.check import assert_lse_close, assert_out_close
from flashmla.reference import split_kv as reference
from flashmla.torch import split_kv

INF = float("inf")


def halves(dtype=torch.float32, rows=64, d=32):
    outs = [torch.randn(rows, d).to(dtype) for _ in range(2)]
    lses = [torch.randn(rows) * 5 for _ in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_the_oracles(dtype):
    out_a, lse_a, out_b, lse_b = halves(dtype)
    lse_a[:6] = torch.tensor([INF, -INF, INF, -INF, 3.0, 200.0])
    lse_b[:6] = torch.tensor([1.0, 1.0, -INF, INF, INF, -200.0])
    out, lse = split_kv.merge_state(out_a, lse_a, out_b, lse_b)
    out_a[:4], out_b[2:5] = 0, 0  # the oracle takes it that what is empty has out 0
    want_out, want_lse = reference.merge(
        out_a.double().numpy(), lse_a.double().numpy(), out_b.double().numpy(),
        lse_b.double().numpy(),
    )  # fmt: skip
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    assert lse[2] == lse[3] == INF and not out[2:4].any()


def test_an_empty_half_is_not_read():
    out_a, lse_a, out_b, lse_b = halves()
    out_a[0], lse_a[0] = float("nan"), INF
    out_b[1], lse_b[1] = float("nan"), -INF
    out_a[2] = out_b[2] = float("nan")
    lse_a[2], lse_b[2] = -INF, -INF
    out, lse = split_kv.merge_state(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[0], out_b[0]) and torch.equal(out[1], out_a[1])
    assert lse[0] == lse_b[0] and lse[1] == lse_a[1]
    assert not out[2].any() and lse[2] == INF


def test_combine_is_merging_one_by_one():
    num_splits = [0, 1, 4, 5, 12]
    outs, lses = torch.randn(12, 6, 8), torch.randn(12, 6) * 3
    lses[2, :3], outs[2, :3] = -INF, 0  # one split that saw nothing
    lses[5:, 1], outs[5:, 1] = -INF, 0  # a row that no split saw
    out, lse = split_kv.combine(outs, lses, num_splits)
    for request in range(4):
        slots = range(num_splits[request], num_splits[request + 1])
        want_out, want_lse = reference.merge_many(
            [outs[i].double().numpy() for i in slots], [lses[i].double().numpy() for i in slots]
        )
        assert_out_close(out[request], want_out)
        assert_lse_close(lse[request], np.where(want_lse == -INF, INF, want_lse))
    assert lse[3, 1] == INF and not out[3, 1].any()


ANY_LSE = st.floats(-60, 60, width=32) | st.sampled_from([INF, -INF])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ANY_LSE, st.floats(-2, 2, width=32)), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(states):
    a, b, c = ((torch.tensor([[x]]), torch.tensor([lse])) for lse, x in states)
    left = split_kv.merge_state(*split_kv.merge_state(*a, *b), *c)
    right = split_kv.merge_state(*a, *split_kv.merge_state(*b, *c))
    swapped = split_kv.merge_state(*c, *split_kv.merge_state(*b, *a))
    for other in (right, swapped):
        torch.testing.assert_close(left[0], other[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(left[1], other[1], atol=1e-5, rtol=0)
