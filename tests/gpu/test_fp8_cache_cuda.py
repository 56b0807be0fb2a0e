"""Writing and reading token caches on a Hopper card, byte for byte against the oracle."""

from __future__ import annotations

import fp8_bodies as bodies
import numpy as np
import pytest
import torch
from cases import to_numpy

import flashmla
from flashmla import backend, fp8
from flashmla.lab.check import assert_lse_close, assert_out_close, compare
from flashmla.reference import dsa
from flashmla.reference import fp8 as reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CARD_TIERS = ("cuda", "triton")


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
@pytest.mark.parametrize("tier", [*CARD_TIERS, "torch"])
def test_pack(tier, dtype, power_of_two):
    bodies.check_pack(tier, dtype, power_of_two, DEVICE)


@pytest.mark.parametrize("tier", [*CARD_TIERS, "torch"])
def test_unpack(tier):
    bodies.check_unpack(tier, DEVICE)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("page", "n"), [(64, 1), (64, 129), (1, 40), (3, 77), (1000, 300)])
@pytest.mark.parametrize("tier", CARD_TIERS)
def test_append(tier, page, n, slot_dtype):
    bodies.check_append(tier, torch.bfloat16, page, n, slot_dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tier", CARD_TIERS)
def test_append_of_other_dtypes(tier, dtype):
    bodies.check_append(tier, dtype, 64, 130, torch.int64, DEVICE)


@pytest.mark.parametrize("tier", CARD_TIERS)
def test_append_beyond_65535_tokens(tier):
    bodies.check_append(tier, torch.bfloat16, 64, 70_001, torch.int32, DEVICE)


@pytest.mark.parametrize(
    ("dtype", "heads", "d"),
    [
        (torch.bfloat16, 1, 576),
        (torch.float16, 4, 128),
        (torch.float32, 1, 576),
        (torch.bfloat16, 16, 576),
        (torch.float32, 1, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("tier", CARD_TIERS)
def test_paged_append(tier, dtype, heads, d):
    bodies.check_paged_append(tier, dtype, 64, heads, d, 200, DEVICE)
    bodies.check_paged_append(tier, dtype, 1, heads, d, 3, DEVICE)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
@pytest.mark.parametrize("tier", [*CARD_TIERS, "torch"])
def test_index_pack(tier, dtype, power_of_two):
    bodies.check_index_pack(tier, dtype, power_of_two, DEVICE)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 129, 70_001])
@pytest.mark.parametrize("tier", CARD_TIERS)
def test_index_append(tier, n, slot_dtype):
    bodies.check_index_append(tier, torch.bfloat16, n, slot_dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tier", CARD_TIERS)
def test_index_append_of_other_dtypes(tier, dtype):
    bodies.check_index_append(tier, dtype, 300, torch.int32, DEVICE)


@pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
def test_rotate(dtype):
    x = torch.randn(1000, 128).to(dtype)
    want = x.double().numpy() @ reference.hadamard(128)
    compare("rotated", fp8.rotate(x.to(DEVICE)), want, abs_tol=1e-5, rel_tol=2 * eps(dtype))


def eps(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps, 1e-5)


def test_a_graph_rotates_and_appends():
    """Captured with no rotation made before, replayed after its graph's tensors are gone."""
    fp8._rotations.clear()
    cache = torch.zeros(2, 64, 1, 132, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(5, 128, device=DEVICE).to(torch.bfloat16)
    slots = torch.tensor([0, 9, -1, 127, 64], dtype=torch.int32, device=DEVICE)
    torch.randn(5, 64, device=DEVICE) @ torch.randn(64, 64, device=DEVICE)  # cuBLAS is awake
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend.use_backend("cuda"):
        fp8.index_append(cache, slots, fp8.rotate(x))
    assert not fp8._rotations
    x.copy_(torch.randn(5, 128).to(torch.bfloat16))
    slots.copy_(torch.tensor([7, 128, 3, 100, -5]))
    graph.replay()
    want = np.zeros((2, 64, 1, 132), np.uint8)
    rotated = fp8.rotate(x)
    reference.index_append(want, [7, -1, 3, 100, -1], bodies.widened(rotated))
    np.testing.assert_array_equal(cache.cpu().numpy(), want)


def test_caches_that_lie_between_16_bytes_go_to_another_tier():
    from flashmla.cuda import fp8 as cuda_fp8
    from flashmla.cuda import paged_kv as cuda_paged_kv

    slots, x = torch.tensor([1], device=DEVICE), torch.randn(1, 1, 576, device=DEVICE)
    cache = torch.zeros(2, 4, 1, 580, device=DEVICE)[..., 1:577]
    reason = cuda_paged_kv.supports_append(cache, slots, x)
    assert reason is not None and "do not lie at multiples of 16 bytes" in reason
    assert cuda_paged_kv.supports_append(torch.zeros(2, 4, 1, 5), slots, x) == (
        "a token has 20 bytes, no multiple of 16"
    )
    odd = torch.zeros(2 * 4 * 656 + 4, dtype=torch.uint8, device=DEVICE)[4:].view(2, 4, 1, 656)
    reason = cuda_fp8.supports_append(odd, slots, x[0])
    assert reason is not None and "do not lie at multiples of 16 bytes" in reason
    with backend.use_backend("triton"):
        fp8.append(odd, slots, x[0])
    want = np.zeros((2, 4, 1, 656), np.uint8)
    reference.append(want, [1], bodies.widened(x[0]))
    np.testing.assert_array_equal(odd.cpu().numpy(), want)


@pytest.mark.parametrize("tier", CARD_TIERS)
def test_caches_beyond_4_gib(tier):
    """Offsets past 2^32 bytes, in one page and over pages; 2^32 bytes earlier nothing changes."""
    tokens = 6_600_000  # 4.33 GB
    cache = torch.full((tokens, 656), 7, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(64, 576).to(torch.bfloat16)
    slots = torch.arange(tokens - 64, tokens)
    want = reference.pack(bodies.widened(x))
    for page in (tokens, 64 * 25):
        cache[-64:] = 7
        with backend.use_backend(tier):
            fp8.append(cache.view(-1, page, 1, 656), slots.to(DEVICE), x.to(DEVICE))
            values = fp8.unpack(cache.view(-1, page, 1, 656)[-1, -64:, 0])
        np.testing.assert_array_equal(cache[-64:].cpu().numpy(), want)
        np.testing.assert_array_equal(values.cpu().numpy(), reference.unpack(want))
        assert (cache[: tokens - 64] == 7).all()


def test_the_same_bits_20_times():
    x = torch.randn(3000, 576, device=DEVICE).to(torch.bfloat16)
    slots = torch.randperm(64 * 100, device=DEVICE)[:3000]
    first = None
    for _ in range(20):
        cache = torch.full((100, 64, 1, 656), 9, dtype=torch.uint8, device=DEVICE)
        with backend.use_backend("cuda"):
            fp8.append(cache, slots, x)
            values = fp8.unpack(cache)
        first = first or (cache, values)
        assert torch.equal(cache, first[0])
        assert torch.equal(values.view(torch.int32), first[1].view(torch.int32))


@pytest.mark.parametrize("tier", CARD_TIERS)
def test_a_graph_appends_what_its_buffers_hold_then(tier):
    cache = torch.zeros(4, 64, 1, 656, dtype=torch.uint8, device=DEVICE)
    plain = torch.zeros(4, 64, 1, 576, dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(5, 576, device=DEVICE).to(torch.bfloat16)
    slots = torch.tensor([0, 9, -1, 255, 64], dtype=torch.int32, device=DEVICE)

    def step():
        with backend.use_backend(tier):
            fp8.append(cache, slots, x)
            flashmla.paged_append(plain, slots, x.unsqueeze(1))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    cache.zero_()
    plain.zero_()
    x.copy_(torch.randn(5, 576).to(torch.bfloat16))
    slots.copy_(torch.tensor([7, 256, 3, 130, -5]))
    graph.replay()
    want = np.zeros((4, 64, 1, 656), np.uint8)
    reference.append(want, [7, -1, 3, 130, -1], bodies.widened(x))
    np.testing.assert_array_equal(cache.cpu().numpy(), want)
    want_plain = torch.zeros(256, 576, dtype=torch.bfloat16)
    want_plain[[7, 3, 130]] = x.cpu()[[0, 2, 3]]
    assert torch.equal(plain.cpu().view(256, 576), want_plain)


@pytest.mark.parametrize("fp8_format", [False, True])
def test_the_cache_class_writes_with_the_kernels(fp8_format):
    tokens = torch.randn(3, 70, 576).to(torch.bfloat16)
    results = {}
    for device in ("cpu", DEVICE):
        cache = flashmla.PagedKVCache(12, fp8_format=fp8_format, device=device)
        names = [cache.allocate() for _ in range(3)]
        cache.append(names, tokens.to(device))
        child = cache.fork(names[0])
        cache.append([names[0], child], tokens[:2, :1].to(device))
        results[device] = cache.kv.cpu()
    assert torch.equal(results[DEVICE], results["cpu"])
    op = "fp8.append" if fp8_format else "paged_kv.append"
    assert backend.last_tier(op) == "cuda"


def test_values_on_the_card_are_checked_when_asked_for(monkeypatch):
    """Each mistake is named by its place before a kernel runs."""
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    cache = torch.full((4, 64, 1, 656), 5, dtype=torch.uint8, device=DEVICE)
    x = torch.zeros(3, 576, device=DEVICE)
    good = torch.tensor([7, -1, 255], device=DEVICE)
    for slots, message in (
        ([7, 256, 1], r"slots\[1] is 256, but a slot"),
        ([7, 1, 7], r"slots\[2] is 7, as slots\[0] is: slots must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8.append(cache, torch.tensor(slots, device=DEVICE), x)
    bad = x.clone()
    bad[2, 575] = float("nan")
    with pytest.raises(ValueError, match=r"x\[2, 575] is nan, but what is quantised must be fin"):
        fp8.append(cache, good, bad)
    assert (cache == 5).all()
    fp8.append(cache, good, x)
    q = torch.zeros(1, 1, 16, 576, dtype=torch.bfloat16, device=DEVICE)
    indices = torch.tensor([[[7, 255, -1]]], dtype=torch.int32, device=DEVICE)
    flashmla.flash_mla_with_kvcache(
        q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices
    )
    cache.view(torch.int32)[3, 63, 0, 129] = -1
    with pytest.raises(ValueError, match=r"k_cache\[3, 63, 0] has the scale nan in tile 1"):
        flashmla.flash_mla_with_kvcache(
            q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices
        )


@pytest.mark.parametrize("h_q", [16, 128])
def test_two_oracles_of_what_was_appended(h_q: int) -> None:
    """Written and read on the card: to the bytes it owes the usual bounds, to the tokens that were
    there before them no more than half a step of a code."""
    g = torch.Generator().manual_seed(h_q)
    x = (torch.randn(600, 576, generator=g) * 0.1).bfloat16()
    slots = torch.randperm(12 * 64, generator=g)[:600]
    cache = torch.full((12, 64, 1, 656), 255, dtype=torch.uint8, device=DEVICE)
    fp8.append(cache, slots.to(DEVICE), x.to(DEVICE))
    q = (torch.randn(2, 2, h_q, 576, generator=g) * 10).bfloat16()
    indices = slots[torch.randint(600, (2, 2, 333), generator=g)].int()
    out, lse = flashmla.flash_mla_with_kvcache(
        q.to(DEVICE), cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices.to(DEVICE)
    )
    given = to_numpy(q), to_numpy(indices)
    tight, tight_lse = dsa.sparse_decode(given[0], to_numpy(cache), given[1], 512)
    assert_out_close(out, tight)
    assert_lse_close(lse, tight_lse)
    tokens = np.zeros((12 * 64, 1, 576))
    tokens[slots.numpy(), 0] = x.double().numpy()
    loose, _ = dsa.sparse_decode(given[0], tokens.reshape(12, 64, 1, 576), given[1], 512)
    error = np.linalg.norm(out.double().cpu().numpy() - loose) / np.linalg.norm(loose)
    assert 2**-8 < error < 2**-4  # it is FP8, after all
