"""Split plans and the merging of partial results: ``get_mla_metadata`` and ``merge_state``."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashmla import backend, schedule
from flashmla.checks import (
    check_bool,
    check_device,
    check_dtype,
    check_int,
    check_range,
    check_shape,
    check_tensor,
    values_wanted,
)
from flashmla.ops.library import define

__all__ = ["SplitPlan", "get_mla_metadata", "merge_state"]

_INT32 = (torch.int32,)
_LARGEST_INT32 = 2**31 - 1
_ROW_ALIGNMENT = 16  # bytes


@dataclass(eq=False)
class SplitPlan:
    """A split plan that the first :func:`flash_mla_with_kvcache` call fills in.

    It belongs to one set of lengths, as the two tensors of the other form do: make a new one
    whenever ``cache_seqlens`` changes, and share it among all calls (the layers of a model, say)
    that use the same lengths.

    Attributes:
        tile_scheduler_metadata: int32 [parts, 8], None until filled in.
        num_splits: int32 [b + 1], None until filled in.
        batch_invariant: whether to fill in a batch-invariant plan, [parts, 16].
    """

    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None
    batch_invariant: bool = False
    _batch: int | None = field(default=None, init=False, repr=False)
    _sparse: bool = field(default=False, init=False, repr=False)
    _seqlens: weakref.ref[Tensor] | None = field(default=None, init=False, repr=False)
    _seqlens_version: int = field(default=-1, init=False, repr=False)
    _checked: tuple[Tensor, Tensor, int, torch.device] | None = field(
        default=None, init=False, repr=False
    )

    def serve(self, batch: int, sparse: bool) -> None:
        """Refuses calls of another batch size or kind than the plan was claimed for, if it was.

        Raises:
            ValueError: the plan was filled in by a call of another batch size, or by a dense call
                and is now given to a sparse one, or the other way round.
        """
        if self._batch is None:
            return
        if self._batch != batch:
            raise ValueError(
                f"tile_scheduler_metadata is a plan for batch size {self._batch}, but q has batch "
                f"size {batch}; call get_mla_metadata() for a new plan"
            )
        if self._sparse != sparse:
            kinds = ("dense", "sparse")
            raise ValueError(
                f"tile_scheduler_metadata is a plan of a {kinds[self._sparse]} call and cannot "
                f"serve a {kinds[sparse]} one; call get_mla_metadata() for a new plan"
            )

    def claim(self, batch: int, sparse: bool) -> None:
        """Keeps the plan for calls of one batch size and kind: once nothing can fail any more."""
        self._batch, self._sparse = batch, sparse

    def check(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The plan's two tensors, which a caller may have put there, checked for a call."""
        metadata, num_splits = self.tile_scheduler_metadata, self.num_splits
        known = self._checked
        if (
            known is not None
            and metadata is known[0]
            and num_splits is known[1]
            and (batch, device) == known[2:]
        ):
            return known[:2]  # the layers of a model share a plan: looked at once
        metadata, num_splits = check_plan_tensors(
            "tile_scheduler_metadata.tile_scheduler_metadata",
            metadata,
            "tile_scheduler_metadata.num_splits",
            num_splits,
            batch,
            device,
        )
        if not is_compiling():
            self._checked = metadata, num_splits, batch, device
        return metadata, num_splits

    def ready(self, cache_seqlens: Tensor) -> tuple[Tensor, Tensor] | None:
        """The plan's two tensors if they are those of an earlier dense call of this batch size, and
        not known to be stale; None if somebody has to look more closely."""
        known = self._checked
        if (
            known is None
            or self._sparse
            or self._batch != known[2]
            or self.tile_scheduler_metadata is not known[0]
            or self.num_splits is not known[1]
            or cache_seqlens.shape != (known[2],)
        ):
            return None
        if self._seqlens is not None and self._seqlens() is cache_seqlens:
            if self._seqlens_version != _version(cache_seqlens):
                return None
        return known[:2]

    def ready_for_sparse(self, batch: int) -> bool:
        """Whether an earlier sparse call of this batch size has claimed the plan, and it is empty
        still, so that there is nothing to look at."""
        return self._sparse and self._batch == batch and self.empty

    @property
    def empty(self) -> bool:
        """True until the plan is filled in."""
        return self.tile_scheduler_metadata is None and self.num_splits is None

    def tensors(
        self, cache_seqlens: Tensor, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Tensor, Tensor]:
        """The plan's two tensors, made from these arguments at the first call.

        Raises:
            TypeError, ValueError: they are not a plan for this batch size on this device.
            ValueError: the very tensor of lengths that the plan was made from has been written
                since. That much the host knows; other staleness ``FLASHMLA_CHECK=1`` finds.
        """
        compiling = is_compiling()
        if self.empty:
            metadata, num_splits = get_mla_metadata(
                cache_seqlens,
                num_q_tokens_per_head_k,
                num_heads_k,
                batch_invariant=self.batch_invariant,
            )
            self.tile_scheduler_metadata, self.num_splits = metadata, num_splits
            if not compiling:
                self._seqlens = weakref.ref(cache_seqlens)
                self._seqlens_version = _version(cache_seqlens)
            return metadata, num_splits
        metadata, num_splits = self.check(cache_seqlens.shape[0], cache_seqlens.device)
        if not compiling and self._seqlens is not None and self._seqlens() is cache_seqlens:
            if self._seqlens_version != _version(cache_seqlens):
                raise ValueError(
                    "tile_scheduler_metadata is a stale plan: cache_seqlens was written since the "
                    "plan was made; call get_mla_metadata() for a new plan"
                )
        return metadata, num_splits


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _fake_get_metadata(
    cache_seqlens: Tensor, parts: int, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    columns = schedule.metadata_columns(batch_invariant)
    metadata = cache_seqlens.new_empty(parts, columns, dtype=torch.int32)
    return metadata, cache_seqlens.new_empty(cache_seqlens.shape[0] + 1, dtype=torch.int32)


def _fake_merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)


