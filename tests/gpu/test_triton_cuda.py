"""The Triton tier compiled for the card at hand: the bodies that the interpreter runs elsewhere."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DECODE_CASES,
    DENSE_FP8_CASES,
    PREFILL_CASES,
    SPARSE_DECODE_CASES,
    SPARSE_PREFILL_CASES,
    case_id,
    large_decode_cases,
)

pytestmark = pytest.mark.gpu
triton_bodies = pytest.importorskip("triton_bodies")
DEVICE = "cuda"
LARGE = [c for c in large_decode_cases() if c.name in {"h128_sq2_float16", "gqa_2", "b32_varied"}]


@pytest.mark.parametrize("case", [*DECODE_CASES, *LARGE], ids=case_id)
def test_decode(case) -> None:
    triton_bodies.check_decode(case, DEVICE)


@pytest.mark.parametrize("case", DECODE_CASES[:2], ids=case_id)
def test_decode_bit_for_bit(case) -> None:
    triton_bodies.check_decode_is_bitwise_stable(case, DEVICE)


@pytest.mark.parametrize("case", PREFILL_CASES, ids=case_id)
def test_prefill(case) -> None:
    triton_bodies.check_prefill(case, DEVICE)


@pytest.mark.parametrize("parts", [1, 7, 132])
def test_plan(parts: int) -> None:
    triton_bodies.check_plan([0, 1, 63, 64, 65, 5000, 0, 131072, 7], parts, DEVICE)
    triton_bodies.check_plan([4096, 4000, 4200], parts, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge(dtype: torch.dtype) -> None:
    triton_bodies.check_merge(512, dtype, DEVICE)


def test_combine() -> None:
    triton_bodies.check_combine(DEVICE)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES, ids=case_id)
def test_sparse_decode(case) -> None:
    triton_bodies.check_sparse_decode(case, DEVICE)


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES, ids=case_id)
def test_sparse_prefill(case) -> None:
    triton_bodies.check_sparse_prefill(case, DEVICE)


@pytest.mark.parametrize("case", DENSE_FP8_CASES, ids=case_id)
def test_dense_decode_over_the_fp8_cache(case) -> None:
    triton_bodies.check_dense_decode_fp8(case, DEVICE)


@pytest.mark.parametrize(("lengths", "table"), [(False, False), (True, True)])
@pytest.mark.parametrize(("n", "k"), [(200, 1), (200, 300), (2049, 700), (70_000, 2048)])
def test_topk(n: int, k: int, lengths: bool, table: bool) -> None:
    triton_bodies.check_topk(n, k, lengths, table, DEVICE)
