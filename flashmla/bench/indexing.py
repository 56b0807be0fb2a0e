"""Problems of choosing tokens: the indexer's scores, of a prompt and of cached keys, top-k, and the
whole step of sparse attention that they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import flashmla
from flashmla.bench.cases import D_INDEX, D_QK, D_V, FP8_TOKEN, INDEX_TOKEN, Case
from flashmla.bench.timing import Side, copies_for

__all__ = ["CachedScores", "Scores", "Step", "TopK", "cached_scores", "scores", "step", "topk"]


@dataclass(frozen=True)
class TopK:
    """Rows to choose from.

    Args:
        logits: copies [b, s_k] float32, random normal.
    """

    case: Case
    logits: tuple[torch.Tensor, ...]

    @property
    def copies(self) -> int:
        return len(self.logits)

    @property
    def device(self) -> torch.device:
        return self.logits[0].device

    def error(self, indices: torch.Tensor, copy: int = 0) -> float:
        """The share of rows that are not chosen as a stable sort of float64 chooses."""
        best = self.logits[copy].double().sort(dim=1, descending=True, stable=True).indices
        want = best[:, : self.case.topk].sort(dim=1).values
        return float((indices.sort(dim=1).values != want).any(dim=1).float().mean())

    def side(self) -> Side:
        """Our call: returns (indices,)."""
        return lambda copy: (flashmla.topk(self.logits[copy], self.case.topk),)

    def peer(self) -> Side:
        """torch's, which leaves the order of the indices and the choice among equals open."""
        return lambda copy: (torch.topk(self.logits[copy], self.case.topk, sorted=False).indices,)


def topk(case: Case, device: torch.device, seed: int = 0) -> TopK:
    """Makes a problem; copies keep rows from being found in L2."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (case.b, case.s_k)
    copies = range(copies_for(4 * case.b * case.s_k, device))
    return TopK(case, tuple(torch.randn(shape, generator=g, device=device) for _ in copies))


@dataclass(frozen=True)
class Scores:
    """Indexer scores of a prompt, every query against every key.

    Args:
        q: [s_q, h_q, 128] float8_e4m3fn, random normal; k: [s_k, 128], the same.
        k_scale: [s_k] float32; weights: [s_q, h_q] float32, random normal.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    weights: torch.Tensor
    copies: int = 1  # the result alone is larger than L2

    @property
    def device(self) -> torch.device:
        return self.q.device

    def error(self, logits: torch.Tensor, copy: int = 0) -> float:
        """The largest error of the first and the last query's scores."""
        ends = [0, -1]
        dots = torch.relu(self.q[ends].double() @ self.k.double().T)  # [2, h_q, s_k]
        want = (self.weights[ends].double().unsqueeze(1) @ dots).squeeze(1) * self.k_scale
        return float((logits[ends] - want).abs().max())

    def side(self) -> Side:
        """Our call: returns (logits,)."""
        start = torch.zeros(self.case.s_q, dtype=torch.int32, device=self.device)
        end = torch.full_like(start, self.case.s_k)
        arguments = (self.q, self.k, self.k_scale, self.weights, start, end)
        return lambda copy: (flashmla.indexer_logits(*arguments),)


def scores(case: Case, device: torch.device, seed: int = 0) -> Scores:
    """Makes a problem."""
    g = torch.Generator(device).manual_seed(seed)
    return Scores(
        case=case,
        q=_codes(g, device, case.s_q, case.h_q, D_INDEX),
        k=_codes(g, device, case.s_k, D_INDEX),
        k_scale=torch.rand(case.s_k, generator=g, device=device),
        weights=torch.randn(case.s_q, case.h_q, generator=g, device=device),
    )


