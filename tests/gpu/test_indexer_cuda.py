"""The indexer's scores on a Hopper card, against the oracle."""

from __future__ import annotations

import indexer_bodies as bodies
import pytest
import torch
from indexer_bodies import e4m3, moved, ranges

import flashmla
from flashmla import backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

ROUNDING = {"cuda": 2.0**-11, "triton": 2.0**-18}
"""What an error may be, relative to the sum of absolute products: the tensor cores add FP8 products
up with fewer bits than float32 has; Triton's kernels multiply in float16, exactly."""

CASES = [
    (1, 1, 64, "all"),
    (8, 64, 64, "all"),
    (9, 200, 4, "any"),
    (17, 1000, 64, "any"),
    (33, 777, 32, "causal"),
    (40, 513, 48, "any"),
    (130, 300, 1, "causal"),
    (100, 2500, 64, "causal"),
    (3, 9000, 64, "any"),
]


@pytest.mark.parametrize("tier", ROUNDING)
@pytest.mark.parametrize(("s_q", "s_kv", "h", "kind"), CASES)
def test_prefill(tier: str, s_q: int, s_kv: int, h: int, kind: str) -> None:
    bodies.check_prefill(tier, s_q, s_kv, h, kind, ROUNDING[tier], DEVICE)


@pytest.mark.parametrize("tier", ROUNDING)
def test_prefill_reads_what_it_may(tier: str) -> None:
    bodies.check_prefill_reads_what_it_may(tier, ROUNDING[tier], DEVICE)


def test_prefill_is_the_same_every_time() -> None:
    g = torch.Generator().manual_seed(2)
    q, k = e4m3(300, 64, 128, g=g).to(DEVICE), e4m3(5000, 128, g=g).to(DEVICE)
    k_scale, weights = torch.rand(5000, generator=g), torch.randn(300, 64, generator=g)
    start, end = ranges("causal", 300, 5000, g)
    given = [q, k, *(x.to(DEVICE) for x in (k_scale, weights, start, end))]
    with backend.use_backend("cuda"):
        first = flashmla.indexer_logits(*given)
        for _ in range(20):
            assert torch.equal(flashmla.indexer_logits(*given), first)


def test_prefill_of_many_queries() -> None:
    """More rows than a grid's second dimension has, and more than 2^31 scores."""
    s_q, s_kv = 70_000, 32_000
    q = torch.randn(16, 64, 128, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(16, 64, device=DEVICE)
    k = torch.randn(s_kv, 128, device=DEVICE).to(torch.float8_e4m3fn)
    k_scale = torch.ones(s_kv, device=DEVICE)
    start = torch.zeros(s_q, dtype=torch.int32, device=DEVICE)
    end = torch.full_like(start, s_kv)
    rows = torch.arange(s_q, device=DEVICE) % 16
    with backend.use_backend("cuda"):
        few = flashmla.indexer_logits(q, k, k_scale, weights, start[:16], end[:16])
        codes = q.view(torch.uint8)[rows].view(q.dtype)
        many = flashmla.indexer_logits(codes, k, k_scale, weights[rows], start, end)
    for i in range(0, s_q - 15, 16 * 625):
        assert torch.equal(many[i : i + 16], few)
    assert torch.equal(many[-16:], few)


LENGTHS = [0, 1, 63, 64, 65, 1023, 1024, 1025, 130, 2500]


@pytest.mark.parametrize("tier", ROUNDING)
@pytest.mark.parametrize("h", [64, 32, 5])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 7])
def test_paged(tier: str, s_q: int, h: int) -> None:
    bodies.check_paged(tier, LENGTHS, s_q, h, ROUNDING[tier], DEVICE)


def test_paged_is_the_same_every_time_and_for_every_batch() -> None:
    g = torch.Generator().manual_seed(5)
    given = [moved(x, DEVICE) for x in bodies.paged([9000, 300, 5000] * 4, 2, 64, g)]
    with backend.use_backend("cuda"):
        first = flashmla.indexer_logits_paged(*given)
        for _ in range(20):
            assert torch.equal(flashmla.indexer_logits_paged(*given), first)
        q, cache, weights, table, lengths = given
        for i in range(3):
            own = slice(i, i + 1)
            alone = flashmla.indexer_logits_paged(
                q[own], cache, weights[own], table[own], lengths[own]
            )
            assert torch.equal(alone, first[own])


def test_paged_with_a_cache_of_odd_strides() -> None:
    g = torch.Generator().manual_seed(6)
    q, cache, weights, table, lengths = (moved(x, DEVICE) for x in bodies.paged([100, 7], 1, 64, g))
    odd = torch.zeros(cache.shape[0], 8448 + 8, dtype=torch.uint8, device=DEVICE)[:, :8448]
    odd = odd.unflatten(1, (64, 1, 132)).copy_(cache)
    with (
        backend.use_backend("cuda"),
        pytest.raises(RuntimeError, match="stride between its pages is no multiple of 16 bytes"),
    ):
        flashmla.indexer_logits_paged(q, odd, weights, table, lengths)


@pytest.mark.parametrize(("s_q", "s_kv"), [(0, 5), (5, 0)])
def test_prefill_of_nothing(s_q: int, s_kv: int) -> None:
    g = torch.Generator().manual_seed(3)
    q, k = e4m3(s_q, 64, 128, g=g).to(DEVICE), e4m3(s_kv, 128, g=g).to(DEVICE)
    bound = torch.zeros(s_q, dtype=torch.int32, device=DEVICE)
    weights, k_scale = torch.ones(s_q, 64, device=DEVICE), torch.ones(s_kv, device=DEVICE)
    with backend.use_backend("cuda"):
        assert flashmla.indexer_logits(q, k, k_scale, weights, bound, bound).shape == (s_q, s_kv)


def test_what_the_kernel_does_not_take() -> None:
    g = torch.Generator().manual_seed(4)
    q, k = e4m3(2, 65, 128, g=g).to(DEVICE), e4m3(5, 128, g=g).to(DEVICE)
    bound = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    weights, k_scale = torch.ones(2, 65, device=DEVICE), torch.ones(5, device=DEVICE)
    with (
        backend.use_backend("cuda"),
        pytest.raises(RuntimeError, match="65 heads; the kernel takes 1 to 64"),
    ):
        flashmla.indexer_logits(q, k, k_scale, weights, bound, bound)
