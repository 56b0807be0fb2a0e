"""What every tier's indexer has to do, as functions of a device, and the problems it is given.

Tests without a card call them in Triton's interpreter, tests with one on the card. Each runs the
tier before the oracle.
"""

from __future__ import annotations

import numpy as np
import torch
from cases import WILD, to_numpy

import flashmla
from flashmla import backend
from flashmla.reference import dsa as reference

NAN = float("nan")


def e4m3(*shape: int, g: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=g) * 2).to(torch.float8_e4m3fn)


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the device with its strides and all that lies between its rows."""
    if device == "cpu":
        return x
    base = x if x._base is None else x._base
    return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def assert_scores_close(
    got: torch.Tensor, want: np.ndarray, size: np.ndarray, rounding: float
) -> None:
    """-inf and NaN exactly where they belong; errors of all else within `rounding` times the sum of
    absolute products, `size`."""
    got = got.double().cpu().numpy()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = np.isfinite(want)
    error = np.abs(got[finite] - want[finite])
    worst = (error / np.maximum(size[finite], 1e-30)).max(initial=0.0)
    assert worst <= rounding, (
        f"largest error {error.max():.3g}, {worst:.3g} of the absolute products; "
        f"{np.count_nonzero(error > rounding * size[finite])} scores are off"
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


def check_prefill(
    tier: str, s_q: int, s_kv: int, h: int, kind: str, rounding: float, device: str = "cpu"
) -> None:
    g = torch.Generator().manual_seed(s_q * s_kv + h)
    q, k = e4m3(s_q, h, 128, g=g), e4m3(s_kv, 128, g=g)
    k_scale, weights = torch.rand(s_kv, generator=g) + 0.5, torch.randn(s_q, h, generator=g)
    start, end = ranges(kind, s_q, s_kv, g)
    given = [q, k, k_scale, weights, start, end]
    with backend.use_backend(tier):
        got = flashmla.indexer_logits(*(x.to(device) for x in given))
    arrays = [to_numpy(x) for x in given]
    want = reference.indexer_logits(*arrays)
    assert_scores_close(got, want, sizes(*arrays[:4]), rounding)


def check_prefill_reads_what_it_may(tier: str, rounding: float, device: str = "cpu") -> None:
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
    with backend.use_backend(tier):
        got = flashmla.indexer_logits(*(moved(x, device) for x in given))
    arrays = [to_numpy(x) for x in given]
    want = reference.indexer_logits(*arrays)
    assert np.isnan(want).sum() == 10 * 10 + 15 + 1
    assert_scores_close(got, want, sizes(*arrays[:4]), rounding)


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


def check_paged(
    tier: str, lengths: list[int], s_q: int, h: int, rounding: float, device: str = "cpu"
) -> None:
    g = torch.Generator().manual_seed(10 * s_q + h)
    given = paged(lengths, s_q, h, g)
    with backend.use_backend(tier):
        got = flashmla.indexer_logits_paged(*(moved(x, device) for x in given))
    q, cache, weights, table, seqlens = (to_numpy(x) for x in given)
    want = reference.indexer_logits_paged(q, cache, weights, table, seqlens)
    size = np.zeros_like(want)
    for i, n in enumerate(lengths):
        keys = reference.gather_index_keys(cache, table[i], n)
        size[i, :, :n] = sizes(q[i], *keys, weights[i])
    assert not np.isnan(want).any()
    assert_scores_close(got, want, size, rounding)
