"""An indexer for each layer of the lesson model, warmed up to find what dense attention looks at.

DeepSeek's lightning indexer, small: a few heads whose queries all meet one key a token,

    logit(t, s) = sum over heads of w(t, h) · ReLU(q(t, h) · k(s)),

trained while the model stands still. The target of query t is the mean of the heads' attention
maps, and the loss is the Kullback-Leibler divergence from it of the softmax of the logits: the
order of the logits is all that is used later, and that loss puts what has weight in front.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmla import fp8
from flashmla.lab import text, training
from flashmla.lab.model import MLALM, rope

__all__ = [
    "Indexer",
    "Indexers",
    "Recipe",
    "best_of_blocks",
    "dense_target",
    "layer_inputs",
    "load",
    "mass_kept",
    "predictions",
    "recipe_for",
    "train",
]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to warm up: `rows` queries of a stretch of `context` bytes at each step, the stretches
    in turn."""

    heads: int = 32
    steps: int = 96
    stretches: int = 24
    context: int = 2048
    rows: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 10
    seed: int = 128
    relu: bool = True


class Indexer(nn.Module):
    """The indexer of one layer: x [s, d_model] -> queries, keys and weights; heads of 128, of
    which 64 dimensions are rotated."""

    head_dim, rope_dim = 128, 64

    def __init__(self, d_model: int, heads: int, relu: bool = True) -> None:
        super().__init__()
        self.heads, self.relu = heads, relu
        self.w_q = nn.Linear(d_model, heads * self.head_dim, bias=False)
        self.w_k = nn.Linear(d_model, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.w_weights = nn.Linear(d_model, heads, bias=False)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [s, d_model] at positions [s] -> [s, h, 128]."""
        q = self.w_q(x).unflatten(-1, (self.heads, self.head_dim))
        turned, plain = q.split([self.rope_dim, self.head_dim - self.rope_dim], -1)
        return torch.cat([rope(turned, positions), plain], -1)

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [s, d_model] at positions [s] -> [s, 128]: what the indexer's cache keeps."""
        k = self.k_norm(self.w_k(x))
        turned, plain = k.split([self.rope_dim, self.head_dim - self.rope_dim], -1)
        return torch.cat([rope(turned[:, None], positions)[:, 0], plain], -1)

    def weights(self, x: Tensor) -> Tensor:
        """x [s, d_model] -> [s, h], with 1/sqrt(h · 128) in them."""
        return self.w_weights(x) * (self.heads * self.head_dim) ** -0.5

    # region: logits
    def forward(self, x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Logits [rows, s] of the queries at `rows` for every token of x [s, d_model]."""
        q, k = self.queries(x[rows], positions[rows]), self.keys(x, positions)
        scores = torch.einsum("ihd,jd->hij", q, k)
        scores = scores.relu() if self.relu else scores
        logits = torch.einsum("ih,hij->ij", self.weights(x[rows]), scores)
        return logits.masked_fill(positions > positions[rows, None], float("-inf"))

    # endregion: logits

    # region: quantised
    @torch.no_grad()
    def quantised(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `flashmla.indexer_logits` takes, for x [s, d_model]: codes of the queries at `rows`
        [rows, h, 128] and of all keys [s, 128], scales [s], weights [rows, h] with q's scales."""
        positions = torch.arange(len(x), device=x.device)
        q = fp8.rotate(self.queries(x[rows], positions[rows]))
        q_codes, q_scale = fp8.index_pack(q)
        k_codes, k_scale = fp8.index_pack(fp8.rotate(self.keys(x, positions)))
        return q_codes, k_codes, k_scale, self.weights(x[rows]) * q_scale

    # endregion: quantised


class Indexers(nn.Module):
    """One indexer a layer; `log` says how their warm-up went."""

    def __init__(self, layers: int, d_model: int, recipe: Recipe) -> None:
        super().__init__()
        made = (Indexer(d_model, recipe.heads, recipe.relu) for _ in range(layers))
        self.layers = nn.ModuleList(made)
        self.log: dict[str, float] = {}

    def __getitem__(self, layer: int) -> Indexer:
        return cast(Indexer, self.layers[layer])


@torch.no_grad()
def layer_inputs(model: MLALM, tokens: Tensor) -> list[Tensor]:
    """What each layer's attention reads for one text, tokens [s] -> [s, d_model] each."""
    positions = torch.arange(len(tokens), device=tokens.device)[None]
    x, inputs = model.embedding(tokens)[None], []
    for layer in range(model.config.n_layers):
        if layer:
            x = model.layer(layer - 1)(x, positions)
        inputs.append(model.layer(layer).norm_attention(x)[0])
    return inputs


@torch.no_grad()
def dense_target(model: MLALM, layer: int, x: Tensor, rows: Tensor) -> Tensor:
    """The dense attention of the queries at `rows`, mean over the heads: [rows, s], causal."""
    attention = model.layer(layer).attention
    position = torch.arange(len(x), device=x.device)
    k, _ = attention.keys_values(attention.latents(x, position))
    q = attention.queries(x[rows], position[rows])
    scores = torch.einsum("ihd,jhd->hij", q, k) * model.config.softmax_scale
    future = position > position[rows, None]
    return scores.masked_fill_(future, float("-inf")).softmax(-1).mean(0)


# region: loss
def loss_of(indexer: Indexer, x: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Mean divergence, nats, of the softmax of the logits from the target [rows, s]."""
    position = torch.arange(len(x), device=x.device)
    guess = indexer(x, position, rows).log_softmax(-1)
    nothing = target == 0  # the future, where the guess is -inf: 0 · log 0 counts as 0
    guess = guess.masked_fill(nothing, 0.0)
    return F.kl_div(guess, target, reduction="sum") / len(rows)


# endregion: loss


def train(
    model: MLALM,
    recipe: Recipe | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Indexers:
    """Indexers warmed up against the model's dense attention, on the model's device.

    The log: divergence_before and divergence_after (held-out text, nats, mean over the layers),
    seconds, steps.
    """
    recipe = recipe or Recipe()
    device, tokens = model.embedding.weight.device, text.split()[0]
    indexers = _fresh(model, recipe).to(device)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(indexers.parameters(), recipe.learning_rate, (0.9, 0.98))
    log = {"divergence_before": _held_out(model, indexers, recipe), "steps": float(recipe.steps)}
    began = time.perf_counter()
    inputs = []
    for _ in range(recipe.stretches):
        start = int(torch.randint(len(tokens) - recipe.context, (), generator=generator))
        inputs.append(layer_inputs(model, tokens[start : start + recipe.context].to(device)))
    for step in range(recipe.steps):
        rate = min((step + 1) / recipe.warm_up, 1 - step / recipe.steps)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate
        rows = torch.randint(recipe.context, (recipe.rows,), generator=generator).to(device)
        loss = _loss(model, indexers, inputs[step % recipe.stretches], rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(indexers.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 19:
            report(f"step {step + 1} of {recipe.steps}: {loss.item():.2f} nats from dense")
    log["seconds"] = time.perf_counter() - began
    log["divergence_after"] = _held_out(model, indexers, recipe)
    indexers.log = log
    return indexers.eval()


def _fresh(model: MLALM, recipe: Recipe) -> Indexers:
    """Untrained indexers: normal weights of variance 1/fan-in, from the recipe's seed."""
    indexers = Indexers(model.config.n_layers, model.config.d_model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for p in indexers.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return indexers


def _loss(model: MLALM, indexers: Indexers, inputs: list[Tensor], rows: Tensor) -> Tensor:
    """Mean over the layers of what each indexer loses on the inputs [s, d_model] of one stretch."""
    losses = [
        loss_of(indexers[layer], x, dense_target(model, layer, x, rows), rows)
        for layer, x in enumerate(inputs)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def _held_out(model: MLALM, indexers: Indexers, recipe: Recipe) -> float:
    device = model.embedding.weight.device
    tokens = text.held_out(recipe.context).to(device)
    rows = torch.linspace(0, recipe.context - 1, recipe.rows, device=device).long()
    return float(_loss(model, indexers, layer_inputs(model, tokens), rows))


def weights_path(model: MLALM, recipe: Recipe) -> Path:
    """Where the indexers of this model and recipe are kept, whether or not they are there yet."""
    digest = hashlib.sha256(training.weights_path(model.config).name.encode())
    digest.update(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    digest.update(training.code_of(Path(__file__)))
    return training.weights_path().parent / f"lesson-indexer-{digest.hexdigest()[:16]}.pt"


def recipe_for(model: MLALM, *, relu: bool = True) -> Recipe:
    """The lessons' recipe: contexts of 2,048 bytes on a CPU, of 16,384 on a card."""
    on_card = model.embedding.weight.device.type == "cuda"
    return Recipe(context=16_384 if on_card else 2048, relu=relu)


def load(model: MLALM, recipe: Recipe | None = None) -> Indexers:
    """The warmed-up indexers of the trained lesson model, on its device: read if they were kept,
    else trained (under a minute on two cores), then kept; by `recipe_for` unless told otherwise."""
    recipe = recipe or recipe_for(model)
    path, device = weights_path(model, recipe), model.embedding.weight.device
    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
        indexers = _fresh(model, recipe)
        indexers.load_state_dict(kept["weights"])
        indexers.log = kept["log"]
        return indexers.to(device).eval()
    print(f"warming up indexers, under a minute on two cores; they are kept in {path.parent}")
    indexers = train(model, recipe, report=lambda line: print("  " + line, flush=True))
    weights = {name: value.cpu() for name, value in indexers.state_dict().items()}
    training.keep(path, {"weights": weights, "log": indexers.log})
    return indexers


def best_of_blocks(logits: Tensor, block: int = 64) -> Tensor:
    """Logits [rows, n] with each token's replaced by the largest of its block: choosing by them
    chooses whole blocks."""
    return logits.unflatten(1, (-1, block)).amax(-1).repeat_interleave(block, dim=1)


def mass_kept(target: Tensor, logits: Tensor, counts: list[int]) -> list[float]:
    """Share of the attention `target` [rows, s] on the k tokens of largest logits [rows, s], mean
    over the rows, for each k of counts."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    kept = target.gather(1, order).cumsum(1).mean(0)
    return [float(kept[min(k, len(kept)) - 1]) if k else 0.0 for k in counts]


# attend(layer, x [s, d_model], q [s, h, 576], kv [s, 576]) -> [s, h, 512], in latent space
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def predictions(model: MLALM, tokens: Tensor, attend: Attend) -> Tensor:
    """Log-probabilities [s, vocab] of a text, tokens [s], whose attention is `attend`'s."""
    positions = torch.arange(len(tokens), device=tokens.device)
    x = model.embedding(tokens)
    for layer in range(model.config.n_layers):
        block = model.layer(layer)
        attention, normed = block.attention, block.norm_attention(x)
        q = attention.absorb(attention.queries(normed, positions))
        out = attend(layer, normed, q, attention.latents(normed, positions)).to(x.dtype)
        x = block.feed_forward(x + attention.w_o(attention.unabsorb(out).flatten(-2)))
    return model.readout(x).log_softmax(-1)
