"""What the kernels of this tier share: the online softmax, FP8 codes, head sizes, limits."""

import contextlib
import functools

import torch
import triton
import triton.language as tl

# Triton decides when a kernel is decorated whether it is compiled or interpreted, so this is
# settled for the life of the process, as is everything that follows from it.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

TILE = tl.constexpr(128)  # values of an FP8 token that share a scale


# region: online_softmax
@triton.jit
def online_softmax(scores, row_max, row_sum):
    """One step over a block of scores, in base 2: masked scores are -inf.

    scores [M, N], row_max [M], row_sum [M] -> weights [M, N], row_max [M], row_sum [M],
    rescale [M]: what the caller multiplies everything it has summed so far by.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # [M]
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN: subtract 0 there.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # [M]
    weights = tl.exp2(scores - finite_max[:, None])  # [M, N]
    rescale = tl.exp2(row_max - finite_max)  # [M], 0 at a row's first block
    return weights, new_max, row_sum * rescale + tl.sum(weights, axis=1), rescale


# endregion: online_softmax


# region: finish_softmax
@triton.jit
def finish_softmax(acc, row_max, row_sum):
    """acc [M, D], row_max [M] in base 2, row_sum [M] -> out [M, D], lse [M] in natural log.

    A row that attended to nothing has row_sum 0: out 0, LSE +inf.
    """
    empty = row_sum == 0.0  # [M]
    divisor = tl.where(empty, 1.0, row_sum)  # [M]
    out = acc / divisor[:, None]  # [M, D]
    lse = tl.where(empty, float("inf"), row_max * LN_2 + tl.log(divisor))  # [M]
    return out, lse


# endregion: finish_softmax


@triton.jit
def sink_share(lse, sink):
    """What a sink leaves of the softmax to the keys: exp(lse) / (exp(lse) + exp(sink)), any shape;
    1 for an empty row, whose LSE is +inf and whose out is 0 anyway."""
    excess = tl.where(lse == float("inf"), float("-inf"), sink - lse)
    return 1.0 / (1.0 + tl.exp(excess))


# region: e4m3_values
@triton.jit
def e4m3_values(codes):
    """What float8_e4m3 codes, int32 0 to 255, are worth, as float32."""
    size = codes & 0x7F
    normal = ((size << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # 2^-9
    value = tl.where(size == 0x7F, float("nan"), value)
    # The sign goes in as a bit: Triton's minus is a subtraction, from which 0 comes out positive.
    bits = value.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


# endregion: e4m3_values


def split_head_dim(d: int) -> tuple[int, int]:
    """A head size as the sum of a power of two and a rest.

    Triton's tensors have power-of-two sides: 576 = 512 + 64 costs two products, while padding
    to 1024 would take nearly twice the memory. 192 = 128 + 64 the same way.
    """
    main = 1 << (d.bit_length() - 1)
    return main, d - main


def unsupported_head_dim(d: int) -> bool:
    """True if the parts of a head size are not both powers of two of at least 16, `tl.dot`'s
    least; a rest of 0 is fine."""
    main, rest = split_head_dim(d)
    return main < 16 or rest & (rest - 1) != 0 or 0 < rest < 16


def unsupported_dtype(dtype: torch.dtype) -> bool:
    """True unless the products are exact in the matrix units: float32 would be cut to tf32."""
    return dtype not in (torch.bfloat16, torch.float16)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels store results in: `dtype`, and float32 under the interpreter.

    The interpreter truncates float32 to bfloat16 where hardware rounds, so there torch rounds
    after the kernel.
    """
    return torch.float32 if INTERPRETED else dtype


@functools.cache
def compile_target(device: torch.device) -> int:
    """What Triton compiles for on `device`: an NVIDIA card's capability as 90 or 100, else 0.

    The interpreter counts as Hopper, so that tests without a card walk its tiles.
    """
    if device.type == "cpu":
        return 90
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def misplaced(cache: torch.Tensor) -> bool:
    """Whether the cache's bytes cannot be seen as float32."""
    return any(number % 4 for number in (cache.storage_offset(), *cache.stride()[:-1]))


def byte_views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bytes as uint8, int32 and int16."""
    return cache.view(torch.uint8), cache.view(torch.int32), cache.view(torch.int16)
