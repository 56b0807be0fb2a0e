"""Eight-bit formats, and what a cache that used one would do to attention and to predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

from flashmla.lab.model import MLALM, Activations, ContiguousCache, ModelConfig
from flashmla.reference.fp8 import SMALLEST_AMAX, round_up_to_power_of_two

__all__ = [
    "FORMATS",
    "RoundedCache",
    "divergence",
    "positive_values",
    "products_that_count",
    "relative_error",
    "round_parts",
    "round_trip",
    "score_error",
]

FORMATS: dict[str, tuple[Any, float]] = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0),
    "int8": (np.int8, 127.0),
}
"""Name -> its dtype and the largest value it can say."""


def positive_values(name: str) -> np.ndarray:
    """Every finite positive value of a format, ascending, float64."""
    values = np.arange(256, dtype=np.uint8).view(FORMATS[name][0]).astype(np.float64)
    return np.sort(values[np.isfinite(values) & (values > 0)])


def round_trip(x: np.ndarray, tile: int, name: str = "e4m3") -> np.ndarray:
    """x float32 to codes and back, each `tile` values sharing a scale that is a power of two."""
    dtype, largest = FORMATS[name]
    groups = x.reshape(-1, tile)
    amax = np.maximum(np.abs(groups).max(axis=1, keepdims=True), SMALLEST_AMAX)
    scale = round_up_to_power_of_two(amax / np.float32(largest))
    codes = np.clip(groups / scale, -largest, largest)
    codes = np.rint(codes) if dtype is np.int8 else codes.astype(dtype)
    return (codes.astype(np.float32) * scale).reshape(x.shape)


def round_parts(kv: np.ndarray, nope: bool, rope: bool) -> np.ndarray:
    """Tokens [..., 576] whose NoPE part, RoPE part or both went to e4m3 and back."""
    a, b = kv[..., :512], kv[..., 512:]
    return np.concatenate([round_trip(a, 128) if nope else a, round_trip(b, 64) if rope else b], -1)


def relative_error(got: np.ndarray, exact: np.ndarray, where: Any = ...) -> float:
    """Norm of the difference relative to the norm of `exact`, over the places `where`."""
    return float(np.linalg.norm((got - exact)[where]) / np.linalg.norm(exact[where]))


def score_error(seen: Activations, kv: np.ndarray, columns: slice = slice(None)) -> float:
    """How far the scaled scores of a text move, root mean square, when the cache holds kv
    [s, 576] instead of its own tokens; columns: of these columns' share of the score alone."""
    q = seen.q_absorbed.float().cpu().numpy()[:, :, columns].transpose(1, 0, 2)  # [h, s, columns]
    change = (kv - seen.kv.float().cpu().numpy())[:, columns]
    past = np.tril(np.ones((len(kv), len(kv)), bool))
    moved = (q @ change.T)[:, past] * seen.softmax_scale
    return float(np.sqrt(np.mean(moved**2)))


def products_that_count(seen: Activations, columns: slice, pairs: int = 4000) -> float:
    """(sum |t|)^2 / sum t^2 for the products t = q_c k_c that make up a score: n for n products of
    one size, 1 if a single one is all there is. The median over random causal pairs and heads."""
    rng = np.random.default_rng(0)
    s, h, _ = seen.q_absorbed.shape
    i = rng.integers(0, s, pairs)
    j, head = rng.integers(0, i + 1), rng.integers(0, h, pairs)
    q, kv = (x.double().cpu().numpy()[..., columns] for x in (seen.q_absorbed, seen.kv))
    terms = np.abs(q[i, head] * kv[j])
    return float(np.median(terms.sum(1) ** 2 / (terms**2).sum(1)))


class RoundedCache(ContiguousCache):
    """A cache whose tokens go through `change` ([b, s, 576] float32) before anybody reads them."""

    def __init__(self, config: ModelConfig, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(config)
        self.change = change

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        changed = torch.from_numpy(self.change(kv.float().cpu().numpy()))
        return super().attend(layer, q, changed.to(kv.device, kv.dtype))


def divergence(
    model: MLALM, tokens: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Kullback-Leibler divergence, nats a byte, of the model's predictions through a cache of
    changed tokens from those through an exact one; tokens int64 [b, s]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def predictions(attend: Any) -> torch.Tensor:
        return model.decode_step(tokens, positions, attend).double().log_softmax(-1)

    exact = predictions(ContiguousCache(model.config).attend)
    changed = predictions(RoundedCache(model.config, change).attend)
    return float(F.kl_div(changed, exact, reduction="sum", log_target=True)) / tokens.numel()
