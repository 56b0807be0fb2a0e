"""Problems of sparse attention: queries, each with its own list of tokens, over a cache
(decode) or over latents in a row (prefill)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashmla
from flashmla.bench.cases import D_QK, D_V, Case
from flashmla.bench.timing import Side, copies_for

__all__ = ["SparseDecode", "SparsePrefill", "sparse_decode", "sparse_prefill", "values"]

_PEER_HEADS = (64, 128)  # what the frozen kernels take


@dataclass(frozen=True)
class SparseDecode:
    """A sparse decode problem.

    Args:
        q: [b, s_q, h_q, 576] bfloat16, random normal.
        caches: copies [blocks, page, 1, 656] uint8, random normal values packed; or as bfloat16,
            [blocks, page, 1, 576].
        indices: [b, s_q, topk] int32: tokens of the query's own sequence, each once.
    """

    case: Case
    q: Tensor
    caches: tuple[Tensor, ...]
    indices: Tensor

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def scale(self) -> float:
        return float(D_QK**-0.5)

    def error(self, out: Tensor, copy: int = 0) -> float:
        """Largest absolute error of out [b, s_q, h_q, 512], over the first and last sequences."""
        worst = [0.0]
        for i in {0, self.case.b - 1}:
            for s in range(self.case.s_q):
                keys = values(self.caches[copy].flatten(0, 2)[self.indices[i, s].long()])
                scores = self.q[i, s].double() @ keys.T * self.scale
                want = scores.softmax(-1) @ keys[:, :D_V]
                worst.append(float((out[i, s].double() - want).abs().max()))
        return max(worst)

    def side(self) -> Side:
        """Our call: returns (out, lse)."""

        def call(copy: int) -> Any:
            return flashmla.flash_mla_with_kvcache(
                self.q, self.caches[copy], None, None, D_V, None, softmax_scale=self.scale,
                is_fp8_kvcache=self.case.cache != "bf16", indices=self.indices,
            )  # fmt: skip

        return call

    def peer(self) -> Side:
        """The frozen Hopper kernels, whose queries are padded to 64 or 128 heads beforehand."""
        module = importlib.import_module("flash_mla")
        plan, _ = module.get_mla_metadata()
        heads = next(h for h in _PEER_HEADS if h >= self.case.h_q)
        q = torch.nn.functional.pad(self.q, (0, 0, 0, heads - self.case.h_q))
        caches = [cache.view(torch.float8_e4m3fn) for cache in self.caches]

        def call(copy: int) -> Any:
            out, lse = module.flash_mla_with_kvcache(
                q, caches[copy], None, None, D_V, plan, softmax_scale=self.scale,
                is_fp8_kvcache=True, indices=self.indices, use_legacy=True,
            )  # fmt: skip
            return out[:, :, : self.case.h_q], lse[:, : self.case.h_q]

        return call


def values(tokens: Tensor) -> Tensor:
    """What tokens of a cache [n, 656 bytes] are worth, or [n, 576] as they are: float64 [n, 576].

    A code times its scale is exact in float64, as it is not in float32.
    """
    if tokens.dtype.itemsize > 1:
        return tokens.double()
    fields = tokens.view(torch.uint8).split_with_sizes((512, 16, 128), dim=1)
    codes, scales, rope = (
        field.contiguous().view(dtype).double()
        for field, dtype in zip(fields, (torch.float8_e4m3fn, torch.float32, torch.bfloat16))
    )
    return torch.cat([codes * scales.repeat_interleave(128, dim=1), rope], dim=1)


def sparse_decode(case: Case, device: torch.device, seed: int = 0) -> SparseDecode:
    """Makes a problem; copies as for dense decode, by the bytes that a call reads."""
    g = torch.Generator(device).manual_seed(seed)
    blocks = case.b * -(-case.s_k // case.page)
    tokens = blocks * case.page

    def stored(n: int) -> Tensor:
        x = torch.randn(n, D_QK, generator=g, device=device).to(torch.bfloat16)
        return x if case.cache == "bf16" else flashmla.fp8.pack(x, case.cache == "fp8")

    def cache() -> Tensor:
        parts = [min(1 << 18, tokens - at) for at in range(0, tokens, 1 << 18)]
        return torch.cat([stored(n) for n in parts]).view(blocks, case.page, 1, -1)

    chosen = [
        torch.randperm(case.s_k, generator=g, device=device)[: case.topk] + i * (tokens // case.b)
        for i in range(case.b)
        for _ in range(case.s_q)
    ]
    q = torch.randn(case.b, case.s_q, case.h_q, D_QK, generator=g, device=device)
    return SparseDecode(
        case=case,
        q=q.to(torch.bfloat16),
        caches=tuple(cache() for _ in range(copies_for(case.bytes_moved, device))),
        indices=torch.stack(chosen).view(case.b, case.s_q, case.topk).to(torch.int32),
    )


@dataclass(frozen=True)
class SparsePrefill:
    """A sparse prefill problem.

    Args:
        q: [s_q, h_q, 576] bfloat16, random normal.
        kvs: copies [s_kv, 1, 576] bfloat16, random normal.
        indices: [s_q, 1, topk] int32: tokens anywhere, each once.
    """

    case: Case
    q: Tensor
    kvs: tuple[Tensor, ...]
    indices: Tensor

    @property
    def copies(self) -> int:
        return len(self.kvs)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def scale(self) -> float:
        return float(D_QK**-0.5)

    def error(self, out: Tensor, copy: int = 0) -> float:
        """Largest absolute error of out [s_q, h_q, 512], over the first and last queries."""
        worst = [0.0]
        for i in (*range(min(4, self.case.s_q)), self.case.s_q - 1):
            keys = self.kvs[copy][self.indices[i, 0].long(), 0].double()
            want = (self.q[i].double() @ keys.T * self.scale).softmax(-1) @ keys[:, :D_V]
            worst.append(float((out[i].double() - want).abs().max()))
        return max(worst)

    def side(self) -> Side:
        """Our call: returns (out, max_logits, lse)."""

        def call(copy: int) -> Any:
            return flashmla.flash_mla_sparse_fwd(self.q, self.kvs[copy], self.indices, self.scale)

        return call

    def peer(self) -> Side:
        """The frozen Hopper kernel, whose queries are padded to 64 or 128 heads beforehand."""
        module = importlib.import_module("flash_mla")
        heads = next(h for h in _PEER_HEADS if h >= self.case.h_q)
        q = torch.nn.functional.pad(self.q, (0, 0, 0, heads - self.case.h_q))

        def call(copy: int) -> Any:
            out, *rows = module.flash_mla_sparse_fwd(
                q, self.kvs[copy], self.indices, self.scale, use_legacy=True
            )
            return out[:, : self.case.h_q], *rows

        return call


def sparse_prefill(case: Case, device: torch.device, seed: int = 0) -> SparsePrefill:
    """Makes a problem; copies as for dense decode, by the bytes of the latents."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(torch.bfloat16)

    chosen = [
        torch.randperm(case.s_k, generator=g, device=device)[: case.topk].to(torch.int32)
        for _ in range(case.s_q)
    ]
    return SparsePrefill(
        case=case,
        q=normal(case.s_q, case.h_q, D_QK),
        kvs=tuple(normal(case.s_k, 1, D_QK) for _ in range(copies_for(case.bytes_moved, device))),
        indices=torch.stack(chosen).unsqueeze(1),
    )
