"""Dense decode over the FP8 cache on a Hopper card: against the oracle, poisoned, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import (
    DENSE_FP8_CASES,
    DecodeCase,
    DecodeInputs,
    case_id,
    large_dense_fp8_cases,
    to_numpy,
)
from decoding import DEVICE, plan_for, poison_free_memory

import flashmla
from flashmla import backend
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.reference import fp8, paged_kv

pytestmark = pytest.mark.gpu
REPEATS = 20
CASES = (
    *DENSE_FP8_CASES,
    *large_dense_fp8_cases(),
    DecodeCase("fp8_17_queries", (5, 300, 0, 1100), 17, 16, causal=True, fp8=True, seed=1700),
    DecodeCase("fp8_one_token_tiles", (64, 65, 1), 70, 1, causal=True, fp8=True, seed=1701),
    DecodeCase("fp8_16_rows", (9000, 0, 64, 65, 130, 1), 1, 16, fp8=True, seed=1703),
    DecodeCase(
        "fp8_32_rows", (5000, 63, 1, 300, 0), 2, 16, causal=True, fp8=True, power_of_two=False,
        sink=True, seed=1704,
    ),
    DecodeCase("fp8_17_rows_of_pages_of_100", (0, 1000, 101), 1, 17, page=100, fp8=True, seed=1705),
    DecodeCase(
        "fp8_wide_scores", (3000, 64), 1, 16, softmax_scale=1.5, fp8=True, seed=1706
    ),
)  # fmt: skip
FEW_ROWS = 32
"""Query rows of a request up to which codes are multiplied as they are, and nothing is rounded."""


def decode(
    x: DecodeInputs, plan=None, batch_invariant: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public call, served by CUDA or not at all."""
    with backend.use_backend("cuda"):
        return flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, x.block_table, x.cache_seqlens, x.case.d_v,
            *(plan or plan_for(x, batch_invariant)), softmax_scale=x.scale, causal=x.case.causal,
            is_fp8_kvcache=True, attn_sink=x.attn_sink,
        )  # fmt: skip


def as_multiplied(x: DecodeInputs) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's answer over keys rounded to bfloat16, which is what the tensor cores get."""
    keys = fp8.unpack(to_numpy(x.k_cache), np.float64).astype(ml_dtypes.bfloat16)
    return paged_kv.paged_decode(
        to_numpy(x.q), keys, to_numpy(x.block_table), to_numpy(x.cache_seqlens), x.case.d_v,
        x.scale, x.case.causal, to_numpy(x.attn_sink),
    )  # fmt: skip


def named(name: str) -> DecodeCase:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_oracle(case: DecodeCase, batch_invariant: bool) -> None:
    x = case.build(DEVICE)
    plan = plan_for(x, batch_invariant)
    poison_free_memory()
    out, lse = decode(x, plan)
    want_out, want_lse = x.expected()
    if not case.power_of_two and case.softmax_scale is None:
        error = np.linalg.norm(out.double().cpu().numpy() - want_out)
        assert error <= 2**-8 * np.linalg.norm(want_out)  # the keys' rounding, and the output's
    if not case.power_of_two and case.s_q * case.h_q > FEW_ROWS:
        want_out, want_lse = as_multiplied(x)
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize(
    "name",
    [
        "fp8_b1_long", "fp8_b32_varied", "fp8_b500_tiny", "fp8_17_queries", "fp8_pages_of_100",
        "fp8_16_rows", "fp8_32_rows", "fp8_17_rows_of_pages_of_100",
    ],
)  # fmt: skip
def test_repeats_bit_for_bit(name: str) -> None:
    x = named(name).build(DEVICE)
    plan = plan_for(x)
    first_out, first_lse = decode(x, plan)
    for _ in range(REPEATS):
        poison_free_memory()
        out, lse = decode(x, plan)
        assert_identical("out", out, first_out)
        assert_identical("lse", lse, first_lse)


def test_a_batch_invariant_plan_gives_each_request_the_same_bits() -> None:
    x = named("fp8_b32_varied").build(DEVICE)
    out, lse = decode(x, batch_invariant=True)
    for i in (0, 7, 31):
        alone = DecodeInputs(
            x.case, x.q[i : i + 1], x.k_cache, x.block_table[i : i + 1], x.cache_seqlens[i : i + 1]
        )
        plan = flashmla.get_mla_metadata(alone.cache_seqlens, 2 * 128, 1, batch_invariant=True)
        alone_out, alone_lse = decode(alone, plan)
        assert_identical("out", alone_out, out[i : i + 1])
        assert_identical("lse", alone_lse, lse[i : i + 1])


def test_a_batch_invariant_plan_of_few_rows_gives_each_request_the_same_bits() -> None:
    x = named("fp8_16_rows").build(DEVICE)
    out, lse = decode(x, batch_invariant=True)
    for i in (0, 4):
        alone = DecodeInputs(
            x.case, x.q[i : i + 1], x.k_cache, x.block_table[i : i + 1], x.cache_seqlens[i : i + 1]
        )
        plan = flashmla.get_mla_metadata(alone.cache_seqlens, 16, 1, batch_invariant=True)
        alone_out, alone_lse = decode(alone, plan)
        assert_identical("out", alone_out, out[i : i + 1])
        assert_identical("lse", alone_lse, lse[i : i + 1])


def test_a_graph_follows_lengths_and_plan() -> None:
    x = named("fp8_causal").build(DEVICE)
    plan = plan_for(x)
    decode(x, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_for_now = flashmla.get_mla_metadata(x.cache_seqlens, 2 * 16, 1, out=plan)
        out, lse = decode(x, plan_for_now)
    lengths = x.cache_seqlens.clone()
    for less in (0, 1, 63):
        x.cache_seqlens.copy_((lengths - less).clamp(min=0))
        graph.replay()
        want_out, want_lse = x.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_the_same_as_sparse_decode_over_all_tokens() -> None:
    """One oracle more: every position named by an index."""
    x = DecodeCase("fp8_all", (700, 64, 1), 1, 128, fp8=True, seed=1702).build(DEVICE)
    page, longest = x.case.page, 704
    position = torch.arange(longest, device=DEVICE)
    blocks = x.block_table.long().clamp(0, x.k_cache.shape[0] - 1)[:, position // page]
    indices = (blocks * page + position % page).int().unsqueeze(1)
    out, lse = decode(x)
    with backend.use_backend("cuda"):
        want_out, want_lse = flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, None, None, 512, None, softmax_scale=x.scale, is_fp8_kvcache=True,
            indices=indices, topk_length=x.cache_seqlens,
        )  # fmt: skip
    assert_out_close(out, want_out.double().cpu().numpy())
    assert_lse_close(lse, want_lse.double().cpu().numpy())


def test_a_wrong_block_number_reads_nothing_outside_the_cache() -> None:
    """Within the length it is the caller's mistake: other requests are right all the same."""
    x = named("fp8").build(DEVICE)
    want_out, _ = decode(x)
    bad = len(x.case.lengths) - 1
    x.block_table[bad, 0] = 2_000_000_000
    x.block_table[bad, 1] = -5
    out, _ = decode(x)
    assert_identical("out", out[:bad], want_out[:bad])
