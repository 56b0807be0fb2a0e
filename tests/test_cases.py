"""The cases themselves: that their poison is where it should be, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    DECODE_CASES,
    DENSE_FP8_CASES,
    PREFILL_CASES,
    SPARSE_DECODE_CASES,
    SPARSE_PREFILL_CASES,
    WILD,
    case_id,
    large_decode_cases,
    large_dense_fp8_cases,
    to_numpy,
)

from flashmla.lab.check import assert_identical
from flashmla.reference import fp8

ALL = (*DECODE_CASES, *DENSE_FP8_CASES, *SPARSE_DECODE_CASES, *SPARSE_PREFILL_CASES, *PREFILL_CASES)


@pytest.mark.parametrize("case", [*DECODE_CASES, *DENSE_FP8_CASES], ids=case_id)
def test_all_of_the_cache_that_is_not_in_use_is_nan(case):
    inputs = case.build()
    used = torch.zeros(inputs.k_cache.shape[:2], dtype=torch.bool)
    for i, length in enumerate(case.lengths):
        for t in range(length):
            used[inputs.block_table[i, t // case.page], t % case.page] = True
        behind = inputs.block_table[i, -(-length // case.page) :]
        assert len(behind) >= 2 and (behind == WILD).all()
    values = inputs.k_cache
    if case.fp8:
        values = torch.from_numpy(fp8.unpack(to_numpy(inputs.k_cache)))
    assert not values[used].isnan().any() and values[~used].isnan().all()
    assert (~used).any() and not inputs.q.isnan().any()
    assert inputs.cache_seqlens.tolist() == list(case.lengths)
    if case.strided:
        assert inputs.q._base.isnan().any()
        assert inputs.k_cache.stride(0) == 2 * inputs.k_cache[0].numel()
        beside = inputs.k_cache._base[:, 0]
        assert (beside == 255).all() if case.fp8 else beside.isnan().all()
    assert inputs.q.stride(-1) == inputs.k_cache.stride(-1) == 1


def test_the_list_has_the_lengths_where_kernels_break():
    lengths = {length for case in DECODE_CASES for length in case.lengths}
    assert {0, 1, 63, 64, 65, 127, 128, 129} <= lengths and max(lengths) > 1024
    assert any(case.s_q > max(1, min(case.lengths)) and case.causal for case in DECODE_CASES)
    assert {case.dtype for case in DECODE_CASES} == {torch.bfloat16, torch.float16}
    assert {case.page for case in large_decode_cases()} == {16, 32, 64, 128, 256}


@pytest.mark.parametrize(
    "cases", [ALL, [*large_decode_cases(), *large_dense_fp8_cases()]], ids=["small", "large"]
)
def test_names_are_unique(cases):
    names = [(type(case), case.name) for case in cases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{type(case).__name__}-{case.name}")
def test_a_case_builds_the_same_each_time_and_its_answer_is_no_nan(case):
    first, second = case.build(), case.build()
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            again = getattr(second, name)
            assert value.stride() == again.stride()
            assert_identical(name, value, again)
    for answer in first.expected():
        assert answer.dtype == np.float64 and not np.isnan(answer).any()


def test_strides_survive_the_move_to_a_device():
    inputs = DECODE_CASES[0].build()
    elsewhere = DECODE_CASES[0].build("meta")
    for name in ("q", "k_cache"):
        here, there = getattr(inputs, name), getattr(elsewhere, name)
        assert there.device.type == "meta" and there.shape == here.shape
        assert there.stride() == here.stride() and there.storage_offset() == here.storage_offset()


def test_a_shared_prefix_is_shared():
    case = next(case for case in DECODE_CASES if case.shared_prefix_pages)
    table = case.build().block_table
    sharing = [i for i, length in enumerate(case.lengths) if length >= case.page]
    assert len(sharing) > 1 and len(set(table[sharing, 0].tolist())) == 1
    assert len(set(table[table != WILD].tolist())) == sum(
        -(-length // case.page) for length in case.lengths
    ) - (len(sharing) - 1)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES, ids=case_id)
def test_sparse_decode_poisons_what_no_valid_index_points_to(case):
    inputs = case.build()
    n = case.blocks * case.page
    cache = to_numpy(inputs.k_cache).reshape(n, -1)
    values = fp8.unpack(cache) if case.fp8 else cache.astype(np.float64)
    poisoned = np.isnan(values).all(axis=1)
    assert poisoned.sum() == n - n * 3 // 4 and (np.isnan(values).any(axis=1) == poisoned).all()
    lengths = np.full((case.b, case.s_q), case.topk)
    if inputs.topk_length is not None:
        lengths[:] = to_numpy(inputs.topk_length).reshape(case.b, -1)
    behind = np.arange(case.topk) >= lengths[..., None]
    indices = to_numpy(inputs.indices)
    valid = (indices >= 0) & (indices < n)
    assert not poisoned[indices[valid & ~behind]].any()
    if behind.any():
        assert poisoned[indices[valid & behind]].all() and (valid & behind).any()
    assert valid.all() if case.invalid == 0 and not behind.any() else not valid.all()


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES, ids=case_id)
def test_sparse_prefill_poisons_what_no_valid_index_points_to(case):
    inputs = case.build()
    poisoned = inputs.kv.isnan().all(dim=-1)[:, 0].numpy()
    indices = to_numpy(inputs.indices)[:, 0]
    lengths = np.full(case.s_q, case.topk) if case.topk_length is None else case.topk_length
    valid = (indices >= 0) & (indices < case.s_kv)
    before = np.arange(case.topk) < np.reshape(lengths, (-1, 1))
    assert not poisoned[indices[valid & before]].any()
    assert poisoned.any() or case.s_kv == 1
    assert inputs.kv._base.isnan().any() and inputs.kv.stride(-1) == 1
