"""Dense prefill in the benchmark, forward and backward: its problems, and who can do them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import flashmla
from flashmla.bench.cases import MHA_BACKWARD, MHA_FORWARD, Case, PrefillCase
from flashmla.bench.timing import Side

__all__ = ["Prefill", "peers", "prefill"]

D_V = 128
FLASH_ATTENTION_3 = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules that have its functions: the whole package's, and that of a wheel with forward alone."""


@dataclass(frozen=True)
class Prefill:
    """Sequences laid end to end, bfloat16, random normal; so large that no L2 holds them.

    Args:
        q, k, v: [total, h, d].
        d_out: [total, h, 128].
        cu_seqlens: int32 [b + 1].
    """

    case: PrefillCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    cu_seqlens: torch.Tensor
    copies: int = 1

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def longest(self) -> int:
        return int(self.case.lengths().max())

    @torch.no_grad()
    def error(self, result: torch.Tensor, copy: int = 0) -> float:
        """Largest absolute error of out, or of dq, against float64: the first and last 64 queries
        of the last sequence, first head."""
        begin, end = (int(x) for x in self.cu_seqlens[-2:])
        rows = torch.arange(end - begin, device=self.device)
        rows = torch.cat([rows[:64], rows[64:][-64:]])
        q, d_out = self.q[begin:end, 0][rows].double(), self.d_out[begin:end, 0][rows].double()
        k, v = self.k[begin:end, 0].double(), self.v[begin:end, 0].double()
        scores = q @ k.T * self.case.d_qk**-0.5
        if self.case.causal:
            hidden = torch.arange(len(k), device=self.device) > rows[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        p = scores.softmax(-1)
        want = p @ v
        if self.case.op == MHA_BACKWARD:
            d_scores = p * (d_out @ v.T - (d_out * want).sum(-1, keepdim=True))
            want = d_scores @ k * self.case.d_qk**-0.5
        return float((result[begin:end, 0][rows].double() - want).abs().max())

    def side(self) -> Side:
        """Returns (out, lse), or (dq, dk, dv) of a forward pass that was made beforehand."""
        return _side(self, _own)


def prefill(case: Case, device: torch.device, seed: int = 0) -> Prefill:
    """Makes a problem."""
    assert isinstance(case, PrefillCase)
    generator = torch.Generator(device).manual_seed(seed)
    ends = np.concatenate([[0], np.cumsum(case.lengths())]).astype(np.int32)

    def random(d: int) -> torch.Tensor:
        shape = (int(ends[-1]), case.h_q, d)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v, d_out = (random(d) for d in (case.d_qk, case.d_qk, D_V, D_V))
    return Prefill(case, q, k, v, d_out, torch.from_numpy(ends).to(device))


def _own(problem: Prefill) -> Side:
    """This package's forward pass."""

    def forward(copy: int) -> Any:
        return _varlen(flashmla, problem)

    return forward


def _varlen(module: ModuleType, problem: Prefill) -> Any:
    """The call that this package and FlashAttention-3 have under one name."""
    cu_seqlens, longest = problem.cu_seqlens, problem.longest
    return module.flash_attn_varlen_func(
        problem.q,
        problem.k,
        problem.v,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        causal=problem.case.causal,
    )


def peers(device: torch.device, op: str) -> dict[str, Callable[[Any], Side]]:
    """cuDNN through torch, and FlashAttention-3 (forward) where it is installed."""
    if device.type != "cuda" or op not in (MHA_FORWARD, MHA_BACKWARD):
        return {}
    found: dict[str, Callable[[Any], Side]] = {}
    found[f"peer:cudnn-{torch.backends.cudnn.version()}"] = lambda problem: _side(problem, _cudnn)
    if op == MHA_FORWARD and (module := _flash_attention_3_module()) is not None:
        found[f"peer:{_distribution(module) or 'flash-attention-3'}"] = _flash_attention_3
    return found


def _distribution(module: ModuleType) -> str | None:
    """What was installed and has the module, with its version; None for a module from elsewhere."""
    names = importlib.metadata.packages_distributions().get(module.__name__, [])
    return f"{names[0]}-{importlib.metadata.version(names[0])}" if names else None


def _flash_attention_3_module() -> ModuleType | None:
    """The first of its modules that is installed and loads; one that does not, with a warning."""
    for name in FLASH_ATTENTION_3:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            warnings.warn(f"{name} is installed and does not load: {error}", stacklevel=3)
    return None


def _cudnn(problem: Prefill) -> Side:
    """Equal lengths only: torch's operator for others takes 70 ms where ours takes 3."""
    case = problem.case

    def forward(copy: int) -> Any:
        if case.spread:
            raise ValueError("takes sequences of one length")
        q, k, v = (x.transpose(1, 2) for x in _batches(problem))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        return (out.transpose(1, 2).flatten(0, 1),)

    return forward


def _batches(problem: Prefill) -> tuple[torch.Tensor, ...]:
    """q, k and v as [b, s, h, d], where all sequences have one length."""
    shape = problem.case.b, problem.case.s_k
    return tuple(x.unflatten(0, shape) for x in (problem.q, problem.k, problem.v))


def _flash_attention_3(problem: Prefill) -> Side:
    """Sequences of one length as a batch, which it is faster at than at ``cu_seqlens``."""
    peer = _flash_attention_3_module()
    assert peer is not None

    def call(copy: int) -> Any:
        if not problem.case.spread:
            out = peer.flash_attn_func(*_batches(problem), causal=problem.case.causal)
            return ((out[0] if isinstance(out, tuple) else out).flatten(0, 1),)
        out = _varlen(peer, problem)
        return out if isinstance(out, tuple) else (out,)

    return call


def _side(problem: Prefill, forward: Callable[[Prefill], Side]) -> Side:
    """A forward pass, or the gradients of one that was made beforehand."""
    return forward(problem) if problem.case.op == MHA_FORWARD else _backward(problem, forward)


def _backward(problem: Prefill, forward: Callable[[Prefill], Side]) -> Side:
    """Gradients of a result that the first call makes, so that it is made by the same tier.

    Autograd goes back on the stream of the forward pass, and then waits for the streams on which
    the leaves were first used. A graph is captured on one stream and can wait for no other, so each
    stream has its own leaves (the same memory) and its own result, which its graph goes on reading.
    """
    made: dict[int, tuple[Prefill, torch.Tensor]] = {}

    def call(copy: int) -> Any:
        on_card = problem.device.type == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if on_card else 0
        if stream not in made:
            q, k, v = (x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))
            leaves = replace(problem, q=q, k=k, v=v)
            made[stream] = leaves, forward(leaves)(0)[0]
        leaves, out = made[stream]
        inputs = (leaves.q, leaves.k, leaves.v)
        return torch.autograd.grad(out, inputs, problem.d_out, retain_graph=True)

    return call
