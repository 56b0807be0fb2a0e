"""The indexer's scores on a Hopper card, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import WILD, to_numpy

import flashmla
from flashmla import backend
from flashmla.reference import dsa as reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
INF, NAN = float("inf"), float("nan")

ROUNDING = 2.0**-11
"""What the tensor cores' FP8 accumulation may lose, relative to the sum of absolute products."""


def e4m3(*shape: int, g: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=g) * 2).to(torch.float8_e4m3fn)


def assert_scores_close(got: torch.Tensor, want: np.ndarray, size: np.ndarray) -> None:
    """-inf and NaN exactly where they belong; all else within the bound that `size` scales."""
    got = got.double().cpu().numpy()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = np.isfinite(want)
    error = np.abs(got[finite] - want[finite])
    worst = (error / np.maximum(size[finite], 1e-30)).max(initial=0.0)
    assert worst <= ROUNDING, (
        f"largest error {error.max():.3g}, {worst:.3g} of the absolute products; "
        f"{np.count_nonzero(error > ROUNDING * size[finite])} scores are off"
    )


def absolute(x: np.ndarray) -> np.ndarray:
    return np.abs(x.astype(np.float64))


def sizes(q, k, k_scale, weights) -> np.ndarray:
    """Sum over heads and dimensions of the absolute products, [s_q, s_kv]."""
    dots = np.einsum("thd,sd->ths", absolute(q), absolute(k))
    return np.einsum("th,ths->ts", absolute(weights), dots) * absolute(k_scale)


def ranges(kind: str, s_q: int, s_kv: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "all":
        return torch.zeros(s_q).int(), torch.full((s_q,), s_kv).int()
    if kind == "causal":
        return torch.zeros(s_q).int(), (torch.arange(s_q) + s_kv - s_q + 1).clamp(0, s_kv).int()
    bounds = torch.randint(-5, s_kv + 6, (2, s_q), generator=g).int()  # beyond, backwards, empty
    return bounds[0], bounds[1]


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


@pytest.mark.parametrize(("s_q", "s_kv", "h", "kind"), CASES)
def test_prefill(s_q: int, s_kv: int, h: int, kind: str) -> None:
    g = torch.Generator().manual_seed(s_q * s_kv + h)
    q, k = e4m3(s_q, h, 128, g=g), e4m3(s_kv, 128, g=g)
    k_scale, weights = torch.rand(s_kv, generator=g) + 0.5, torch.randn(s_q, h, generator=g)
    start, end = ranges(kind, s_q, s_kv, g)
    given = [q, k, k_scale, weights, start, end]
    with backend.use_backend("cuda"):
        got = flashmla.indexer_logits(*(x.to(DEVICE) for x in given))
    arrays = [to_numpy(x) for x in given]
    assert_scores_close(got, reference.indexer_logits(*arrays), sizes(*arrays[:4]))


def test_prefill_reads_what_it_may() -> None:
    """NaN keys and scales reach those that see them and nobody else; strided q and k."""
    g = torch.Generator().manual_seed(1)
    s_q, s_kv, h = 20, 300, 64
    q = torch.full((s_q, h + 3, 160), NAN).to(torch.float8_e4m3fn)[:, 1:-2, 16:144]
    q.copy_(e4m3(s_q, h, 128, g=g))
    k = torch.full((s_kv, 2, 128), NAN).to(torch.float8_e4m3fn)[:, 1]
    k.copy_(e4m3(s_kv, 128, g=g))
    k_scale, weights = torch.rand(s_kv, generator=g) + 0.5, torch.randn(s_q, h, generator=g)
    k.view(torch.uint8)[200:] = 127
    k.view(torch.uint8)[:30] = 255
    k_scale[100:110] = NAN
    start = torch.randint(30, 100, (s_q,), generator=g).int()
    end = torch.randint(110, 200, (s_q,), generator=g).int()
    end[:10] = 100
    end[3] = 205
    start[19] = 29
    given = [q, k, k_scale, weights, start, end]
    with backend.use_backend("cuda"):
        got = flashmla.indexer_logits(*(x.to(DEVICE) for x in given))
    arrays = [to_numpy(x) for x in given]
    want = reference.indexer_logits(*arrays)
    assert np.isnan(want).sum() == 10 * 10 + 15 + 1
    assert_scores_close(got, want, sizes(*arrays[:4]))


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
    k, k_scale = torch.randn(s_kv, 128, device=DEVICE).to(torch.float8_e4m3fn), None
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


def paged(
    lengths: list[int], s_q: int, h: int, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, cache, weights, block_table, lengths: NaN in all that no request owns, wild block numbers
    behind the lengths, and pages with a gap between them."""
    pages = [-(-n // 64) for n in lengths]
    width, blocks = max(pages) + 2, sum(pages) + 3
    cache = torch.full((blocks, 2, 64, 1, 132), 127, dtype=torch.uint8)[:, 1]
    table = torch.full((len(lengths), width), WILD, dtype=torch.int32)
    free = torch.randperm(blocks, generator=g).int()
    for i, n in enumerate(lengths):
        first = sum(pages[:i])
        table[i, : pages[i]] = free[first : first + pages[i]]
        for j in range(pages[i]):
            used = min(64, n - 64 * j)
            page = cache[table[i, j]].view(-1)
            page[: used * 128] = e4m3(used, 128, g=g).view(torch.uint8).flatten()
            scales = (torch.rand(used, generator=g) + 0.5).view(torch.uint8)
            page[8192 : 8192 + 4 * used] = scales
            page[8192 + 4 * used :] = 255
    q = torch.full((len(lengths), s_q + 1, h, 144), NAN).to(torch.float8_e4m3fn)[:, 1:, :, :128]
    q.copy_(e4m3(len(lengths), s_q, h, 128, g=g))
    weights = torch.randn(len(lengths), s_q, h, generator=g)
    return q, cache, weights, table, torch.tensor(lengths, dtype=torch.int32)


def moved(x: torch.Tensor) -> torch.Tensor:
    """x on the card with its strides and all that lies between its rows."""
    base = x if x._base is None else x._base
    return base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


LENGTHS = [0, 1, 63, 64, 65, 1023, 1024, 1025, 130, 2500]


@pytest.mark.parametrize("h", [64, 32, 5])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 7])
def test_paged(s_q: int, h: int) -> None:
    g = torch.Generator().manual_seed(10 * s_q + h)
    given = paged(LENGTHS, s_q, h, g)
    with backend.use_backend("cuda"):
        got = flashmla.indexer_logits_paged(*(moved(x) for x in given))
    q, cache, weights, table, lengths = (to_numpy(x) for x in given)
    want = reference.indexer_logits_paged(q, cache, weights, table, lengths)
    size = np.zeros_like(want)
    for i, n in enumerate(LENGTHS):
        keys = reference.gather_index_keys(cache, table[i], n)
        size[i, :, :n] = sizes(q[i], *keys, weights[i])
    assert not np.isnan(want).any()
    assert_scores_close(got, want, size)


def test_paged_is_the_same_every_time_and_for_every_batch() -> None:
    g = torch.Generator().manual_seed(5)
    given = [moved(x) for x in paged([9000, 300, 5000] * 4, 2, 64, g)]
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
    q, cache, weights, table, lengths = (moved(x) for x in paged([100, 7], 1, 64, g))
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
