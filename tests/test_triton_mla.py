"""The Triton tier's paged MLA decode against the oracle, in Triton's interpreter."""

import pytest
import torch
from cases import DECODE_CASES, DecodeCase, case_id

pytest.importorskip("triton")

from triton_bodies import check_decode, check_decode_with_wild_blocks  # noqa: E402
from triton_worker import interpreted  # noqa: E402

# Small heads, as lessons use them: d_qk = d_v + RoPE, powers of two both, RoPE possibly absent.
SMALL_HEADS = [
    DecodeCase("heads_32_16", d_qk=48, d_v=32, h_q=4, s_q=2, causal=True, seed=50),
    DecodeCase("heads_64_0", d_qk=64, d_v=64, h_q=2, seed=51),
    DecodeCase("heads_16_16", d_qk=32, d_v=32, h_q=6, h_kv=3, dtype=torch.float16, seed=52),
]


@pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
def test_decode_matches_the_oracle(case):
    interpreted(check_decode, case)


CHUNKED = [c for c in DECODE_CASES if c.name in ("causal", "one_long_among_short", "sink_split")]


@pytest.mark.parametrize("case", CHUNKED, ids=case_id)
def test_decode_with_a_batch_invariant_plan_matches_the_oracle(case):
    interpreted(check_decode, case, "cpu", 5, True)


@pytest.mark.parametrize("case", SMALL_HEADS, ids=case_id)
def test_decode_takes_small_heads(case):
    interpreted(check_decode, case)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_decode_gives_the_same_however_it_is_split(parts):
    case = DecodeCase("parts", (0, 700, 1, 65), h_q=4, s_q=2, d_qk=48, d_v=32, causal=True, seed=53)
    interpreted(check_decode, case, "cpu", parts)


def test_decode_reads_nothing_outside_the_cache():
    interpreted(check_decode_with_wild_blocks)


def _refusals():
    from flashmla.triton import mla

    def reason(dtype, d_qk, d_v):
        return mla.supports_dense_decode(torch.empty(1, 1, 1, d_qk, dtype=dtype), *[None] * 3, d_v)

    return [reason(*sizes) for sizes in _REFUSED]


_REFUSED = [
    (torch.float32, 576, 512),
    (torch.bfloat16, 576, 576),
    (torch.bfloat16, 600, 512),
    (torch.bfloat16, 8, 8),
    (torch.bfloat16, 520, 512),
]


def test_decode_says_what_it_does_not_take():
    reasons = interpreted(_refusals)
    assert "float32" in reasons[0] and "bfloat16 and float16" in reasons[0]
    for (_, d_qk, d_v), reason in zip(_REFUSED[1:], reasons[1:], strict=True):
        assert f"d_qk {d_qk} with head_dim_v {d_v}" in reason and "powers of two" in reason