@dataclass(frozen=True)
class CachedScores:
    """Indexer scores of each request's newest queries over its cached keys.

    Args:
        q: [b, s_q, h_q, 128] float8_e4m3fn; weights: [b, s_q, h_q] float32; random normal.
        caches: copies [blocks, 64, 1, 132] uint8.
        block_table: [b, max_blocks] int32, pages scattered over the cache at random.
        lengths: [b] int32.
    """

    case: Case
    q: torch.Tensor
    caches: tuple[torch.Tensor, ...]
    weights: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def error(self, logits: torch.Tensor, copy: int = 0) -> float:
        """The largest error of the last query's scores of the last request."""
        length = int(self.lengths[-1])
        pages = self.caches[copy][self.block_table[-1, : -(-length // 64)].long()].flatten(1)
        codes = pages[:, : 64 * D_INDEX].reshape(-1, D_INDEX)[:length].view(torch.float8_e4m3fn)
        k_scale = pages[:, 64 * D_INDEX :].contiguous().view(torch.float32).flatten()[:length]
        dots = torch.relu(self.q[-1, -1].double() @ codes.double().T)  # [h_q, length]
        want = self.weights[-1, -1].double() @ dots * k_scale
        return float((logits[-1, -1, :length] - want).abs().max())

    def side(self) -> Side:
        """Our call: returns (logits,)."""

        def call(copy: int) -> Any:
            cache = self.caches[copy]
            return (
                flashmla.indexer_logits_paged(
                    self.q, cache, self.weights, self.block_table, self.lengths
                ),
            )

        return call


def cached_scores(case: Case, device: torch.device, seed: int = 0) -> CachedScores:
    """Makes a problem; copies keep keys from being found in L2."""
    g = torch.Generator(device).manual_seed(seed)
    lengths = torch.from_numpy(case.lengths()).to(device)
    most = -(-int(lengths.max()) // 64)
    blocks = case.b * most

    def cache() -> torch.Tensor:
        pages = torch.empty(blocks, 64 * INDEX_TOKEN, dtype=torch.uint8, device=device)
        for page in pages.split(8192):
            codes = _codes(g, device, len(page), 64 * D_INDEX)
            page[:, : 64 * D_INDEX] = codes.view(torch.uint8)
            page[:, 64 * D_INDEX :] = torch.rand(len(page), 64, generator=g, device=device).view(
                torch.uint8
            )
        return pages.view(blocks, 64, 1, INDEX_TOKEN)

    copies = range(copies_for(blocks * 64 * INDEX_TOKEN, device))
    return CachedScores(
        case=case,
        q=_codes(g, device, case.b, case.s_q, case.h_q, D_INDEX),
        caches=tuple(cache() for _ in copies),
        weights=torch.randn(case.b, case.s_q, case.h_q, generator=g, device=device),
        block_table=torch.randperm(blocks, generator=g, device=device).int().view(case.b, most),
        lengths=lengths,
    )


@dataclass(frozen=True)
class Step:
    """A decode step of sparse attention: scores, choice, attention over the chosen tokens.

    Args:
        scores: the indexer's problem; its block table serves the attention, too.
        q: [b, s_q, h_q, 576], bfloat16, random normal.
        caches: copies [blocks, 64, 1, 656] uint8, as many as the indexer's.
    """

    case: Case
    scores: CachedScores
    q: torch.Tensor
    caches: tuple[torch.Tensor, ...]

    @property
    def copies(self) -> int:
        return len(self.caches)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def indices(self, copy: int) -> torch.Tensor:
        """What our indexer and top-k choose, [b, s_q, topk], in cache coordinates."""
        s, s_q = self.scores, self.case.s_q
        (logits,) = s.side()(copy)
        table = s.block_table.repeat_interleave(s_q, dim=0) if s_q > 1 else s.block_table
        chosen = flashmla.topk(logits.flatten(0, 1), self.case.topk, None, table)
        return chosen.unflatten(0, (self.case.b, s_q))

    def error(self, out: torch.Tensor, copy: int = 0) -> float:
        """The largest error of the last query's attention over the tokens chosen for it."""
        index = self.indices(copy)[-1, -1].long()
        tokens = self.caches[copy].flatten(0, 2)[index[index >= 0]]
        keys = flashmla.fp8.unpack(tokens).double()
        weights = (self.q[-1, -1].double() @ keys.T * D_QK**-0.5).softmax(-1)
        return float((out[-1, -1].double() - weights @ keys[:, :D_V]).abs().max())

    def side(self) -> Side:
        """Our calls: returns (out, lse)."""

        def call(copy: int) -> Any:
            return flashmla.flash_mla_with_kvcache(
                self.q,
                self.caches[copy],
                None,
                None,
                D_V,
                None,
                is_fp8_kvcache=True,
                indices=self.indices(copy),
            )

        return call


def step(case: Case, device: torch.device, seed: int = 0) -> Step:
    """Makes a problem."""
    indexer = cached_scores(case.parts[0], device, seed)
    g = torch.Generator(device).manual_seed(seed + 1)
    blocks = indexer.caches[0].shape[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16)

    def cache() -> torch.Tensor:
        pages = torch.empty(blocks, 64, 1, FP8_TOKEN, dtype=torch.uint8, device=device)
        for part in pages.split(2048):
            tokens = flashmla.fp8.pack(random(len(part) * 64, D_QK))
            part.copy_(tokens.view(torch.uint8).view(part.shape))
        return pages

    return Step(
        case=case,
        scores=indexer,
        q=random(case.b, case.s_q, case.h_q, D_QK),
        caches=tuple(cache() for _ in indexer.caches),
    )


def _codes(g: torch.Generator, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=g, device=device).to(torch.float8_e4m3fn)
