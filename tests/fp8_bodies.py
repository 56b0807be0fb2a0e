"""What every tier has to do with token caches, byte for byte, as functions of a tier and a device.

Tests without a card call them on the torch tier and in Triton's interpreter, tests with one on the
CUDA and Triton tiers. Each runs the tier before the oracle.
"""

from __future__ import annotations

import numpy as np
import torch

import flashmla
from flashmla import backend, fp8
from flashmla.fp8 import INDEX_PAGE
from flashmla.reference import fp8 as reference

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def adversarial_rows(dtype: torch.dtype) -> torch.Tensor:
    """Tokens [n, 576] that are hard to round: every size, ties and their neighbours, tiles whose
    scale is at a power of two or at its floor, zeros of both signs, denormals, NaN, infinities."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-42, 38, 81).unsqueeze(1)
    rows = [torch.randn(81, 576, generator=g) * sizes]
    rows.append(torch.tensor([0.0, -0.0, 1e-40, -1e-40, 2.0**-126, 3.4e38]).unsqueeze(1))
    floor = torch.tensor([1e-4])
    for edge in (floor, *(448.0 * torch.tensor([2.0**e]) for e in (-8, 0, 5, 60))):
        beside = [torch.nextafter(edge, torch.tensor(size)) for size in (0.0, 3e38)]
        rows += [torch.stack([edge, *beside])]
    rows.append(_ties())
    special = torch.randn(12, 576, generator=g)
    for row, (place, value) in enumerate(
        [(0, NAN), (127, -NAN), (128, INF), (511, -INF), (512, NAN), (575, -NAN), (513, INF)]
    ):
        special[row, place] = value
    special[7, 200], special[7, 300] = NAN, INF
    special[8] = NAN
    special[9, :512] = 0.0
    special[9, 130] = -INF
    special[10, 520:530] = torch.tensor(3.4e38)
    special[11, 520:530] = torch.tensor(-1e-40)
    rows.append(special)
    return torch.cat([row.expand(-1, 576) for row in rows]).to(dtype)


def _ties() -> torch.Tensor:
    """[12, 576]: the middles between codes, and their neighbours, in tiles of several scales."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2  # [126]
    rows = []
    for largest in (448.0, 3.3, 5e4, 0.012):
        scaled = middles * (torch.tensor(largest) / 448.0)
        for values in (scaled, torch.nextafter(scaled, torch.zeros(1)), -scaled):
            tile = torch.cat([values, torch.tensor([largest, -0.0])])
            rows.append(torch.cat([tile.repeat(4), tile[:64]]))
    return torch.stack(rows)


def widened(x: torch.Tensor) -> np.ndarray:
    """x as float32 for the oracle; the widening of a 16-bit type is exact."""
    return x.cpu().float().numpy()


def check_pack(
    tier: str, dtype: torch.dtype, power_of_two: bool, device: str = "cpu", denormals: bool = True
) -> None:
    """Bytes equal to the oracle's; rows with a stride, and ones that begin anywhere."""
    x = adversarial_rows(dtype)
    if not denormals:
        x = torch.where(x.abs() < 2.0**-126, 0.0, x)
    wide = torch.full((len(x), 600), 3.0, dtype=dtype)
    wide[:, 16:592] = x
    shifted = torch.full((x.numel() + 1,), 3.0, dtype=dtype)
    shifted[1:] = x.flatten()
    with backend.use_backend(tier):
        got = fp8.pack(x.to(device), power_of_two)
        strided = fp8.pack(wide.to(device)[:, 16:592], power_of_two)
        odd = fp8.pack(shifted.to(device)[1:].view(-1, 576), power_of_two)
        none = fp8.pack(x.to(device)[:0], power_of_two)
    with np.errstate(over="ignore"):
        want = reference.pack(widened(x), power_of_two)
    for result in (got, strided, odd):
        np.testing.assert_array_equal(result.cpu().numpy(), want)
    assert none.shape == (0, 656)


def check_unpack(tier: str, device: str = "cpu") -> None:
    """Every code under scales of every size, negative, zero and not finite ones too, and every
    bfloat16."""
    scales = [[1.0, 0.3, 1e-40, 2.0**-149], [3e38, -2.5, 0.0, 1e-10], [NAN, INF, 7.0, -INF]]
    cache = torch.zeros(256, len(scales), 656, dtype=torch.uint8)
    cache[..., :512] = torch.arange(256)[:, None, None]
    cache[..., 512:528] = torch.tensor(scales).view(torch.uint8)
    cache.view(torch.int16)[:, 0, 264:] = torch.arange(256 * 64).view(256, 64).to(torch.int16)
    cache.view(torch.int16)[:, 1, 264:] = (-torch.arange(256 * 64)).view(256, 64).to(torch.int16)
    apart = torch.zeros(256, 3, len(scales), 1, 656, dtype=torch.uint8)
    apart[:, 1, :, 0] = cache
    with backend.use_backend(tier):
        got = fp8.unpack(cache.to(device))
        paged = fp8.unpack(apart.to(device)[:, 1])
        one = fp8.unpack(cache.to(device)[77, 2])
        declared = fp8.unpack(cache.to(device).view(torch.float8_e4m3fn)[:, 1])
        none = fp8.unpack(cache.to(device)[:, :0])
    with np.errstate(invalid="ignore", over="ignore"):
        want = reference.unpack(cache.numpy())
    np.testing.assert_array_equal(got.cpu().numpy(), want)
    signs = [np.signbit(np.nan_to_num(values)) for values in (got.cpu().numpy(), want)]
    np.testing.assert_array_equal(*signs)
    np.testing.assert_array_equal(paged.cpu().numpy()[:, :, 0], want)
    np.testing.assert_array_equal(one.cpu().numpy(), want[77, 2])
    np.testing.assert_array_equal(declared.cpu().numpy(), want[:, 1])
    assert none.shape == (256, 0, 576)


