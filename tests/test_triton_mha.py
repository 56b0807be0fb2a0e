"""The Triton tier's dense prefill against the oracle, in Triton's interpreter."""

import pytest
import torch
from cases import PREFILL_CASES, PrefillCase, case_id

pytest.importorskip("triton")

from triton_bodies import check_prefill  # noqa: E402
from triton_worker import interpreted  # noqa: E402

SMALL_HEADS = [
    PrefillCase("heads_48_32", d_qk=48, d_v=32, causal=True, seed=50),
    PrefillCase("heads_16_16", d_qk=16, d_v=16, h_q=4, h_kv=2, dtype=torch.float16, seed=51),
    PrefillCase("heads_64_128", d_qk=64, d_v=128, h_q=2, h_kv=1, seed=52),
]


@pytest.mark.parametrize("case", PREFILL_CASES, ids=case_id)
def test_forward_matches_the_oracle(case):
    interpreted(check_prefill, case)


@pytest.mark.parametrize("case", SMALL_HEADS, ids=case_id)
def test_forward_takes_small_heads(case):
    interpreted(check_prefill, case)


def test_forward_of_nothing():
    interpreted(check_prefill, PrefillCase("no_queries", ((0, 5), (0, 0)), seed=53))


_REFUSED = [
    (torch.float32, 128, 128),
    (torch.bfloat16, 96 + 16, 64),
    (torch.bfloat16, 128, 96),
    (torch.bfloat16, 8, 16),
]


def _refusals():
    from flashmla.triton import mha

    def reason(dtype, d_qk, d_v):
        q = torch.empty(1, 1, d_qk, dtype=dtype)
        return mha.supports_forward(q, q, torch.empty(1, 1, d_v, dtype=dtype))

    return [reason(*sizes) for sizes in _REFUSED]


def test_forward_says_what_it_does_not_take():
    reasons = interpreted(_refusals)
    assert "float32" in reasons[0] and "bfloat16 and float16" in reasons[0]
    for (_, d_qk, d_v), reason in zip(_REFUSED[1:], reasons[1:], strict=True):
        assert f"head sizes {d_qk} and {d_v}" in reason and "power of two" in reason
