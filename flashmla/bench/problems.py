"""The tensors of a case: random, paged, in several copies, and what the result has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import flashmla
from flashmla.bench.cases import (
    BF16,
    D_INDEX,
    D_QK,
    D_V,
    FP8_TOKEN,
    INDEX_TOKEN,
    MHA_BACKWARD,
    MHA_FORWARD,
    WRITES,
    Case,
)
from flashmla.bench.indexing import cached_scores, scores, step, topk
from flashmla.bench.mha import prefill
from flashmla.bench.sparse import sparse_decode, sparse_prefill, values
from flashmla.bench.timing import Side, copies_for

__all__ = [
    "MAKERS",
    "DenseDecode",
    "DenseDecodeFp8",
    "Writing",
    "dense_decode",
    "dense_decode_fp8",
    "writing",
]


@dataclass(frozen=True)
class DenseDecode:
    """A dense decode problem.

    Args:
        q: [b, s_q, h_q, 576], bfloat16, random normal.
        caches: copies [blocks, page, h_kv, 576] with different contents; a call uses one of them.
        block_table: [b, max_blocks] int32, pages scattered over the cache at random.
        cache_seqlens: [b] int32.
    """

    case: Case
    q: torch.Tensor
    caches: tuple[torch.Tensor, ...]
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def scale(self) -> float:
        return float(D_QK**-0.5)

    def reference(self, sequence: int, copy: int = 0) -> torch.Tensor:
        """out [s_q, h_q, 512] of one sequence, from the formula in float64."""
        length = int(self.cache_seqlens[sequence])
        page, s_q = self.case.page, self.case.s_q
        pages = self.block_table[sequence, : -(-length // page)].long()
        keys = self.caches[copy][pages].flatten(0, 1)[:length].double()
        # Query heads in groups that share a key head, so that no key is ever repeated.
        q = self.q[sequence].double().unflatten(1, (self.case.h_kv, -1))
        scores = torch.einsum("qhgd,khd->qhgk", q, keys) * self.scale
        if self.case.causal:
            ends = torch.arange(length - s_q, length, device=scores.device)
            unseen = torch.arange(length, device=scores.device)[None] > ends[:, None]
            scores = scores.masked_fill(unseen[:, None, None], float("-inf"))
        return torch.einsum("qhgk,khd->qhgd", scores.softmax(-1), keys[..., :D_V]).flatten(1, 2)

    def side(self, caches: tuple[torch.Tensor, ...] | None = None) -> Side:
        """Our call, over other caches than these if given: returns (out, lse). Planned once, as
        callers do."""
        caches, case = caches or self.caches, self.case
        fp8 = caches[0].dtype == torch.uint8
        metadata, num_splits = flashmla.get_mla_metadata(
            self.cache_seqlens, case.s_q * case.h_q // case.h_kv, case.h_kv
        )

        def call(copy: int) -> Any:
            return flashmla.flash_mla_with_kvcache(
                self.q,
                caches[copy],
                self.block_table,
                self.cache_seqlens,
                D_V,
                metadata,
                num_splits,
                softmax_scale=self.scale,
                causal=case.causal,
                is_fp8_kvcache=fp8,
            )

        return call

    def error(self, out: torch.Tensor, copy: int = 0, sequences: int = 2) -> float:
        """Largest absolute error of out [b, s_q, h_q, 512], over the first and last sequences."""
        chosen = sorted({0, self.case.b - 1})[:sequences]
        wrong = [(out[i].double() - self.reference(i, copy)).abs().max() for i in chosen]
        return float(torch.stack(wrong).max())


def dense_decode(case: Case, device: torch.device, seed: int = 0) -> DenseDecode:
    """Makes a problem; the copies are as many as keep a call from finding its cache in L2."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.from_numpy(case.lengths()).to(device)
    most = -(-int(lengths.max()) // case.page)
    blocks = case.b * most
    shape = (blocks, case.page, case.h_kv, D_QK)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    table = torch.randperm(blocks, generator=generator, device=device).to(torch.int32)
    bytes_each = 2 * blocks * case.page * case.h_kv * D_QK
    return DenseDecode(
        case=case,
        q=random(case.b, case.s_q, case.h_q, D_QK),
        caches=tuple(random(*shape) for _ in range(copies_for(bytes_each, device))),
        block_table=table.view(case.b, most),
        cache_seqlens=lengths,
    )


@dataclass(frozen=True)
class DenseDecodeFp8:
    """Dense decode over the FP8 cache.

    Args:
        plain: the same problem over caches of bfloat16.
        caches: copies [blocks, page, 1, 656] uint8: those, packed.
    """

    plain: DenseDecode
    caches: tuple[torch.Tensor, ...]

    @property
    def case(self) -> Case:
        return self.plain.case

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.plain.device

    def error(self, out: torch.Tensor, copy: int = 0) -> float:
        """Largest absolute error of out [b, s_q, h_q, 512], over the first and last sequences,
        beside what the bytes are worth; the plain caches' results miss that by the rounding."""
        worst = 0.0
        for i in sorted({0, self.case.b - 1}):
            pages = self.plain.block_table[i, : -(-int(self.plain.cache_seqlens[i]) // 64)].long()
            used = values(self.caches[copy][pages].flatten(0, 2))
            alone = replace(
                self.plain,
                q=self.plain.q[i : i + 1],
                caches=(used.view(len(pages), self.case.page, 1, D_QK),),
                block_table=torch.arange(len(pages), device=self.device)[None],
                cache_seqlens=self.plain.cache_seqlens[i : i + 1],
            )
            worst = max(worst, float((out[i].double() - alone.reference(0)).abs().max()))
        return worst

    def side(self) -> Side:
        """Our call: returns (out, lse)."""
        return self.plain.side(self.caches)


def dense_decode_fp8(case: Case, device: torch.device, seed: int = 0) -> DenseDecodeFp8:
    """Makes a problem; copies by the bytes of the smaller caches."""
    plain = dense_decode(case, device, seed)
    return DenseDecodeFp8(plain, tuple(flashmla.fp8.pack(cache) for cache in plain.caches))


@dataclass(frozen=True)
class Writing:
    """Tokens to be written to a cache.

    Args:
        x: copies [tokens, d], bfloat16, random normal.
        caches: copies [blocks, 64, 1, width], as many tokens as are written, or a page at least.
        slots: [tokens] int32, all different, at random.
    """

    case: Case
    x: tuple[torch.Tensor, ...]
    caches: tuple[torch.Tensor, ...]
    slots: torch.Tensor

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.slots.device

    def error(self, result: torch.Tensor, copy: int = 0) -> float:
        """The share of the cache's bytes that are not what the torch tier writes."""
        from flashmla.torch import fp8, paged_kv

        want, x = self.caches[copy].clone(), self.x[copy]
        if self.case.op == "paged_append":
            paged_kv.append(want, self.slots, x.unsqueeze(1))
        else:
            append = fp8.append if self.case.op == "fp8_append" else fp8.index_append
            append(want, self.slots, x)
        return float((result.view(torch.uint8) != want.view(torch.uint8)).float().mean())


def writing(case: Case, device: torch.device, seed: int = 0) -> Writing:
    """Makes a problem of writing tokens; copies as for decode."""
    generator = torch.Generator(device).manual_seed(seed)
    d = D_INDEX if case.op == "index_append" else D_QK
    blocks = -(-case.tokens // case.page)
    width = {"paged_append": D_QK, "fp8_append": FP8_TOKEN, "index_append": INDEX_TOKEN}[case.op]
    dtype = torch.bfloat16 if case.op == "paged_append" else torch.uint8
    copies = range(copies_for(max(BF16 * d, WRITES[case.op] - BF16 * d) * case.tokens, device))

    def random() -> torch.Tensor:
        x = torch.randn(case.tokens, d, generator=generator, device=device)
        return x.to(torch.bfloat16)

    slots = torch.randperm(blocks * case.page, generator=generator, device=device)
    return Writing(
        case=case,
        x=tuple(random() for _ in copies),
        caches=tuple(
            torch.zeros(blocks, case.page, 1, width, dtype=dtype, device=device) for _ in copies
        ),
        slots=slots[: case.tokens].to(torch.int32),
    )


MAKERS: dict[str, Callable[[Case, torch.device], Any]] = {
    "dense_decode": dense_decode,
    "dense_decode_fp8": dense_decode_fp8,
    **dict.fromkeys((MHA_FORWARD, MHA_BACKWARD), prefill),
    "topk": topk,
    "indexer": scores,
    "indexer_paged": cached_scores,
    "dsa_step": step,
    "sparse_decode": sparse_decode,
    "sparse_prefill": sparse_prefill,
    **dict.fromkeys(WRITES, writing),
}
"""Who makes the problems of an operation."""
