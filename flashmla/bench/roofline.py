"""What to expect: the time that bytes and operations need at the machine's measured ceilings."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch

from flashmla.bench.timing import measure

__all__ = [
    "Ceilings",
    "bound",
    "copy_gbps",
    "fp8_matmul_tflops",
    "measure_ceilings",
    "matmul_tflops",
    "predicted_us",
    "read_gbps",
]


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best, as measured on it.

    Args:
        read_gbps: GB/s of reading a tensor much larger than any cache.
        copy_gbps: GB/s of copying one, bytes read and bytes written both counted.
        matmul_tflops: TFLOPS of a large matrix product of random bf16 numbers.
        fp8_matmul_tflops: the same of float8_e4m3; None where torch has no such product.
    """

    read_gbps: float
    copy_gbps: float
    matmul_tflops: float
    fp8_matmul_tflops: float | None = None

    def as_dict(self) -> dict[str, float]:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: round(value, 1) for name, value in known.items()}


def predicted_us(
    flops: float, bytes_moved: float, ceilings: Ceilings, writes: bool = False
) -> float:
    """Microseconds if the slower of the two, memory and arithmetic, were all there is.

    With ``writes`` the bytes go both ways, at the rate of a copy.
    """
    gbps = ceilings.copy_gbps if writes else ceilings.read_gbps
    return max(bytes_moved / (gbps * 1e3), flops / (ceilings.matmul_tflops * 1e6))


def bound(flops: float, bytes_moved: float, ceilings: Ceilings) -> str:
    """``"memory"`` or ``"compute"``: which of the two takes longer."""
    memory = bytes_moved / ceilings.read_gbps
    return "memory" if memory > flops / ceilings.matmul_tflops / 1e3 else "compute"


def _median_us(call, device: torch.device, copies: int = 1, rounds: int = 15) -> float:
    timing = measure({"": call}, copies, device, rounds)[""]
    us = timing.us if timing.us is not None else timing.eager_us
    assert us is not None
    return us


def copy_gbps(device: torch.device | str, size: int | None = None) -> float:
    """GB/s of copying ``size`` bytes on the device, reads and writes counted (2 · size).

    The default is 2 GiB on a card and 128 MiB on a CPU: beyond every cache, quickly done. A kernel
    does the copying: what a CUDA graph makes of ``copy_`` runs at four fifths of its rate on an
    H100 (2437 GB/s, a kernel 3015).
    """
    device = torch.device(device)
    size = size or (2**31 if device.type == "cuda" else 2**27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_us(lambda _: torch.mul(source, 1.0, out=target), device) / 1e3


def read_gbps(device: torch.device | str, size: int | None = None) -> float:
    """GB/s of reading ``size`` bytes on the device, by adding them up; sizes as in `copy_gbps`."""
    device = torch.device(device)
    size = size or (2**31 if device.type == "cuda" else 2**27)
    # Rows, so that every multiprocessor has some to add up.
    source = torch.ones(size // 2**16, 2**14, dtype=torch.float32, device=device)
    return size / _median_us(lambda _: source.sum(dim=1), device) / 1e3


def matmul_tflops(
    device: torch.device | str, n: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> float:
    """TFLOPS of an n³ matrix product of random numbers (zeros would draw less power and lie).

    The default is 8192 on a card and 768 on a CPU.
    """
    device = torch.device(device)
    n = n or (8192 if device.type == "cuda" else 768)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _median_us(lambda _: torch.matmul(a, b, out=out), device) / 1e6


def fp8_matmul_tflops(device: torch.device | str, n: int = 8192) -> float | None:
    """TFLOPS of an n³ product of random float8_e4m3 numbers; None off cards that have it."""
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product(_: int) -> torch.Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * n**3 / _median_us(product, device) / 1e6


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """All ceilings of a device, each the median of three measurements."""
    device = torch.device(device)

    def three(measurement) -> float:
        return statistics.median(measurement(device) for _ in range(3))

    rates = three(read_gbps), three(copy_gbps), three(matmul_tflops)
    return Ceilings(*rates, fp8_matmul_tflops(device))
