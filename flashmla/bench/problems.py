"""The tensors of a case: random, paged, in several copies, and what the result has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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
from flashmla.bench.sparse import sparse_decode
from flashmla.bench.timing import copies_for

__all__ = ["MAKERS", "DenseDecode", "Writing", "dense_decode", "writing"]


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
    **dict.fromkeys((MHA_FORWARD, MHA_BACKWARD), prefill),
    "topk": topk,
    "indexer": scores,
    "indexer_paged": cached_scores,
    "dsa_step": step,
    "sparse_decode": sparse_decode,
    **dict.fromkeys(WRITES, writing),
}
"""Who makes the problems of an operation."""
