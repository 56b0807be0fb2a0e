"""The language model behind the lessons: small, but with the kernels' true attention shape.

A byte-level transformer whose attention is MLA as DeepSeek-V2-Lite has it (no low-rank query): a
latent of 512 normalised values and 64 rotated ones a token, heads of 128 + 64 for the scores and
128 for the values. What the kernels need, they get unpadded: `Activations.q_absorbed` [s, h, 576]
against `Activations.kv` [s, 576].

The same weights are read in two ways. `MLALM.forward` builds every head's keys and values (the
MHA view); `MLALM.decode_step` never does: it hands absorbed queries and new latents to an
`attend` function of the caller's, which owns the cache. That the two give the same logits is the
point of lesson 02.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmla.lab.text import VOCAB, decode, encode
from flashmla.reference.mla import MLAWeights

__all__ = [
    "MLALM",
    "Activations",
    "ContiguousCache",
    "MLAttention",
    "ModelConfig",
    "decode",
    "encode",
    "load",
    "rope",
]

# attend(layer, q [b, s_q, h, 576], kv [b, s_q, 576]) -> [b, s_q, h, 512], in latent space
Attend = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. The four of the attention are the kernels'; the others are small."""

    vocab: int = VOCAB
    d_model: int = 160
    n_layers: int = 2
    n_heads: int = 4
    d_latent: int = 512  # NoPE part of the cache, also the value's width in latent space
    d_rope: int = 64
    d_nope: int = 128
    d_v: int = 128
    d_ff: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    # Size of the latents, not learned. Kernels are judged by absolute errors as well as relative
    # ones, and those bounds are made for values of about this size.
    latent_gain: float = 0.125

    @property
    def d_qk(self) -> int:
        """Width of one head's query and key, 192."""
        return self.d_nope + self.d_rope

    @property
    def d_cache(self) -> int:
        """Values that the cache keeps for a token, 576."""
        return self.d_latent + self.d_rope

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(192), also of the absorbed form: its dot products are wider, not other."""
        return self.d_qk**-0.5


def rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates the pairs (x[2i], x[2i + 1]) of the last dimension by position · base^(-2i/d).

    x [..., s, h, d] with positions [..., s]; the angles are computed in float32 and the result is
    in x's dtype.
    """
    d = x.shape[-1]
    frequency = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = positions[..., None, None].float() * frequency
    even, odd = x.float().unflatten(-1, (d // 2, 2)).unbind(-1)
    rotated = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(rotated, -1).flatten(-2).to(x.dtype)


class MLAttention(nn.Module):
    """One layer's attention: the projections, and the two ways of using them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.w_q = nn.Linear(c.d_model, c.n_heads * c.d_qk, bias=False)
        self.w_dkv = nn.Linear(c.d_model, c.d_cache, bias=False)
        self.latent_norm = nn.RMSNorm(c.d_latent, eps=c.norm_eps)
        self.latent_norm.weight.requires_grad_(False).fill_(c.latent_gain)
        self.w_uk = nn.Linear(c.d_latent, c.n_heads * c.d_nope, bias=False)
        self.w_uv = nn.Linear(c.d_latent, c.n_heads * c.d_v, bias=False)
        self.w_o = nn.Linear(c.n_heads * c.d_v, c.d_model, bias=False)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., s, d_model] -> per-head queries [..., s, h, 192], the last 64 rotated."""
        c = self.config
        nope, pe = self.w_q(x).unflatten(-1, (c.n_heads, c.d_qk)).split([c.d_nope, c.d_rope], -1)
        return torch.cat([nope, rope(pe, positions, c.rope_base)], -1)

    def latents(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the cache keeps: x [..., s, d_model] -> [..., s, 576], latent and rotated key."""
        c = self.config
        latent, pe = self.w_dkv(x).split([c.d_latent, c.d_rope], -1)
        pe = rope(pe[..., None, :], positions, c.rope_base)[..., 0, :]
        return torch.cat([self.latent_norm(latent), pe], -1)

    def keys_values(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """The MHA view of latents [..., s, 576]: keys [..., s, h, 192], values [..., s, h, 128]."""
        c = self.config
        latent, pe = kv.split([c.d_latent, c.d_rope], -1)
        k_nope = self.w_uk(latent).unflatten(-1, (c.n_heads, c.d_nope))
        k_pe = pe[..., None, :].expand(*k_nope.shape[:-1], c.d_rope)
        values = self.w_uv(latent).unflatten(-1, (c.n_heads, c.d_v))
        return torch.cat([k_nope, k_pe], -1), values

    def absorb(self, q: Tensor) -> Tensor:
        """Moves W_UK into the query, which then meets latents: [..., h, 192] -> [..., h, 576]."""
        c = self.config
        nope, pe = q.split([c.d_nope, c.d_rope], -1)
        w_uk = self.w_uk.weight.unflatten(0, (c.n_heads, c.d_nope))  # [h, 128, 512]
        return torch.cat([torch.einsum("...hd,hdc->...hc", nope, w_uk), pe], -1)

    def unabsorb(self, out: Tensor) -> Tensor:
        """Attention output in latent space [..., h, 512] -> values [..., h, 128], by W_UV."""
        c = self.config
        w_uv = self.w_uv.weight.unflatten(0, (c.n_heads, c.d_v))  # [h, 128, 512]
        return torch.einsum("...hc,hdc->...hd", out, w_uv)

    def reference_weights(self) -> MLAWeights:
        """The same layer for `flashmla.reference.mla`, float64, heads as an axis of their own.

        The oracle knows a down-projection for queries; here it is the identity, since this model
        has none.
        """
        c = self.config

        def matrix(linear: nn.Linear) -> np.ndarray:
            return linear.weight.detach().T.double().cpu().numpy()  # [in, out]

        def heads(linear: nn.Linear) -> np.ndarray:
            w = matrix(linear)
            return w.reshape(len(w), c.n_heads, -1)  # [in, h, d]

        w_q, down = heads(self.w_q), matrix(self.w_dkv)
        return MLAWeights(
            w_dq=np.eye(c.d_model),
            w_uq=w_q[..., : c.d_nope],
            w_qr=w_q[..., c.d_nope :],
            w_dkv=down[:, : c.d_latent],
            w_kr=down[:, c.d_latent :],
            w_uk=heads(self.w_uk),
            w_uv=heads(self.w_uv),
            w_o=matrix(self.w_o).reshape(c.n_heads, c.d_v, c.d_model),
            kv_gain=self.latent_norm.weight.detach().double().cpu().numpy(),
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Causal self-attention in the MHA view, x [b, s, d_model] -> [b, s, d_model]."""
        q = self.queries(x, positions)
        k, v = self.keys_values(self.latents(x, positions))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.config.softmax_scale,
        )
        return self.w_o(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer layer: attention, then a SwiGLU feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = MLAttention(config)
        self.norm_ff = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.w_in = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.w_out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(self.norm_ff(x)).chunk(2, -1)
        return x + self.w_out(F.silu(gate) * up)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.feed_forward(x + self.attention(self.norm_attention(x), positions))


@dataclass(frozen=True)
class Activations:
    """What one layer's attention sees and does on one text of s tokens; h heads."""

    x: Tensor  # [s, d_model], the attention's input (already normalised)
    q: Tensor  # [s, h, 192], rotated
    k: Tensor  # [s, h, 192]
    v: Tensor  # [s, h, 128]
    q_absorbed: Tensor  # [s, h, 576]
    kv: Tensor  # [s, 576]: what a cache keeps
    maps: Tensor  # [h, s, s] float32: row = query, column = key; rows sum to 1, causal
    softmax_scale: float


class MLALM(nn.Module):
    """The byte-level MLA language model. Tokens are int64; logits are in the weights' dtype."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or ModelConfig()
        self.embedding = nn.Embedding(c.vocab, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.log: dict[str, float] = {}  # how the training went, see flashmla.lab.training

    def layer(self, index: int) -> Block:
        """The block of layer `index`, counted from 0, or from the end if negative."""
        return cast(Block, self.blocks[index])

    def readout(self, x: Tensor) -> Tensor:
        """Hidden states [..., d_model] -> logits [..., vocab], by the transposed embedding."""
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """The naive run, nothing cached: tokens [b, s] or [s] -> logits with vocab behind."""
        return self.readout(self.hidden_states(tokens)[-1])

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream before each block and after the last: [..., s, d_model] each."""
        batch = tokens if tokens.dim() == 2 else tokens[None]
        positions = torch.arange(batch.shape[1], device=batch.device).expand_as(batch)
        states = [self.embedding(batch)]
        for block in self.blocks:
            states.append(block(states[-1], positions))
        return states if tokens.dim() == 2 else [state[0] for state in states]

    @torch.no_grad()
    def activations(self, tokens: Tensor, layer: int = -1) -> Activations:
        """Everything that the attention of `layer` reads and writes for one text, tokens [s]."""
        if tokens.dim() != 1:
            raise ValueError(f"tokens: one text [s] is wanted, got shape {tuple(tokens.shape)}")
        block = self.layer(layer)
        position = torch.arange(len(tokens), device=tokens.device)
        x = block.norm_attention(self.hidden_states(tokens)[range(self.config.n_layers)[layer]])
        q, kv = block.attention.queries(x, position), block.attention.latents(x, position)
        k, v = block.attention.keys_values(kv)
        scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * self.config.softmax_scale
        future = position[None, :] > position[:, None]
        maps = scores.masked_fill(future, float("-inf")).softmax(-1)
        absorbed = block.attention.absorb(q)
        return Activations(x, q, k, v, absorbed, kv, maps, self.config.softmax_scale)

    @torch.no_grad()
    def decode_step(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """New tokens through the absorbed form; `attend` owns the cache.

        tokens and positions [b, s_q]: s_q new tokens of each of b texts, and where they stand in
        it. attend(layer, q [b, s_q, h, 576], kv [b, s_q, 576]) puts the new latents into its
        cache, attends causally over all of the text so far with `config.softmax_scale`, and gives
        [b, s_q, h, 512], any dtype. Returns logits [b, s_q, vocab]. s_q > 1 is a prompt, or
        speculation; s_q = 1 is plain decoding.
        """
        x = self.embedding(tokens)
        for layer in range(self.config.n_layers):
            block = self.layer(layer)
            attention, normed = block.attention, block.norm_attention(x)
            q = attention.absorb(attention.queries(normed, positions))
            out = attend(layer, q, attention.latents(normed, positions)).to(x.dtype)
            x = block.feed_forward(x + attention.w_o(attention.unabsorb(out).flatten(-2)))
        return self.readout(x)


class ContiguousCache:
    """The simplest cache for `decode_step`: latents [b, s, 576] a layer, grown by concatenation."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.kv: list[Tensor | None] = [None] * config.n_layers

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Appends kv and attends over the whole, causally: shapes as `Attend` has them."""
        old = self.kv[layer]
        cache = self.kv[layer] = kv if old is None else torch.cat([old, kv], 1)
        scores = torch.einsum("bihc,bjc->bhij", q, cache) * self.config.softmax_scale
        s_q, s_k = scores.shape[-2:]
        seen = torch.ones(s_q, s_k, dtype=torch.bool, device=q.device).tril(s_k - s_q)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bjc->bihc", weights, cache[..., : self.config.d_latent])


def load(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MLALM:
    """The trained model: from the user's cache folder, or trained now (a minute) and kept there."""
    from flashmla.lab.training import load_or_train

    return load_or_train().to(device=device, dtype=dtype).eval()