_get_metadata = define(
    "split_kv.get_metadata",
    "(Tensor cache_seqlens, int parts, bool batch_invariant=False) -> (Tensor, Tensor)",
    _fake_get_metadata,
)
_merge_state = define(
    "split_kv.merge_state",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    _fake_merge_state,
)


@overload
def get_mla_metadata(*, batch_invariant: bool = False) -> tuple[SplitPlan, None]: ...


@overload
def get_mla_metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    batch_invariant: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    batch_invariant: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | SplitPlan, Tensor | None]:
    """The split plan for :func:`flash_mla_with_kvcache`, in either of its two forms.

    With lengths it returns two tensors to keep, copy and pass on. With no argument it returns
    ``(plan, None)``: an empty :class:`SplitPlan`, filled in by the first call that uses it.
    The plan depends on the lengths, so it has to be made anew whenever they change. It counts
    tiles of 64 tokens, whatever the cache's page size.

    Args:
        cache_seqlens: int32 [b], tokens of each request in the cache.
        num_q_tokens_per_head_k: s_q * h_q // h_kv, the query rows that share a KV head.
        num_heads_k: h_kv.
        num_heads_q: h_q, at least 1; taken for compatibility, and not needed.
        is_fp8_kvcache: taken for compatibility; the plan is the same.
        topk: tokens that each query of a sparse call reads; they replace the lengths.
        batch_invariant: make a plan with which the bits of a request's results do not depend on
            what else is in the batch, on how many requests it has or on the order they stand in,
            but on the request alone. Requests longer than 1024 tokens are then merged from partial
            results of 1024 each, with room for as many as the block table is wide: a table that is
            wider than the lengths need costs memory, so pass ``block_table[:, :needed]``.
        out: the two tensors of an earlier plan of the same b and the same head counts, rewritten
            in place: a captured CUDA graph reschedules this way.

    Returns:
        (tile_scheduler_metadata [parts, 8], num_splits [b + 1]), both int32, on the device of
        ``cache_seqlens``; :func:`flashmla.schedule.plan` says what is in them. A batch-invariant
        plan is [parts, 16]. On CPU tensors the number of parts is that of a card with 132 SMs.

    Raises:
        TypeError: an argument of the wrong kind or dtype, or others without the first three.
        ValueError: a wrong shape or device, numbers out of range, or ``out`` of another size.

    Example:
        >>> cache_seqlens = torch.tensor([4096, 100], dtype=torch.int32)
        >>> plan = flashmla.get_mla_metadata(cache_seqlens, 128, 1)
        >>> cache_seqlens += 1
        >>> _ = flashmla.get_mla_metadata(cache_seqlens, 128, 1, out=plan)
        >>> [tensor.shape for tensor in plan]  # 66 parts: what 132 SMs give to 128 rows
        [torch.Size([66, 8]), torch.Size([3])]

    Source: ``flashmla/schedule.py``, ``csrc/sm90/scheduler.cu``, ``flashmla/triton/split_kv.py``.
    """
    if type(cache_seqlens) is Tensor and cache_seqlens.is_cuda and not is_compiling():
        plan = _try_get_metadata(
            cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache, topk,
            batch_invariant, out,
        )  # fmt: skip
        if plan is not None:
            return out or plan
    check_bool("batch_invariant", batch_invariant)
    if cache_seqlens is None and num_q_tokens_per_head_k is None and num_heads_k is None:
        others = {"num_heads_q": num_heads_q, "topk": topk, "out": out}
        for name, value in (*others.items(), ("is_fp8_kvcache", is_fp8_kvcache or None)):
            if value is not None:
                raise TypeError(
                    f"{name} needs cache_seqlens, num_q_tokens_per_head_k and num_heads_k"
                )
        return SplitPlan(batch_invariant=batch_invariant), None
    if cache_seqlens is None or num_q_tokens_per_head_k is None or num_heads_k is None:
        raise TypeError(
            "get_mla_metadata takes no argument at all, or cache_seqlens, num_q_tokens_per_head_k "
            "and num_heads_k together"
        )
    check_tensor("cache_seqlens", cache_seqlens, "[b]", (torch.int32,))
    rows = check_int("num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1)
    heads = check_int("num_heads_k", num_heads_k, 1)
    if num_heads_q is not None:
        check_int("num_heads_q", num_heads_q, 1)
    check_bool("is_fp8_kvcache", is_fp8_kvcache)
    if cache_seqlens.device.type == "meta" and not is_compiling():
        raise ValueError("cache_seqlens must be on a device that holds its values, got meta")
    if values_wanted():
        check_range("cache_seqlens", cache_seqlens, 0, _LARGEST_INT32, "a length")
    if topk is not None:
        topk = check_int("topk", topk, 0, _LARGEST_INT32)
        cache_seqlens = torch.full_like(cache_seqlens, topk)
    parts = schedule.num_parts(rows, heads, num_sms(cache_seqlens.device))
    if out is not None:
        _check_out(out, parts, cache_seqlens, batch_invariant)
    arguments = (cache_seqlens, parts, batch_invariant)
    if cache_seqlens.shape[0] == 0:
        plan = out or _fake_get_metadata(*arguments)
        return plan[0].zero_(), plan[1].zero_()
    if out is None:
        metadata, num_splits = _get_metadata(*arguments)
        return metadata, num_splits
    if is_compiling():
        for tensor, fresh in zip(out, _get_metadata(*arguments), strict=True):
            tensor.copy_(fresh)
    else:
        backend.call("split_kv.get_metadata", cache_seqlens.device, *arguments, out)
    return out


def _try_get_metadata(
    cache_seqlens: Tensor,
    rows: int | None,
    heads: int | None,
    num_heads_q: int | None,
    is_fp8_kvcache: bool,
    topk: int | None,
    batch_invariant: bool,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """A plan on a Hopper card whose tensors the kernels' library checks by itself; None, and
    nothing done, if anything is not as usual."""
    if topk is not None or len(cache_seqlens.shape) != 1:
        return None
    if not (type(rows) is type(heads) is int and rows > 0 and heads > 0):
        return None
    if num_heads_q is not None and (type(num_heads_q) is not int or num_heads_q < 1):
        return None
    if not type(is_fp8_kvcache) is type(batch_invariant) is bool:
        return None
    device = cache_seqlens.device
    kernel = backend.shortcut("split_kv.get_metadata", device)
    if kernel is None:
        return None
    parts = schedule.num_parts(rows, heads, num_sms(device))
    plan: tuple[Tensor, Tensor] | None = kernel(cache_seqlens, parts, batch_invariant, out)
    if plan is not None:
        backend.record("split_kv.get_metadata", "cuda")
    return plan


def _check_out(out: object, parts: int, cache_seqlens: Tensor, batch_invariant: bool) -> None:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError("out must be the tuple (tile_scheduler_metadata, num_splits)")
    batch = cache_seqlens.shape[0]
    check_plan_tensors("out[0]", out[0], "out[1]", out[1], batch, cache_seqlens.device)
    columns = schedule.metadata_columns(batch_invariant)
    check_shape("out[0]", out[0], (parts, columns), f"[parts, {columns}]")


def check_plan_tensors(
    metadata_name: str,
    metadata: object,
    num_splits_name: str,
    num_splits: object,
    batch: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes, devices and layouts of a plan's two tensors for a batch size."""
    columns = schedule.METADATA_COLUMNS
    metadata = check_tensor(metadata_name, metadata, "[parts, 8]", _INT32, device)
    parts, width = metadata.shape
    if width not in (columns, schedule.metadata_columns(batch_invariant=True)):
        check_shape(metadata_name, metadata, (None, columns), "[parts, 8]")
    if not 1 <= parts <= schedule.MAX_PARTS:
        raise ValueError(
            f"{metadata_name} must have from 1 to {schedule.MAX_PARTS} parts, got {parts}"
        )
    num_splits = check_tensor(num_splits_name, num_splits, "[b + 1]", _INT32, device)
    entries = num_splits.shape[0]
    if entries != batch + 1:
        made_for = f", a plan for batch size {entries - 1}" if entries else ""
        raise ValueError(
            f"{num_splits_name} has {entries} entries{made_for}, but the batch size is {batch}: it "
            f"must have shape [b + 1] = [{batch + 1}]"
        )
    for name, tensor in ((metadata_name, metadata), (num_splits_name, num_splits)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    # The kernels read a part's row in pieces of 16 bytes. Tensors being traced have no address.
    if not is_compiling() and metadata.data_ptr() % _ROW_ALIGNMENT:
        raise ValueError(
            f"{metadata_name} must begin at a multiple of {_ROW_ALIGNMENT} bytes, got one that "
            f"begins {metadata.data_ptr() % _ROW_ALIGNMENT} bytes behind; call .clone()"
        )
    return metadata, num_splits


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; any other device is planned as an H100."""
    if device.type != "cuda":
        return schedule.CPU_NUM_SMS
    return _cuda_num_sms(device)


@functools.cache
def _cuda_num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the results over each of them.

    The operation is associative and commutative up to rounding. Log-sum-exps are natural: one in
    base 2 gives a wrong result that looks plausible. A result that ``attn_sink`` has scaled cannot
    be merged: apply the sink last. :func:`flash_mla_with_kvcache` returns lse [b, h_q, s_q] beside
    out [b, s_q, h_q, d]; pass ``lse.transpose(1, 2)``.

    Args:
        out_a: [..., d], float32, bfloat16 or float16.
        lse_a: float32 [...], the leading dimensions of ``out_a``. +inf (what the attention
            functions return for a row with no key) and -inf both mean that the half is empty;
            its out is then not read.
        out_b: as ``out_a``, same shape and dtype.
        lse_b: as ``lse_a``.

    Returns:
        (out, lse) of the same shapes and dtypes. Two empty halves give an empty whole: out 0 and
        lse +inf.

    Raises:
        TypeError: not tensors, or of the wrong dtype.
        ValueError: shapes or devices that do not match.

    Example:
        >>> out_a, lse_a = torch.tensor([[1.0, 1.0]]), torch.tensor([0.0])
        >>> out_b, lse_b = torch.tensor([[5.0, 9.0]]), torch.tensor([3.0]).log()
        >>> out, lse = flashmla.merge_state(out_a, lse_a, out_b, lse_b)
        >>> out.round(decimals=4).tolist(), lse.exp().round(decimals=4).tolist()
        ([[4.0, 7.0]], [4.0])

    Source: ``flashmla/torch/split_kv.py``, ``flashmla/triton/split_kv.py``,
    ``csrc/sm90/merge_state.cu``.
    """
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(out_a, Tensor):
        raise TypeError(f"out_a must be a torch.Tensor [..., d], got {type(out_a).__name__}")
    dims = "[" + ", ".join(["..."] * (out_a.dim() - 1) + ["d"]) + "]"
    lse_dims = "[" + ", ".join(["..."] * (out_a.dim() - 1)) + "]"
    check_tensor("out_a", out_a, dims, floats)
    check_tensor("out_b", out_b, dims, (out_a.dtype,), out_a.device)
    if out_b.shape != out_a.shape:
        raise ValueError(
            f"out_b must have the shape of out_a, {list(out_a.shape)}, got {list(out_b.shape)}"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if not isinstance(lse, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor {lse_dims}, got {type(lse).__name__}")
        check_dtype(name, lse, (torch.float32,))
        check_device(name, lse, out_a.device)
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} must have out_a's shape without its last dimension, "
                f"{list(out_a.shape[:-1])}, got {list(lse.shape)}"
            )
    if lse_a.numel() == 0:
        return torch.empty_like(out_a), torch.empty_like(lse_a)
    out, lse = _merge_state(out_a, lse_a, out_b, lse_b)
    return out, lse


def check_plan_fresh(metadata: Tensor, num_splits: Tensor, cache_seqlens: Tensor) -> None:
    """With ``FLASHMLA_CHECK``: the plan is the one that these lengths give."""
    if not values_wanted():
        return
    parts, columns = metadata.shape
    batch_invariant = columns > schedule.METADATA_COLUMNS
    fresh = schedule.plan(cache_seqlens.cpu().numpy(), parts, batch_invariant)
    for have, want in zip((metadata, num_splits), fresh, strict=True):
        if not torch.equal(have.cpu(), torch.from_numpy(want)):
            raise ValueError(
                "tile_scheduler_metadata is a stale plan: it was made from other lengths than "
                "cache_seqlens now holds; call get_mla_metadata again"
            )