def some_slots(capacity: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """n slots that differ, among them ones to be dropped: negative, and beyond the cache."""
    g = torch.Generator().manual_seed(n)
    slots = torch.randperm(capacity, generator=g)[:n]
    slots = torch.cat([slots, torch.full((max(0, n - len(slots)),), -1)])
    wild = [-1, capacity, -(2**31), 2**31 - 1]
    if dtype == torch.int64:
        wild += [2**40, 2**32, -(2**40)]
    for place, slot in enumerate(wild[: n - 1]):
        slots[place * (n // len(wild)) if n > 20 else place] = slot
    return slots.to(dtype)


def within(slots: torch.Tensor, capacity: int) -> list[int]:
    """The slots for the oracle, which drops negative ones only."""
    return [slot if 0 <= slot < capacity else -1 for slot in slots.tolist()]


def check_append(
    tier: str,
    dtype: torch.dtype,
    page: int,
    n: int,
    slot_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
) -> None:
    """Into a slice of a larger cache: the slots named get the oracle's bytes, nothing else does."""
    blocks = -(-2 * max(n, 4) // page)
    g = torch.Generator().manual_seed(page)
    whole = torch.randint(0, 256, (blocks, 2, page, 1, 656), generator=g, dtype=torch.uint8)
    x = (torch.randn(n, 576, generator=g) * 10.0 ** torch.randn(n, 1, generator=g)).to(dtype)
    slots = some_slots(blocks * page, n, slot_dtype)
    on_device = whole.to(device)
    with backend.use_backend(tier):
        fp8.append(on_device[:, 1].view(torch.float8_e4m3fn), slots.to(device), x.to(device))
    want = whole.numpy().copy()
    reference.append(want[:, 1], within(slots, blocks * page), widened(x))
    np.testing.assert_array_equal(on_device.cpu().numpy(), want)


def check_paged_append(
    tier: str, dtype: torch.dtype, page: int, heads: int, d: int, n: int = 9, device: str = "cpu"
) -> None:
    """The same for caches of floats, any bits."""
    blocks = -(-2 * n // page)
    g = torch.Generator().manual_seed(d)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    largest = torch.iinfo(bits).max

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-largest, largest, shape, generator=g, dtype=bits)

    whole, x = random(blocks, 2, page, heads, d), random(n, heads, 2 * d)
    slots = some_slots(blocks * page, n, torch.int64)
    for tokens in (x[..., :d].contiguous(), x[..., d:]):
        on_device = whole.to(device)
        with backend.use_backend(tier):
            flashmla.paged_append(
                on_device[:, 0].view(dtype), slots.to(device), tokens.to(device).view(dtype)
            )
        want = whole.clone()
        for slot, token in zip(within(slots, blocks * page), tokens, strict=True):
            if slot >= 0:
                want[slot // page, 0, slot % page] = token
        assert torch.equal(on_device.cpu(), want)


def check_index_pack(
    tier: str, dtype: torch.dtype, power_of_two: bool, device: str = "cpu", denormals: bool = True
) -> None:
    """Codes and scales of the indexer's keys equal to the oracle's, for an odd number of them."""
    x = adversarial_rows(dtype)[:, :512].reshape(-1, 128)[1:]
    if not denormals:
        x = torch.where(x.abs() < 2.0**-126, 0.0, x)
    wide = torch.full((len(x), 136), 3.0, dtype=dtype)
    wide[:, 8:] = x
    with backend.use_backend(tier):
        packed = fp8.index_pack(x.to(device), power_of_two)
        strided = fp8.index_pack(wide.to(device)[:, 8:], power_of_two)
        none = fp8.index_pack(x.to(device)[:0])
    want = reference.index_pack(widened(x), power_of_two)
    for codes, scales in (packed, strided):
        assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        for got, wanted in ((codes, want[0]), (scales, want[1])):
            np.testing.assert_array_equal(got.view(torch.uint8).cpu().numpy(), bytes_of(wanted))
    assert none[0].shape == (0, 128) and none[1].shape == (0,)


def bytes_of(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def check_index_append(
    tier: str,
    dtype: torch.dtype,
    n: int,
    slot_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
) -> None:
    """As check_append, for the indexer's cache."""
    blocks = -(-2 * n // INDEX_PAGE)
    g = torch.Generator().manual_seed(n)
    whole = torch.randint(0, 256, (blocks, 2, 64, 1, 132), generator=g, dtype=torch.uint8)
    x = (torch.randn(n, 128, generator=g) * 10.0 ** torch.randn(n, 1, generator=g)).to(dtype)
    slots = some_slots(blocks * INDEX_PAGE, n, slot_dtype)
    on_device = whole.to(device)
    with backend.use_backend(tier):
        fp8.index_append(on_device[:, 1].view(torch.int8), slots.to(device), x.to(device))
    want = whole.numpy().copy()
    reference.index_append(want[:, 1], within(slots, blocks * INDEX_PAGE), widened(x))
    np.testing.assert_array_equal(on_device.cpu().numpy(), want)
