"""The English that the lesson model reads: the language reference that ships inside CPython.

`pydoc_data.topics` is what `help("for")` prints: some 460 kB of prose with rules of syntax in it,
on every machine that has Python, so no lesson has to download anything. A token is a byte, the
vocabulary has 256.
"""

from __future__ import annotations

import functools

import torch

VOCAB = 256
HELD_OUT = 0.08  # the last part of the text is never trained on


@functools.cache
def corpus() -> bytes:
    """The whole text as bytes, topics in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name].strip() + "\n" for name in sorted(topics)).encode()


def encode(text: str | bytes) -> torch.Tensor:
    """Text to byte tokens, int64 [s]."""
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.int64)


def decode(tokens: torch.Tensor) -> str:
    """Byte tokens [s] to text; bytes that are no UTF-8 become the replacement character."""
    return bytes(tokens.flatten().tolist()).decode(errors="replace")


@functools.cache
def split() -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to train on and the held-out ones, int64 [n] each."""
    tokens = encode(corpus())
    cut = int(len(tokens) * (1 - HELD_OUT))
    return tokens[:cut], tokens[cut:]


def held_out(length: int, start: int = 0) -> torch.Tensor:
    """`length` tokens that the model was not trained on, int64 [length]."""
    tokens = split()[1]
    if not 0 <= start <= start + length <= len(tokens):
        raise ValueError(
            f"held_out(length={length}, start={start}): only {len(tokens)} tokens are held out"
        )
    return tokens[start : start + length]


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy of single bytes in nats: the loss of knowing only how often each occurs."""
    p = torch.bincount(tokens, minlength=VOCAB).double()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log()).sum())
