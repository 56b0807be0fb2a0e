"""A step of decoding on random caches, dense and sparse: what stage 06 measures and predicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import flashmla

__all__ = ["DecodeStep", "predicted_us"]


def predicted_us(
    context: int, gbps: float, tflops: float, *, b: int = 64, h_q: int = 128, k: int = 2048
) -> tuple[float, float]:
    """Microseconds of a dense and of a sparse step at these ceilings, launches left out.

    Dense attention reads 1,152 bytes a token. The indexer reads 132 and writes a float32 score,
    the choice reads it, and attention reads 656 bytes of each of k tokens; whichever takes longer,
    bytes or operations, counts.
    """

    def attention(tokens: int, size: int) -> float:
        return b * tokens * max(size / gbps / 1e3, 2 * h_q * (576 + 512) / tflops / 1e6)

    find = b * context * (132 + 4 + 4) / gbps / 1e3
    return attention(context, 1152), find + attention(min(k, context), 656)


class DecodeStep:
    """Random caches for b requests of up to `longest` tokens, a bfloat16 one and an FP8 one of the
    same latents, and an indexer's."""

    def __init__(
        self, b: int, h_q: int, k: int, longest: int, device: str, h_index: int = 64
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16()

        blocks = b * longest // 64
        self.h_q, self.k = h_q, k
        self.pages = normal(blocks, 64, 1, 576)
        self.fp8_pages = flashmla.fp8.pack(self.pages)
        self.index_pages = torch.zeros(blocks, 64, 1, 132, dtype=torch.uint8, device=device)
        slots = torch.arange(blocks * 64, device=device)
        flashmla.fp8.index_append(self.index_pages, slots, normal(blocks * 64, 128))
        self.table = torch.arange(blocks, dtype=torch.int32, device=device).view(b, -1)
        self.q = normal(b, 1, h_q, 576)
        self.q_index, scale = flashmla.fp8.index_pack(normal(b, 1, h_index, 128))
        self.weights = normal(b, 1, h_index).float() * scale

    def _request(self, context: int) -> tuple[Tensor, Tensor]:
        """Block table and lengths, all of them `context`."""
        b = len(self.table)
        lengths = torch.full((b,), context, dtype=torch.int32, device=self.table.device)
        return self.table[:, : -(-context // 64)].contiguous(), lengths

    def dense(self, context: int) -> Callable[[int], Tensor]:
        """The step over all tokens of the bfloat16 cache, to be timed."""
        table, lengths = self._request(context)
        plan = flashmla.get_mla_metadata(lengths, self.h_q, 1)

        def step(_: int) -> Tensor:
            cache = (self.pages, table, lengths)
            return flashmla.flash_mla_with_kvcache(self.q, *cache, 512, *plan)[0]

        return step

    def sparse(self, context: int) -> Callable[[int], Tensor]:
        """The step over the k tokens that the indexer finds, to be timed."""
        table, lengths = self._request(context)

        def step(_: int) -> Tensor:
            logits = flashmla.indexer_logits_paged(
                self.q_index, self.index_pages, self.weights, table, lengths
            )  # [b, 1, context]
            indices = flashmla.topk(logits[:, 0], self.k, lengths, table)[:, None]  # [b, 1, k]
            return flashmla.flash_mla_with_kvcache(
                self.q, self.fp8_pages, None, None, 512, None, is_fp8_kvcache=True, indices=indices
            )[0]

        return step
