"""The Triton tier's token caches against the oracle, in Triton's interpreter."""

import pytest
import torch
from cases import DENSE_FP8_CASES, case_id

pytest.importorskip("triton")

import fp8_bodies as bodies  # noqa: E402
from triton_bodies import check_dense_decode_fp8  # noqa: E402
from triton_worker import interpreted  # noqa: E402


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
def test_pack(dtype, power_of_two):
    # The interpreter takes bfloat16's denormals for zeros; a card does not.
    denormals = dtype != torch.bfloat16
    interpreted(bodies.check_pack, "triton", dtype, power_of_two, "cpu", denormals)


def test_unpack():
    interpreted(bodies.check_unpack, "triton")


@pytest.mark.parametrize(
    ("dtype", "page", "slot_dtype"),
    [
        (torch.bfloat16, 64, torch.int32),
        (torch.float16, 1, torch.int64),
        (torch.float32, 3, torch.int64),
    ],
)
def test_append(dtype, page, slot_dtype):
    interpreted(bodies.check_append, "triton", dtype, page, 13, slot_dtype)


@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
@pytest.mark.parametrize(("page", "heads", "d"), [(64, 1, 576), (1, 3, 5), (7, 16, 128)])
def test_paged_append(dtype, page, heads, d):
    interpreted(bodies.check_paged_append, "triton", dtype, page, heads, d)


@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
def test_the_indexers_cache(dtype):
    denormals = dtype != torch.bfloat16
    interpreted(bodies.check_index_pack, "triton", dtype, denormals, "cpu", denormals)
    interpreted(bodies.check_index_append, "triton", dtype, 13, torch.int64)


@pytest.mark.parametrize("case", DENSE_FP8_CASES, ids=case_id)
def test_dense_decode(case):
    interpreted(check_dense_decode_fp8, case)
