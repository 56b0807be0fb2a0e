"""Checks of arguments that the public operations share.

What the host knows (ranks, shapes, dtypes, devices, strides) is always checked: TypeError for
something of the wrong kind, ValueError for the wrong size. What only the device knows (lengths,
block numbers, indices) is checked when ``FLASHMLA_CHECK=1`` is set, at the price of
a synchronisation a call. Every message names the argument, what was given and what is allowed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from flashmla.settings import setting

__all__ = [
    "check_block_table",
    "check_bool",
    "check_device",
    "check_dtype",
    "check_finite",
    "check_int",
    "check_last_dim_contiguous",
    "check_number",
    "check_page_strides",
    "check_range",
    "check_shape",
    "check_slots",
    "check_tensor",
    "float_dtypes",
    "values_wanted",
]


def values_wanted() -> bool:
    """True when ``FLASHMLA_CHECK`` asks for checks of values on the device."""
    return not _compiling() and setting("FLASHMLA_CHECK") not in (None, "", "0")


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def check_tensor(
    name: str,
    value: object,
    dims: str,
    dtypes: Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> torch.Tensor:
    """Kind, rank, dtype, device and a contiguous last dimension of a tensor argument.

    Args:
        name: the argument's name.
        value: what was given.
        dims: the dimensions as the docstring writes them, for example "[b, s_q, h_q, 576]".
        dtypes: the dtypes that are allowed; empty allows any.
        device: where the tensor has to be; None allows any.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {dims}, got {type(value).__name__}")
    shape = value.shape
    rank = dims.count(",") + 1
    if len(shape) != rank:
        noun = "dimension" if rank == 1 else "dimensions"
        raise ValueError(f"{name} must have {rank} {noun} {dims}, got {len(shape)}: {list(shape)}")
    if dtypes and value.dtype not in dtypes:
        check_dtype(name, value, dtypes)
    if device is not None and value.device != device:
        check_device(name, value, device)
    if value.stride(-1) != 1:
        check_last_dim_contiguous(name, value)
    return value


def float_dtypes(tensor: object) -> tuple[torch.dtype, ...]:
    """What attention computes with: float32 on CPU tensors only, where the torch tier serves."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
        return (torch.bfloat16, torch.float16, torch.float32)
    return (torch.bfloat16, torch.float16)


def check_dtype(name: str, value: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        allowed = " or ".join(_short(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be of dtype {allowed}, got {_short(value.dtype)}")


def check_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name} must be on {device}, where the other tensors are, got {value.device}"
        )


def check_last_dim_contiguous(name: str, value: torch.Tensor) -> None:
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got strides "
            f"{list(value.stride())}; call .contiguous()"
        )


def check_shape(name: str, value: torch.Tensor, shape: Sequence[int | None], dims: str) -> None:
    """The sizes of a tensor; None in shape allows any."""
    for have, want in zip(value.shape, shape, strict=True):
        if want is not None and have != want:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape {dims} = [{wanted}], got {list(value.shape)}")


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """An integer (Python's or NumPy's) of at least minimum, and at most maximum if there is one."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or torch.is_tensor(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = operator.index(value)  # type: ignore[arg-type]
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {number}")
    return number


def check_number(name: str, value: object) -> float:
    """A finite number of Python's or NumPy's; a tensor would have to be read from its device."""
    if not isinstance(value, float) and (
        isinstance(value, (bool, str, torch.Tensor)) or not hasattr(value, "__float__")
    ):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:  # the compiler can trace it, and not math.isfinite
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}")
    return value


def check_range(name: str, value: torch.Tensor, low: int, high: int, meaning: str) -> None:
    """Every value within [low, high]; reads the tensor, so only where values are wanted."""
    wrong = ((value < low) | (value > high)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(
            f"{name}{place} is {value[tuple(place)].item()}, but {meaning} must be from {low} to "
            f"{high} ({len(wrong)} such values)"
        )


def check_slots(name: str, slots: torch.Tensor, capacity: int) -> None:
    """Slots of a cache that differ; negative ones drop their token. Reads the tensor."""
    meaning = "a slot (negative drops the token)"
    check_range(name, slots.clamp(min=-1), -1, capacity - 1, meaning)
    ordered, places = slots.sort(stable=True)
    again = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).nonzero().squeeze(1)
    if len(again):
        repeat = int(places[again + 1].min())
        slot = int(slots[repeat])
        before = int((slots == slot).nonzero()[0])
        raise ValueError(f"{name}[{repeat}] is {slot}, as {name}[{before}] is: slots must differ")


def check_finite(name: str, value: torch.Tensor, meaning: str) -> None:
    """No NaN and no infinity; reads the tensor, so only where values are wanted."""
    wrong = (~value.isfinite()).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(
            f"{name}{place} is {value[tuple(place)].item()}, but {meaning} ({len(wrong)} such "
            "values)"
        )


def check_page_strides(name: str, cache: torch.Tensor, dims: str) -> None:
    """Within a page tokens and heads must be packed; only the stride between pages is free."""
    _, page, heads, width = cache.shape
    packed = (page <= 1 or cache.stride(1) == heads * width) and (
        heads <= 1 or cache.stride(2) == width
    )
    if not packed:
        raise ValueError(
            f"{name} {dims} must be contiguous within a page (only the stride between pages is "
            f"free), got strides {list(cache.stride())} for shape {list(cache.shape)}"
        )


def check_block_table(
    lengths_name: str, lengths: torch.Tensor, block_table: torch.Tensor, blocks: int, page: int
) -> None:
    """Lengths that the table can hold, and block numbers of the cache within each length."""
    max_blocks = block_table.shape[1]
    check_range(lengths_name, lengths, 0, max_blocks * page, "a length (max_blocks * page)")
    used = torch.arange(max_blocks, device=lengths.device) * page < lengths.unsqueeze(1)
    lowest = 0 if blocks else -1
    numbers = block_table.masked_fill(~used, lowest)
    check_range("block_table", numbers, lowest, blocks - 1, "a block number within the length")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
