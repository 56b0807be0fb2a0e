"""The torch tier's FP8 format against the oracle's, byte for byte."""

from __future__ import annotations

import fp8_bodies as bodies
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import DENSE_FP8_CASES, DecodeCase, case_id, to_numpy

from flashmla import fp8
from flashmla.lab.check import assert_lse_close, assert_out_close
from flashmla.reference import fp8 as reference
from flashmla.torch import fp8 as tier
from flashmla.torch import mla, split_kv

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tokens(dtype):
    """Values of every size, tiles of zeros, and tiles whose scale is just at a power of two."""
    x = torch.randn(40, 576) * torch.logspace(-4, 3, 40).unsqueeze(1)
    x[0] = 0
    x[1, :128] = 1e-5
    x[2, :512] = 448.0
    x[3, :512] = 448.0 * (1 + 2**-7)
    x[4, :512] = 447.0
    x[5, 0] = -3e4
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_is_the_oracles(dtype, power_of_two):
    x = tokens(dtype)
    want = reference.pack(to_numpy(x), power_of_two)
    np.testing.assert_array_equal(tier.pack(x, power_of_two).numpy(), want)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_of_rows_that_are_hard_to_round(dtype, power_of_two):
    bodies.check_pack("torch", dtype, power_of_two)


def test_unpack_of_every_code_under_any_scale():
    bodies.check_unpack("torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page", "heads", "d"), [(64, 1, 576), (1, 3, 5)])
def test_paged_append(dtype, page, heads, d):
    bodies.check_append("torch", dtype, page, 13, torch.int64)
    bodies.check_paged_append("torch", dtype, page, heads, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_indexers_cache(dtype):
    bodies.check_index_pack("torch", dtype, True)
    bodies.check_index_pack("torch", dtype, False)
    bodies.check_index_append("torch", dtype, 77, torch.int64)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_unpack_is_the_oracles(power_of_two):
    cache = tier.pack(tokens(torch.float32), power_of_two)
    np.testing.assert_array_equal(tier.unpack(cache).numpy(), reference.unpack(cache.numpy()))


def test_every_code():
    cache = torch.zeros(256, 656, dtype=torch.uint8)
    cache[:, :512] = torch.arange(256).unsqueeze(1)
    scales = torch.tensor([1.0, 2.0**-20, 3.7, 1e30])
    cache[:, 512:528] = scales.view(torch.uint8)
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = tier.unpack(cache)[:, [0, 128, 256, 384]].numpy()
    np.testing.assert_array_equal(got, codes[:, None] * scales.numpy())


def test_rounding_up_to_a_power_of_two_is_exact():
    exact = torch.ldexp(torch.ones(200), torch.arange(-100, 100))
    above = torch.nextafter(exact, torch.tensor(float("inf")))
    assert torch.equal(tier._round_up_to_power_of_two(exact), exact)
    assert torch.equal(tier._round_up_to_power_of_two(above), 2 * exact)


def test_append_writes_only_its_slots():
    cache = torch.full((3, 8, 1, 656), 7, dtype=torch.uint8)
    x = tokens(torch.bfloat16)[:6]
    slots = torch.tensor([0, 23, -1, 9, 24, -7])
    want = cache.numpy().copy()
    reference.append(want, [0, 23, -1, 9, -1, -1], to_numpy(x))
    tier.append(cache, slots, x)
    np.testing.assert_array_equal(cache.numpy(), want)


def test_constants_say_what_the_oracle_says():
    assert fp8.BYTES_PER_TOKEN == reference.TOKEN_BYTES == 656
    assert (fp8.SCALES_OFFSET, fp8.ROPE_OFFSET) == (reference.SCALES_AT, reference.ROPE_AT)


@pytest.mark.parametrize(("parts", "batch_invariant"), [(132, False), (3, False), (7, True)])
@pytest.mark.parametrize("case", DENSE_FP8_CASES, ids=case_id)
def test_dense_decode(case, parts, batch_invariant):
    x = case.build()
    plan = split_kv.get_metadata(x.cache_seqlens, parts, batch_invariant)
    out, lse = tier.dense_decode(
        x.q, x.k_cache, x.block_table, x.cache_seqlens, 512, *plan, x.scale, case.causal,
        x.attn_sink,
    )  # fmt: skip
    want_out, want_lse = x.expected()
    assert out.dtype == case.dtype and out.is_contiguous() and lse.is_contiguous()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_dense_decode_is_that_of_the_values_to_the_bit():
    """Nothing but the conversion stands between the two, and it is exact to float32."""
    x = DecodeCase("values", (65, 3, 200), 2, 8, causal=True, fp8=True, strided=False).build()
    plan = split_kv.get_metadata(x.cache_seqlens, 5)
    arguments = (x.block_table, x.cache_seqlens, 512, *plan, x.scale, True)
    got = tier.dense_decode(x.q, x.k_cache, *arguments)
    want = mla.dense_decode(x.q, tier.unpack(x.k_cache), *arguments)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
