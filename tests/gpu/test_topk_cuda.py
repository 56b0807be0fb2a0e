"""Exact top-k on a Hopper card, against a full sort, on rows made to trip it up."""

from __future__ import annotations

import pytest
import torch
from cases import WILD

import flashmla
from flashmla import backend
from flashmla.lab.check import assert_identical

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
INF, NAN = float("inf"), float("nan")


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def adversarial(n: int) -> dict[str, torch.Tensor]:
    """Rows of n floats: names and what is hard about them."""
    g = torch.Generator(DEVICE).manual_seed(n)

    def normal() -> torch.Tensor:
        return torch.randn(n, generator=g, device=DEVICE)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=g, device=DEVICE)

    middle = n // 2
    rows = {
        "normal": normal(),
        "negative": -normal().abs() - 1,
        "narrow": 1000 + normal() * 1e-3,
        "ascending": torch.arange(n, device=DEVICE).float(),
        "descending": -torch.arange(n, device=DEVICE).float(),
        "all_equal": torch.full((n,), 2.5, device=DEVICE),
        "nan_but_one": torch.full((n,), NAN, device=DEVICE),
        "all_nan": torch.full((n,), NAN, device=DEVICE),
        "all_minus_inf": torch.full((n,), -INF, device=DEVICE),
        "half_minus_inf": normal().masked_fill_(integers(0, 2) == 0, -INF),
        "almost_all_minus_inf": normal().masked_fill_(integers(0, 50) > 0, -INF),
        "plus_inf": normal().masked_fill_(integers(0, 20) == 0, INF),
        "denormal": from_bits(integers(0, 2) * -(2**31) + integers(0, 2**23)),
        "both_zeros": from_bits(integers(0, 2) * -(2**31)),
        "huge_outlier": normal().index_fill_(0, torch.tensor([middle], device=DEVICE), 3e38),
        "any_bits": from_bits(integers(-(2**31), 2**31)),
        "few_values": integers(-3, 4).float(),
        "many_zeros": normal().clamp_(min=0),
        "a_crowd_at_the_end": torch.cat([normal()[: n - n // 50] - 50, normal()[: n // 50]]),
        "clusters": (normal()[: n // 500 + 1].repeat_interleave(500)[:n] * 3 + normal() * 0.3),
        "waves": torch.sin(torch.arange(n, device=DEVICE) * (6.2831853 / 128)),
    }
    rows["nan_but_one"][middle] = -1.5
    return rows


def by_sorting(logits: torch.Tensor, k: int, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """What has to come out: a stable sort in float64, where no float32 is a denormal."""
    rows, n = logits.shape
    values = logits.double() + 0.0  # -0 becomes +0
    position = torch.arange(n, device=DEVICE)
    barred = ~(values > -INF)
    if lengths is not None:
        barred |= position >= lengths.unsqueeze(1)
    best = values.masked_fill(barred, -INF).sort(dim=1, descending=True, stable=True).indices
    best = best[:, :k].masked_fill(barred.gather(1, best[:, :k]), n)
    want = torch.full((rows, k), -1, dtype=torch.int32, device=DEVICE)
    best = best.sort(dim=1).values
    want[:, : best.shape[1]] = best.masked_fill(best == n, -1)
    return want


def on_card(*args) -> torch.Tensor:
    with backend.use_backend("cuda"):
        return flashmla.topk(*args)


SIZES = [1, 5, 2048, 6143, 6145, 20000, 32768, 131072, 262143, 262144]


@pytest.mark.parametrize("k", [1, 64, 2047, 2048])
@pytest.mark.parametrize("n", SIZES)
def test_adversarial_rows(n: int, k: int) -> None:
    rows = adversarial(n)
    logits = torch.stack(list(rows.values()))
    # One call for all rows, and one for each: few rows are shared out among CTAs.
    got = on_card(logits, k)
    alone = torch.cat([on_card(row[None], k) for row in rows.values()])
    want = by_sorting(logits, k)
    wrong = [name for name, a, b in zip(rows, got, want) if not torch.equal(a, b)]
    wrong_alone = [name for name, a, b in zip(rows, alone, want) if not torch.equal(a, b)]
    assert not wrong and not wrong_alone, f"together {wrong}, alone {wrong_alone}"


@pytest.mark.parametrize("n", [2500, 9000, 70000])
@pytest.mark.parametrize("k", [100, 2048])
def test_lengths(n: int, k: int) -> None:
    """Behind a length lies what would win, and block numbers that lead nowhere."""
    g = torch.Generator(DEVICE).manual_seed(k)
    lengths = [0, 1, k - 1, k, k + 1, n - 1, n, 6144, 6145]
    lengths = torch.tensor([min(x, n) for x in lengths], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(len(lengths), n, generator=g, device=DEVICE)
    position = torch.arange(n, device=DEVICE)
    logits.masked_fill_(position >= lengths.unsqueeze(1), INF)
    assert_identical("indices", on_card(logits, k, lengths), by_sorting(logits, k, lengths))

    page, blocks = 48, -(-n // 48)
    table = torch.randint(0, 40_000_000, (len(lengths), blocks), generator=g, device=DEVICE)
    table = table.int().masked_fill_(
        torch.arange(blocks, device=DEVICE) * page >= lengths.unsqueeze(1), WILD
    )
    want = by_sorting(logits, k, lengths)
    block = table.gather(1, want.clamp(min=0).long() // page)
    want = torch.where(want < 0, -1, block * page + want % page)
    assert_identical("in the cache", on_card(logits, k, lengths, table, page), want)


@pytest.mark.parametrize("n", [1000, 33333])
def test_rows_at_any_address(n: int) -> None:
    """Rows of a wider tensor, every alignment, NaN and +inf between them."""
    wide = torch.full((9, n + 5), INF, device=DEVICE)
    logits = wide[:, 3 : 3 + n]
    logits.copy_(torch.randn(9, n, device=DEVICE))
    table = torch.randint(0, 1000, (9, n // 16 + 9), device=DEVICE).int()[:, 2:]
    want = by_sorting(logits, 500)
    assert_identical("indices", on_card(logits, 500), want)
    in_cache = table.gather(1, want.clamp(min=0).long() // 16) * 16 + want % 16
    assert_identical("in the cache", on_card(logits, 500, None, table, 16), in_cache)


def test_many_rows() -> None:
    logits = torch.randn(70_001, 300, device=DEVICE)
    assert_identical("indices", on_card(logits, 37), by_sorting(logits, 37))


def test_offsets_beyond_32_bits() -> None:
    logits = torch.randn(40, 7000, device=DEVICE)
    wide = torch.empty(40, 60_000_000, device=DEVICE)[:, 1:7001]
    wide.copy_(logits)
    assert_identical("indices", on_card(wide, 700), by_sorting(logits, 700))


@pytest.mark.parametrize("shape", [(0, 10, 4), (3, 10, 0), (3, 0, 5)])
def test_empty(shape: tuple[int, int, int]) -> None:
    rows, n, k = shape
    got = on_card(torch.randn(rows, n, device=DEVICE), k)
    assert got.shape == (rows, k) and (got == -1).all()


def test_same_every_time() -> None:
    logits = torch.stack(list(adversarial(50_000).values()))
    first = on_card(logits, 2048)
    for _ in range(20):
        assert torch.equal(on_card(logits, 2048), first)


def test_what_the_kernel_does_not_take() -> None:
    logits = torch.randn(2, 5000, device=DEVICE)
    with pytest.raises(RuntimeError, match="k is 2049; the kernel takes up to 2048"):
        on_card(logits, 2049)
    with pytest.raises(RuntimeError, match="rows of 262145 logits; the kernel takes up to"):
        on_card(torch.randn(1, 262145, device=DEVICE), 5)
