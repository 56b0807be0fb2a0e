"""Dense prefill attention over sequences laid end to end: ``flash_attn_varlen_func``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmla import backend
from flashmla.checks import (
    check_bool,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    float_dtypes,
    values_wanted,
)
from flashmla.ops.library import define, register_autograd

__all__ = [
    "HEAD_DIMS",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

HEAD_DIMS = ((192, 128), (128, 128))
"""Head sizes that are supported, as (d_qk, d_v)."""


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    total_q, h_q, _ = q.shape
    lse = q.new_empty(total_q, h_q, dtype=torch.float32)
    return q.new_empty(total_q, h_q, v.shape[2]), lse


def _fake_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_forward = define(
    "mha.forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_qo, Tensor cu_seqlens_kv, "
    "int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, bool causal) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = define(
    "mha.backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_qo, "
    "Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, "
    "bool causal, bool deterministic, Tensor? d_lse=None) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_qo, cu_seqlens_kv, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_qo, cu_seqlens_kv)
    ctx.rest = rest


def _gradients(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    arguments = (d_out, q, k, v, out, lse, cu_seqlens_qo, cu_seqlens_kv, *ctx.rest)
    return _backward(*arguments, deterministic, d_lse)


def _compiled_backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, d_out, d_lse, True), None, None, None, None, None, None


register_autograd("mha.forward", _compiled_backward, _save_for_backward)


class _Attention(torch.autograd.Function):
    """The eager way to gradients."""

    @staticmethod
    def forward(ctx: Any, deterministic: bool, forced: str | None, *inputs: Any) -> Any:
        output = _forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.deterministic, ctx.forced = deterministic, forced
        return output

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:  # type: ignore[override]
        # Autograd runs this in another thread, or after a use_backend block has ended.
        with backend.same_backend(ctx.forced):
            gradients = _gradients(ctx, d_out, d_lse, ctx.deterministic)
        return None, None, *gradients, None, None, None, None, None, None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end, with gradients.

    Args:
        q: [total_q, h_q, d_qk], bfloat16 or float16; float32 on CPU tensors as well.
        k: [total_kv, h_kv, d_qk], h_q a multiple of h_kv.
        v: [total_kv, h_kv, d_v]; (d_qk, d_v) is (192, 128) or (128, 128).
        cu_seqlens_qo: int32 [sequences + 1], prefix sums of the query lengths, from 0.
        cu_seqlens_kv: int32 [sequences + 1], prefix sums of the key lengths, from 0.
        max_seqlen_qo: the longest query length; more is allowed.
        max_seqlen_kv: the longest key length; more is allowed.
        dropout_p: 0; dropout is not supported.
        softmax_scale: what scores are multiplied by; d_qk ** -0.5 unless given.
        causal: query i of s_q sees keys up to s_k - s_q + i: the last query is aligned with
            the last key.
        deterministic: gradients must not depend on the order in which blocks finish. Compiled
            code takes it as set.
        is_varlen: taken for compatibility; the lengths are always read from the prefix sums.

    Returns:
        (out, lse): out [total_q, h_q, d_v] in q's dtype; lse float32 [total_q, h_q], the
        natural logarithm of the sum of exp(scaled score). A query with nothing to attend to
        gives out 0 and lse +inf. Both have gradients.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong rank, shape, device, stride or head size, h_q not a multiple of
            h_kv, or dropout. With ``FLASHMLA_CHECK=1`` also prefix sums that do not rise from 0
            to at most the total, or a length beyond its maximum.

    Source: ``flashmla/torch/mha.py``, ``flashmla/triton/mha.py``, ``csrc/sm90/dense_prefill/``,
    ``csrc/sm90/dense_prefill_backward/``.
    """
    _check_tensors(q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    if check_number("dropout_p", dropout_p) != 0.0:
        raise ValueError(f"dropout_p must be 0: dropout is not supported, got {dropout_p}")
    longest_q = check_int("max_seqlen_qo", max_seqlen_qo, 0)
    longest_kv = check_int("max_seqlen_kv", max_seqlen_kv, 0)
    check_bool("causal", causal)
    check_bool("deterministic", deterministic)
    check_bool("is_varlen", is_varlen)
    scale = (
        q.shape[2] ** -0.5
        if softmax_scale is None
        else check_number("softmax_scale", softmax_scale)
    )
    if values_wanted():
        _check_prefix_sums("cu_seqlens_qo", cu_seqlens_qo, q.shape[0], "max_seqlen_qo", longest_q)
        _check_prefix_sums("cu_seqlens_kv", cu_seqlens_kv, k.shape[0], "max_seqlen_kv", longest_kv)
    inputs = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, longest_q, longest_kv, scale, causal)
    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if torch.is_grad_enabled() and needs_grad and not torch.compiler.is_compiling():
        # A tier with no backward is refused now, and not in the middle of the backward pass.
        backend.implementation("mha.backward", q.device)
        return _Attention.apply(deterministic, backend.forced_backend(), *inputs)
    return _forward(*inputs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of q, k and v packed on the last dimension.

    Args:
        qkv: [total, h, 2 * d_qk + d_v]: q, then k, then v of each head.
        cu_seqlens: int32 [sequences + 1], prefix sums of the lengths, from 0.
        max_seqlen: the longest length.
        head_dim_qk: d_qk.

    The other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    check_tensor("qkv", qkv, "[total, h, 2 * d_qk + d_v]")
    d_qk = _packed_head_dim("qkv", qkv, head_dim_qk, 2)
    return flash_attn_varlen_func(
        qkv[..., :d_qk],
        qkv[..., d_qk : 2 * d_qk],
        qkv[..., 2 * d_qk :],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of k and v packed on the last dimension.

    Args:
        kv: [total_kv, h_kv, d_qk + d_v]: k, then v of each head.
        head_dim_qk: d_qk.

    The other arguments, the results and the errors are those of :func:`flash_attn_varlen_func`.
    """
    check_tensor("kv", kv, "[total_kv, h_kv, d_qk + d_v]")
    d_qk = _packed_head_dim("kv", kv, head_dim_qk, 1)
    return flash_attn_varlen_func(
        q,
        kv[..., :d_qk],
        kv[..., d_qk:],
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def _packed_head_dim(name: str, packed: Tensor, head_dim_qk: object, times: int) -> int:
    d_qk = check_int("head_dim_qk", head_dim_qk, 1)
    widths = {qk: times * qk + v for qk, v in HEAD_DIMS}
    if d_qk not in widths:
        raise ValueError(f"head_dim_qk must be one of {sorted(widths)}, got {d_qk}")
    if packed.shape[-1] != widths[d_qk]:
        raise ValueError(
            f"{name} must have a last dimension of {widths[d_qk]} for head_dim_qk {d_qk}, got "
            f"{packed.shape[-1]}: {list(packed.shape)}"
        )
    return d_qk


def _check_tensors(
    q: object, k: object, v: object, cu_seqlens_qo: object, cu_seqlens_kv: object
) -> None:
    query = check_tensor("q", q, "[total_q, h_q, d_qk]", float_dtypes(q))
    key = check_tensor("k", k, "[total_kv, h_kv, d_qk]", (query.dtype,), query.device)
    value = check_tensor("v", v, "[total_kv, h_kv, d_v]", (query.dtype,), query.device)
    check_shape("k", key, (None, None, query.shape[2]), "[total_kv, h_kv, d_qk]")
    check_shape("v", value, (*key.shape[:2], None), "[total_kv, h_kv, d_v]")
    if (query.shape[2], value.shape[2]) not in HEAD_DIMS:
        raise ValueError(
            f"q and v have head sizes (d_qk, d_v) = ({query.shape[2]}, {value.shape[2]}); "
            f"supported are {' and '.join(str(dims) for dims in HEAD_DIMS)}"
        )
    if query.shape[1] == 0 or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"q has {query.shape[1]} heads, which k's {key.shape[1]} do not divide")
    ints = (torch.int32,)
    cu_q = check_tensor("cu_seqlens_qo", cu_seqlens_qo, "[sequences + 1]", ints, query.device)
    cu_kv = check_tensor("cu_seqlens_kv", cu_seqlens_kv, "[sequences + 1]", ints, query.device)
    if cu_q.shape[0] == 0:
        raise ValueError("cu_seqlens_qo must have shape [sequences + 1], got [0]")
    check_shape("cu_seqlens_kv", cu_kv, cu_q.shape, "[sequences + 1]")


def _check_prefix_sums(
    name: str, sums: Tensor, total: int, maximum_name: str, maximum: int
) -> None:
    values = sums.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}[0] must be 0, got {values[0]}")
    for i in range(1, len(values)):
        if not values[i - 1] <= values[i] <= total:
            raise ValueError(
                f"{name}[{i}] is {values[i]}, but prefix sums must not fall (the one before is "
                f"{values[i - 1]}) or pass the number of tokens, {total}"
            )
        if values[i] - values[i - 1] > maximum:
            raise ValueError(
                f"{maximum_name} is {maximum}, but sequence {i - 1} of {name} has "
                f"{values[i] - values[i - 1]} tokens"
            )
