"""Trains the lesson model and keeps its weights: only the first lesson on a machine waits.

The weights lie in FLASHMLA_CACHE_DIR (or ~/.cache/flashmla) under a name that hashes all they
follow from: the sizes, the recipe, the text, the code of the model and of this file, and
torch's version.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flashmla.lab import model as model_source
from flashmla.lab import text
from flashmla.lab.model import MLALM, ModelConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, a linear warm-up and then a linear way down to nothing."""

    steps: int = 400
    batch: int = 4
    context: int = 256
    learning_rate: float = 2e-3
    warm_up: int = 20
    weight_decay: float = 0.1
    seed: int = 576


def initialise(model: MLALM, seed: int) -> None:
    """Normal weights of variance 1/fan-in, a quiet embedding, zeros where a block writes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                continue
            if name.endswith(("w_o.weight", "w_out.weight")):
                p.zero_()
            else:
                std = 0.02 if name == "embedding.weight" else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)


def cross_entropy(model: MLALM, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss, nats a byte, of predicting each of batch [b, s + 1] from those before it."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: MLALM, context: int = 256, rows: int = 32) -> float:
    """Loss on text that was not trained on, nats a byte, over `rows` stretches of it."""
    device = model.embedding.weight.device
    tokens = text.held_out(rows * (context + 1)).to(device)
    return float(cross_entropy(model, tokens.view(rows, context + 1)))


def train(
    config: ModelConfig | None = None,
    recipe: Recipe | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> MLALM:
    """A freshly trained model on the CPU, in float32; `model.log` says how it went.

    The log: loss_before and loss_after (held-out, nats a byte), unigram_entropy (the same),
    seconds, steps.
    """
    recipe = recipe or Recipe()
    model = MLALM(config)
    initialise(model, recipe.seed)
    tokens = text.split()[0]
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, (0.9, 0.98), weight_decay=recipe.weight_decay
    )
    log = {"loss_before": held_out_loss(model, recipe.context), "steps": float(recipe.steps)}
    log["unigram_entropy"] = text.unigram_entropy(tokens)
    began = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        starts = torch.randint(len(tokens) - recipe.context, (recipe.batch, 1), generator=generator)
        loss = cross_entropy(model, tokens[starts + torch.arange(recipe.context + 1)])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 49:
            report(f"step {step + 1} of {recipe.steps}: {loss.item():.2f} nats a byte")
    log["seconds"] = time.perf_counter() - began
    log["loss_after"] = held_out_loss(model, recipe.context)
    model.log = log
    return model.eval()


def _schedule(step: int, recipe: Recipe) -> float:
    return min((step + 1) / recipe.warm_up, 1 - step / recipe.steps)


def weights_path(config: ModelConfig | None = None, recipe: Recipe | None = None) -> Path:
    """Where the weights of this config and recipe are kept, whether or not they are there yet."""
    digest = hashlib.sha256()
    for part in (config or ModelConfig(), recipe or Recipe()):
        digest.update(json.dumps(dataclasses.asdict(part), sort_keys=True).encode())
    for path in (model_source.__file__, text.__file__, __file__):
        digest.update(code_of(Path(path)))
    digest.update(text.corpus())
    digest.update(torch.__version__.encode())
    root = Path(os.environ.get("FLASHMLA_CACHE_DIR") or Path.home() / ".cache" / "flashmla")
    return root / f"lesson-model-{digest.hexdigest()[:16]}.pt"


def code_of(path: Path) -> bytes:
    """What a source does, without its comments and docstrings: better words cost no training."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return ast.dump(tree).encode()


def keep(path: Path, what: dict[str, Any]) -> None:
    """Save a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(what, file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_or_train(config: ModelConfig | None = None, recipe: Recipe | None = None) -> MLALM:
    """The trained model on the CPU, float32: read if it was kept, else trained, then kept.

    Two processes that train at once do no harm: the second replaces the first one's file.
    """
    path = weights_path(config, recipe)
    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
        model = MLALM(config)
        model.load_state_dict(kept["weights"])
        model.log = kept["log"]
        return model.eval()
    print(f"training the lesson model, about a minute on two cores; it is kept in {path.parent}")
    model = train(config, recipe, report=lambda line: print("  " + line, flush=True))
    keep(path, {"weights": model.state_dict(), "log": model.log})
    return model
