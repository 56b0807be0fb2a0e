"""The online softmax: attention over keys that arrive block by block, and the sink at its end."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["OnlineSoftmax", "apply_sink"]

_NEG_INF = float("-inf")


class OnlineSoftmax:
    """Running maximum, sum of exponentials and weighted values of some query rows.

    Scores are natural exponents: exp(score) is a key's weight. A masked key has score -inf, and
    its value must be finite, since zero times NaN is NaN.
    """

    def __init__(self, rows: tuple[int, ...], d_v: int, device: torch.device) -> None:
        self._maximum = torch.full(rows, _NEG_INF, device=device)
        self._sum = torch.zeros(rows, device=device)
        self._values = torch.zeros(*rows, d_v, device=device)

    def update(self, scores: Tensor, values: Tensor) -> None:
        """Take in a block: scores [*rows, keys] and values [..., keys, d_v], both float32."""
        maximum = torch.maximum(self._maximum, scores.amax(-1))
        # A row that has seen no key yet keeps maximum -inf; -inf - (-inf) would be NaN.
        reference = maximum.masked_fill(maximum == _NEG_INF, 0.0)
        weights = torch.exp(scores - reference.unsqueeze(-1))
        shrink = torch.exp(self._maximum - reference)
        self._maximum = maximum
        self._sum = self._sum * shrink + weights.sum(-1)
        self._values = self._values * shrink.unsqueeze(-1) + weights @ values

    def maximum(self) -> Tensor:
        """The largest score of each row, -inf for a row that saw no key."""
        return self._maximum

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out [*rows, d_v], lse [*rows]); a row that saw no key has out 0 and lse -inf."""
        empty = self._maximum == _NEG_INF
        total = self._sum.masked_fill(empty, 1.0)
        out = self._values / total.unsqueeze(-1)
        lse = (self._maximum + torch.log(total)).masked_fill(empty, _NEG_INF)
        return out, lse


def apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """out * exp(lse) / (exp(lse) + exp(sink)); an empty row (LSE +inf) stays 0.

    out [..., h, d_v], lse [..., h], attn_sink [h].
    """
    if attn_sink is None:
        return out
    share = torch.sigmoid(lse - attn_sink).masked_fill(lse == -_NEG_INF, 0.0)
    return out * share.unsqueeze(-1)
