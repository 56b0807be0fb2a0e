"""The FP8 format bit by bit: codes, ties, clamp, scales and the byte map."""

from __future__ import annotations

import dataclasses
import struct

import ml_dtypes
import numpy as np
import pytest
from cases import DENSE_FP8_CASES, DecodeCase, case_id, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla.reference import fp8, mha

E4M3 = ml_dtypes.float8_e4m3fn


def code_value(code):
    """What an e4m3 code is worth, from its sign, exponent and mantissa bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


FINITE = [code for code in range(256) if code & 0x7F != 0x7F]
POSITIVE = [code_value(code) for code in range(0x7F)]  # 0 to 448, ascending


def nearest_code(quotient):
    """The code nearest to a real number, of two equally near the one with an even last bit."""
    size = min(abs(float(quotient)), 448.0)
    code = min(range(0x7F), key=lambda c: (abs(POSITIVE[c] - size), c & 1))
    return code | (0x80 if np.signbit(quotient) else 0)


def row(nope, rope=0.0):
    """A token [576] whose NoPE part starts with the values given and is 0 behind them."""
    x = np.zeros(576, np.float32)
    x[: len(nope)] = nope
    x[512:] = rope
    return x


def test_all_finite_codes_are_worth_what_their_bits_say():
    assert len(FINITE) == 254
    token = np.zeros(656, np.uint8)
    token[512:528] = np.frombuffer(np.float32([1, 1, 1, 1]).tobytes(), np.uint8)
    token[:254] = FINITE
    values = fp8.unpack(token)
    np.testing.assert_array_equal(values[:254], [code_value(code) for code in FINITE])
    np.testing.assert_array_equal(np.signbit(values[:254]), [code >= 0x80 for code in FINITE])


def test_nan_codes_stay_nan():
    token = np.zeros(656, np.uint8)
    token[512:528] = np.frombuffer(np.float32([1, 1, 1, 1]).tobytes(), np.uint8)
    token[[3, 200]] = 0x7F, 0xFF
    assert np.flatnonzero(np.isnan(fp8.unpack(token))).tolist() == [3, 200]


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5, 30])
def test_all_finite_codes_survive_a_round_trip(exponent):
    values = np.array([code_value(code) for code in FINITE], np.float64) * 2.0**exponent
    for codes in (slice(0, 127), slice(127, 254)):  # each has a 448, so the scale is 2^exponent
        half = values[codes]
        token = fp8.pack(row(half))
        assert token[:127].tolist() == FINITE[codes]
        assert token[512:516].view(np.float32)[0] == 2.0**exponent
        np.testing.assert_array_equal(fp8.unpack(token)[:127], half)


def test_ties_go_to_the_even_code():
    middles = [(a + b) / 2 for a, b in zip(POSITIVE[:-1], POSITIVE[1:], strict=True)]
    token = fp8.pack(row([*middles, 448.0]))
    want = [code + (code & 1) for code in range(126)]
    assert token[:126].tolist() == want
    token = fp8.pack(row([*(-m for m in middles), 448.0]))
    assert token[:126].tolist() == [code | 0x80 for code in want]


def test_a_float32_step_off_a_tie_goes_to_the_nearer_code():
    middles = np.float32([(a + b) / 2 for a, b in zip(POSITIVE[:-1], POSITIVE[1:], strict=True)])
    below = fp8.pack(row([*np.nextafter(middles, np.float32(0)), 448.0]))
    above = fp8.pack(row([*np.nextafter(middles, np.float32(1e9)), 448.0]))
    assert below[:126].tolist() == list(range(126))
    assert above[:126].tolist() == list(range(1, 127))


def test_float64_is_rounded_to_float32_before_anything_else():
    # Just above the tie between 1 and 1.125 in float64, on it in float32: the even code wins.
    token = fp8.pack(np.float64([*row([1.0625, 448.0])]) + np.float64([1e-12] + [0.0] * 575))
    assert fp8.unpack(token)[0] == 1.0


@given(st.integers(0, 2**16), st.floats(-12, 12), st.booleans())
@settings(max_examples=25, deadline=None)
def test_codes_are_the_nearest_to_the_float32_quotient(seed, log_size, power_of_two):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=128) * np.exp(rng.normal(size=128) * 2) * 10.0**log_size).astype(
        np.float32
    )
    token = fp8.pack(row(x), power_of_two)
    scale = token[512:516].view(np.float32)[0]
    amax = np.maximum(np.abs(x).max(), np.float32(1e-4))
    assert scale == amax / np.float32(448) or power_of_two
    assert 1 <= scale / (amax / np.float32(448)) < 2
    assert token[:128].tolist() == [nearest_code(q) for q in x / scale]


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_largest_value_never_becomes_nan(seed, power_of_two):
    x = np.random.default_rng(seed).uniform(0.1, 1000.0, (500, 512)).astype(np.float32)
    token = fp8.pack(np.concatenate([x, x[:, :64]], axis=1), power_of_two)
    codes = token[:, :512].reshape(500, 4, 128)
    assert (codes <= 0x7E).all()
    if not power_of_two:  # a quotient may come out above 448: it is clamped
        assert (codes.max(axis=-1) == 0x7E).all()


def test_the_cast_clamps_what_is_beyond_448():
    x = np.float32([448.0, 449.0, 464.0, 465.0, 1e30, np.inf])
    assert (fp8.to_e4m3(x).view(np.uint8) == 0x7E).all()
    assert (fp8.to_e4m3(-x).view(np.uint8) == 0xFE).all()


def test_quotients_are_true_divisions():
    """Around ties, where a product with the reciprocal would go the other way."""
    middles = np.array([(a + b) / 2 for a, b in zip(POSITIVE[:-1], POSITIVE[1:], strict=True)])
    other_way = 0
    for amax in np.float32([1.0, 3.3, 0.77, 123.4, 5e4, 0.012]):
        scale = amax / np.float32(448)
        x = (middles * float(scale)).astype(np.float32)
        x = np.minimum(np.concatenate([x, np.nextafter(x, 0), np.nextafter(x, amax)]), amax)
        tokens = [fp8.pack(row([*part, amax]), power_of_two=False) for part in np.split(x, 3)]
        got = np.concatenate([token[:126] for token in tokens]).tolist()
        assert got == [nearest_code(q) for q in x / scale]
        other_way += sum(
            code != nearest_code(q) for code, q in zip(got, x * (1 / scale), strict=True)
        )
    assert other_way > 0


@pytest.mark.parametrize("exponent", range(-40, 60, 7))
def test_rounding_up_to_a_power_of_two_is_exact(exponent):
    power = np.float32(2.0**exponent)
    above, below = np.nextafter(power, np.float32(np.inf)), np.nextafter(power, np.float32(0))
    got = fp8.round_up_to_power_of_two(np.array([below, power, above]))
    assert got.dtype == np.float32
    assert got.tolist() == [power, power, 2 * power]


def test_the_scale_of_a_tile_of_zeros_is_that_of_1e_4():
    x = row([])
    assert fp8.pack(x)[512:528].view(np.float32).tolist() == [2.0**-22] * 4
    smallest = np.float32(1e-4) / np.float32(448)
    assert fp8.pack(x, False)[512:528].view(np.float32).tolist() == [smallest] * 4
    np.testing.assert_array_equal(fp8.quantise_dequantise(x), 0.0)


def test_each_tile_has_its_own_scale():
    x = np.zeros(576)
    x[[0, 128, 256, 384]] = 448.0, 896.0, 449.0, -1.75
    assert fp8.pack(x)[512:528].view(np.float32).tolist() == [1.0, 2.0, 2.0, 2.0**-8]


def test_the_byte_map():
    x = np.arange(576, dtype=np.float64) - 288
    x[512:] = np.arange(64) - 32
    token = bytes(fp8.pack(x))
    assert len(token) == 656
    scales = struct.unpack("<4f", token[512:528])
    rope = struct.unpack("<64H", token[528:])
    assert scales == (1.0, 0.5, 0.25, 0.5)  # of 288, 160, 95 and 223
    for i in (0, 127, 128, 255, 300, 511):
        assert token[i] == nearest_code(x[i] / scales[i // 128])
    for i in range(64):  # a bfloat16 is the upper half of a float32: these fit without rounding
        assert struct.unpack("<f", struct.pack("<I", rope[i] << 16))[0] == x[512 + i]


def test_rope_is_rounded_to_bfloat16_and_not_quantised():
    x = np.random.default_rng(0).normal(0, 100.0, (20, 576)).astype(np.float32)
    values = fp8.quantise_dequantise(x)
    np.testing.assert_array_equal(values[:, 512:], x[:, 512:].astype(ml_dtypes.bfloat16))
    assert values.dtype == np.float32


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_error_is_at_most_half_a_step(power_of_two):
    x = np.random.default_rng(1).normal(0, 3.0, (50, 576)).astype(np.float32)
    error = np.abs(fp8.quantise_dequantise(x, power_of_two) - x)[:, :512]
    scales = fp8.pack(x, power_of_two)[:, 512:528].copy().view(np.float32)
    smallest_step = np.repeat(scales, 128, axis=1) * 2.0**-9
    assert (error <= np.maximum(np.abs(x[:, :512]) / 16, smallest_step / 2) * 1.000001).all()
    assert error.max() > 0.01


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_dtype_packs_to_the_same_bytes(dtype):
    x = np.random.default_rng(2).normal(size=(3, 5, 576)).astype(ml_dtypes.bfloat16)
    x = np.where(np.abs(x.astype(float)) < 1e-3, 0, x).astype(dtype)  # exact in float16, too
    token = fp8.pack(x)
    assert token.shape == (3, 5, 656) and token.dtype == np.uint8
    np.testing.assert_array_equal(token, fp8.pack(x.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int8, E4M3])
def test_a_cache_of_any_one_byte_dtype_unpacks(dtype):
    token = fp8.pack(np.random.default_rng(3).normal(size=(4, 576)))
    np.testing.assert_array_equal(fp8.unpack(token.view(dtype)), fp8.unpack(token))


def test_any_positive_scale_is_legal_and_float64_is_exact():
    token = np.zeros(656, np.uint8)
    scale = np.float32(0.3)
    token[512:528] = np.frombuffer(np.full(4, scale).tobytes(), np.uint8)
    token[0] = 0x5B  # 22
    exact = 22.0 * float(scale)
    assert fp8.unpack(token, np.float64)[0] == exact
    assert fp8.unpack(token)[0] == np.float32(exact)


@pytest.mark.parametrize("dtype", [np.uint8, E4M3])
def test_append_writes_the_slots_and_drops_negative_ones(dtype):
    x = np.random.default_rng(4).normal(size=(4, 576))
    cache = np.full((3, 4, 1, 656), 255, np.uint8).view(dtype)
    fp8.append(cache, np.array([11, -1, 0, 5]), x)
    rows = cache.view(np.uint8).reshape(12, 656)
    np.testing.assert_array_equal(rows[[11, 0, 5]], fp8.pack(x[[0, 2, 3]]))
    assert (np.delete(rows, [11, 0, 5], axis=0) == 255).all()


@pytest.mark.parametrize("case", DENSE_FP8_CASES, ids=case_id)
def test_dense_decode_is_attention_over_each_token_s_values(case):
    inputs = case.build()
    out, lse = inputs.expected()
    assert np.isfinite(out).all() and not np.isnan(lse).any()
    cache, table = to_numpy(inputs.k_cache), to_numpy(inputs.block_table)
    for i, length in enumerate(case.lengths):
        kv = np.zeros((length, 1, 576))
        for t in range(length):
            token = cache[table[i, t // case.page], t % case.page, 0]
            scales = token[512:528].view(np.float32).astype(np.float64)
            kv[t, 0, :512] = token[:512].view(E4M3).astype(np.float64) * np.repeat(scales, 128)
            kv[t, 0, 512:] = token[528:].view(ml_dtypes.bfloat16)
        q = inputs.q[i].double().numpy()
        want_out, want_lse = mha.attention(q, kv, kv, case.scale, case.causal)
        if inputs.attn_sink is not None:
            want_out = mha.apply_sink(want_out, want_lse, inputs.attn_sink.numpy())
        np.testing.assert_allclose(out[i], want_out[..., :512], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse[i].T, want_lse, rtol=1e-12)


def test_two_oracles_of_dense_decode_differ_by_the_quantisation():
    """The values before packing and the values read back: close, and not the same."""
    case = DecodeCase("two", (100, 64), h_q=4, fp8=True, strided=False)
    read_back, unquantised = case.build(), dataclasses.replace(case, fp8=False).build()
    out, lse = read_back.expected()
    want_out, want_lse = unquantised.expected()
    assert 1e-3 < np.abs(out - want_out).max() < 0.02
    assert 1e-3 < np.abs(lse - want_lse).max() < 0.2
