"""Environment variables that are looked at in every call.

``os.environ.get`` encodes the name and decodes the value each time, which takes longer than a small
tensor's allocation; a decode step of ten microseconds cannot afford five of them.
"""

from __future__ import annotations

import os

__all__ = ["setting"]

_raw = getattr(os.environ, "_data", None)  # what os.environ wraps: encoded names and values
_encoded: dict[str, object] = {}


def setting(name: str) -> str | None:
    """``os.environ.get(name)`` at a sixth of its price."""
    if _raw is None:
        return os.environ.get(name)
    key = _encoded.get(name)
    if key is None:
        key = _encoded[name] = os.environ.encodekey(name)
    value = _raw.get(key)
    return value if value is None else os.environ.decodevalue(value)
