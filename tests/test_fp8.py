"""flashmla.fp8 as a public module: shapes, dtypes, bad input."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import to_numpy

import flashmla
from flashmla import fp8
from flashmla.lab.check import compare
from flashmla.reference import fp8 as reference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_pack_and_unpack_keep_the_leading_dimensions(lead, power_of_two):
    x = torch.randn(*lead, 576).bfloat16()
    packed = fp8.pack(x, power_of_two)
    assert packed.shape == (*lead, 656) and packed.dtype == torch.uint8
    values = fp8.unpack(packed)
    assert values.shape == x.shape and values.dtype == torch.float32
    want = reference.quantise_dequantise(to_numpy(x), power_of_two)
    np.testing.assert_array_equal(values.numpy(), want)
    assert torch.equal(values[..., 512:], x[..., 512:].float())


def test_the_error_is_that_of_three_bits_of_mantissa():
    x = torch.randn(200, 576)
    largest = x[:, :512].unflatten(1, (4, 128)).abs().amax(-1, keepdim=True).expand(-1, -1, 128)
    for power_of_two, step in ((True, 2.0), (False, 1.0)):
        error = (fp8.unpack(fp8.pack(x, power_of_two)) - x)[:, :512].abs()
        bound = (x[:, :512].abs() / 16).clamp(min=0) + step * largest.flatten(1) / 448 / 2**10
        assert (error <= bound).all()


def test_packed_slices_and_other_byte_dtypes():
    x = torch.randn(6, 600)[:, 8:584]
    packed = fp8.pack(x)
    np.testing.assert_array_equal(packed.numpy(), reference.pack(x.numpy()))
    wide = torch.zeros(6, 700, dtype=torch.uint8)
    wide[:, 16:672] = packed
    for dtype in fp8.CACHE_DTYPES:
        assert torch.equal(fp8.unpack(wide[:, 16:672].view(dtype)), fp8.unpack(packed))


@pytest.mark.parametrize("dtype", fp8.CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_append_into_a_slice_of_a_larger_cache(dtype, slot_dtype):
    whole = torch.full((4, 2, 8, 1, 656), 9, dtype=torch.uint8)
    x = torch.randn(3, 576)
    assert (
        fp8.append(whole[:, 1].view(dtype), torch.tensor([31, -1, 8], dtype=slot_dtype), x) is None
    )
    want = np.full((4, 2, 8, 1, 656), 9, np.uint8)
    want[3, 1, 7, 0], want[1, 1, 0, 0] = reference.pack(x.numpy())[[0, 2]]
    np.testing.assert_array_equal(whole.numpy(), want)


def test_a_tile_with_nan_or_infinity_is_nan_and_its_neighbours_are_not():
    x = torch.randn(1, 576)
    x[0, 0], x[0, 200], x[0, 520], x[0, 530] = -NAN, -INF, -NAN, -INF
    packed = fp8.pack(x)
    values = fp8.unpack(packed)[0]
    assert values[:256].isnan().all() and not values[256:520].isnan().any()
    assert (packed[0, :256] == 0x7F).all()
    assert packed.view(torch.int32)[0, 128:130].tolist() == [0x7FC00000] * 2
    assert packed.view(torch.int16)[0, 264 + 8].item() == 0x7FC0 and values[530] == -INF


def test_packing_again_what_was_unpacked_changes_nothing():
    packed = fp8.pack(torch.randn(50, 576))
    assert torch.equal(fp8.pack(fp8.unpack(packed)), packed)


INDEX_CACHE, KEYS = torch.zeros(2, 64, 1, 132, dtype=torch.uint8), torch.zeros(2, 128)
PLAIN = torch.zeros(2, 4, 1, 576)
CACHE = torch.zeros(2, 4, 1, 656, dtype=torch.uint8)
SLOTS, X = torch.tensor([0, 1]), torch.zeros(2, 576)
BAD = [
    (fp8.pack, ([1],), TypeError, r"x must be a torch.Tensor \[..., 576], got list"),
    (fp8.pack, (X[:, :512],), ValueError, r"x must have shape \[..., 576], got \[2, 512]"),
    (fp8.pack, (X.double(),), TypeError, "x must be of dtype bfloat16 or float16 or float32, got"),
    (fp8.pack, (X, 1), TypeError, "power_of_two must be True or False, got int 1"),
    (fp8.pack, (X.T.contiguous().T,), ValueError, "x must be contiguous in its last dimension"),
    (fp8.unpack, (X,), ValueError, r"cache must have shape \[..., 656], got \[2, 576]"),
    (
        fp8.unpack,
        (CACHE.float(),),
        TypeError,
        "cache must be of dtype float8_e4m3fn or uint8 or int8",
    ),
    (fp8.append, (CACHE[0], SLOTS, X), ValueError, "cache must have 4 dimensions"),
    (fp8.append, (CACHE.expand(2, 4, 2, 656), SLOTS, X), ValueError, r"\[any, any, 1, 656], got"),
    (fp8.append, (CACHE, SLOTS.float(), X), TypeError, "slots must be of dtype int32 or int64"),
    (
        fp8.append,
        (CACHE, SLOTS[:1], X),
        ValueError,
        r"x must have shape \[n, 576] = \[1, 576], got",
    ),
    (fp8.append, (CACHE, SLOTS, X.to("meta")), ValueError, "x must be on cpu"),
    (fp8.index_pack, (X,), ValueError, r"x must have shape \[..., 128], got \[2, 576]"),
    (
        fp8.index_append,
        (CACHE, SLOTS, KEYS),
        ValueError,
        r"cache must have shape \[blocks, 64, 1, 132] = \[any, 64, 1, 132], got \[2, 4, 1, 656]",
    ),
    (
        fp8.index_append,
        (INDEX_CACHE, SLOTS, X),
        ValueError,
        r"x must have shape \[n, 128] = \[2, 128], got \[2, 576]",
    ),
    (fp8.index_append, (INDEX_CACHE, SLOTS.short(), KEYS), TypeError, "slots must be of dtype int"),
    (
        fp8.index_append,
        (torch.zeros(64, 2, 1, 132).byte().transpose(0, 1), SLOTS, KEYS),
        ValueError,
        "must be contiguous within a page",
    ),
    (fp8.rotate, (torch.zeros(2, 96),), ValueError, "x must have a power of two as its last dim"),
    (fp8.rotate, (torch.zeros(2, 4).int(),), TypeError, "x must be of dtype bfloat16 or float16"),
    (fp8.rotate, (None,), TypeError, r"x must be a torch.Tensor \[..., d], got NoneType"),
    (
        flashmla.paged_append,
        (PLAIN, SLOTS, X),
        ValueError,
        r"x must have 3 dimensions \[n, h_kv, d], got 2",
    ),
    (
        flashmla.paged_append,
        (PLAIN, SLOTS, X.unsqueeze(1).half()),
        TypeError,
        "x must be of dtype float32, got float16",
    ),
    (
        flashmla.paged_append,
        (PLAIN, SLOTS, torch.zeros(2, 2, 288)),
        ValueError,
        r"x must have shape \[n, h_kv, d] = \[2, 1, 576], got \[2, 2, 288]",
    ),
    (
        flashmla.paged_append,
        (torch.zeros(4, 2, 1, 576).transpose(0, 1), SLOTS, X.unsqueeze(1)),
        ValueError,
        "must be contiguous within a page",
    ),
    (
        flashmla.paged_append,
        (PLAIN.double(), SLOTS, X.unsqueeze(1)),
        TypeError,
        "cache must be of dtype bfloat16 or float16 or float32, got float64",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("d", [1, 2, 64, 128])
def test_rotate_is_the_oracles_and_its_own_inverse(d):
    x = torch.randn(3, 5, d)
    rotated = fp8.rotate(x)
    want = x.double().numpy() @ reference.hadamard(d)
    np.testing.assert_allclose(rotated.numpy(), want, rtol=0, atol=5e-6)
    np.testing.assert_allclose(fp8.rotate(rotated).numpy(), x.numpy(), rtol=0, atol=5e-6)


def test_rotation_keeps_dot_products_and_averages_errors():
    q, k = torch.randn(20, 128), torch.randn(30, 128)
    q[:, 5] *= 100
    k[:, 5] *= 100
    rotated_q, rotated_k = fp8.rotate(q), fp8.rotate(k)
    torch.testing.assert_close(rotated_q @ rotated_k.T, q @ k.T, rtol=1e-4, atol=1e-2)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        codes, scales = zip(fp8.index_pack(a), fp8.index_pack(b), strict=True)
        dots = codes[0].float() @ codes[1].float().T * scales[0][:, None] * scales[1]
        return (dots - q @ k.T).pow(2).mean().item()

    assert error(rotated_q, rotated_k) < error(q, k) / 10


def test_rotate_gives_gradients_after_inference_mode():
    fp8._rotations.clear()
    with torch.inference_mode():
        fp8.rotate(torch.ones(8))
    x = torch.ones(8, requires_grad=True)
    fp8.rotate(x)[0].backward()
    np.testing.assert_allclose(x.grad.numpy(), np.full(8, 8**-0.5), rtol=1e-6)


def test_what_is_appended_is_what_the_indexer_reads():
    cache = torch.zeros(3, 64, 1, 132, dtype=torch.uint8)
    keys = torch.randn(130, 128).bfloat16()
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    places = torch.arange(130)
    fp8.index_append(cache, table[0, places // 64] * 64 + places % 64, keys)
    q, q_scale = fp8.index_pack(torch.randn(1, 1, 4, 128))
    weights, lengths = q_scale * torch.rand(1, 1, 4), torch.tensor([130], dtype=torch.int32)
    paged = flashmla.indexer_logits_paged(q, cache, weights, table, lengths)[0, :, :130]
    end = torch.tensor([130], dtype=torch.int32)
    want = flashmla.indexer_logits(q[0], *fp8.index_pack(keys), weights[0], 0 * end, end)
    assert torch.equal(paged, want) and want.abs().max() > 0.1


def test_slots_are_checked_when_asked_for(monkeypatch):
    plain, rows = torch.zeros(2, 4, 1, 576), X.unsqueeze(1)
    bad = [
        ([8, 0], r"slots\[0] is 8, but a slot \(negative .*\) must be from -1 to 7"),
        ([3, 3], r"slots\[1] is 3, as slots\[0] is: slots must differ"),
    ]
    for slots, message in bad:
        for value in ("0", "1"):
            monkeypatch.setenv("FLASHMLA_CHECK", value)
            for append, cache, x in ((fp8.append, CACHE, X), (flashmla.paged_append, plain, rows)):
                with pytest.raises(ValueError, match=message) if value == "1" else nullcontext():
                    append(cache.clone(), torch.tensor(slots), x)
    fp8.append(CACHE.clone(), torch.tensor([7, -9]), X)
    many = torch.tensor([5, -2, 0, -2, 7, 0, 5])
    with pytest.raises(ValueError, match=r"slots\[5] is 0, as slots\[2] is"):
        fp8.append(CACHE.clone(), many, torch.zeros(7, 576))


def test_values_to_pack_are_checked_when_asked_for(monkeypatch):
    x = torch.zeros(3, 576)
    x[1, 570], x[2, 5] = float("inf"), float("nan")
    fp8.pack(x)
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    message = r"x\[1, 570] is inf, but what is quantised must be finite \(2 such values\)"
    with pytest.raises(ValueError, match=message):
        fp8.pack(x)
    with pytest.raises(ValueError, match=message):
        fp8.append(CACHE.clone(), torch.tensor([0, 1, 2]), x)
    fp8.pack(x[:1])
    with pytest.raises(ValueError, match=r"x\[2, 5] is nan, but what is quantised"):
        fp8.index_pack(x[:, :128])
    with pytest.raises(ValueError, match=r"x\[2, 5] is nan, but what is quantised"):
        fp8.index_append(INDEX_CACHE.clone(), torch.tensor([0, 1, 2]), x[:, :128])


def test_error_of_the_format_on_attention_like_values():
    """The loose bound: against what was there before quantisation."""
    x = torch.randn(64, 576)
    got = fp8.unpack(fp8.pack(x))
    compare("values", got, x, abs_tol=4.0 / 448 / 8, rel_tol=1 / 16 + 1e-6, cos_tol=1e-3)
