"""Which tier serves an operation: ``cuda``, ``triton`` or ``torch``.

The tier follows from the tensors' device. CPU tensors go to the torch tier. On a Hopper card the
hand-written kernels come first, then Triton's, then torch; on any other GPU Triton, then torch.
A tier steps aside when it lacks the operation, cannot run on this machine, or refuses the arguments
at hand; each such reason is logged once, on the logger ``flashmla``.

:func:`use_backend` and the environment variable ``FLASHMLA_BACKEND`` name one tier and no other; if
that one cannot serve the call, the call fails and says why. ``FLASHMLA_REQUIRE_TIER=cuda`` turns
a silent step down from a CUDA kernel that exists into an error, for tests on a card.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from flashmla import settings
from flashmla.checks import values_wanted
from flashmla.settings import setting

__all__ = [
    "TIERS",
    "calls",
    "call",
    "explain",
    "forced_backend",
    "implementation",
    "last_tier",
    "record",
    "same_backend",
    "shortcut",
    "tier_for",
    "use_backend",
]

TIERS = ("cuda", "triton", "torch")

calls: dict[str, dict[str, int]] = {}
"""How often each tier served each operation in this process: operation -> {tier: calls}."""

_HOPPER = (9, 0)

_log = logging.getLogger("flashmla")
_forced: ContextVar[str | None] = ContextVar("flashmla_backend", default=None)
_last: dict[str, str] = {}
_logged: set[tuple[str, str, str]] = set()
_modules: dict[tuple[str, str], ModuleType | str] = {}
_shortcuts: dict[
    tuple[str, torch.device], tuple[tuple[object, ...], Callable[..., Any] | None]
] = {}
_routes: dict[tuple[str, torch.device], list[tuple[str, ModuleType | str]]] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation in this context from one tier.

    Args:
        name: "torch", "triton" or "cuda". Triton takes CPU tensors only in its interpreter, with
            ``TRITON_INTERPRET=1`` set before its kernels are first used.

    Raises:
        ValueError: no such tier. An operation that the tier cannot serve raises RuntimeError when
            it is called.
    """
    token = _forced.set(_checked_name(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def same_backend(name: str | None) -> Iterator[None]:
    """What :func:`forced_backend` said at another time or in another thread holds in here."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The one tier asked for by :func:`use_backend` or ``FLASHMLA_BACKEND``, None if neither."""
    forced = _forced.get()
    if forced is None:
        named = setting("FLASHMLA_BACKEND")
        forced = _checked_name(named, "FLASHMLA_BACKEND") if named else None
    return forced


def call(op: str, device: torch.device, *args: Any) -> Any:
    """Run an operation on the tier that serves it, and record which one did.

    Args:
        op: "<stage>.<function>", for example "mla.dense_decode".
        device: where the tensors are.
        args: the tier function's arguments, already checked.

    Raises:
        RuntimeError: no tier that may be used can serve the call; the message gives the reasons.
    """
    tier, function, _ = _select(op, device, args)
    record(op, tier)
    return function(*args)


def record(op: str, tier: str) -> None:
    """Count a call of an operation as served by a tier."""
    served = calls.setdefault(op, {})
    if tier not in served:
        _note_first(op, tier)
        served[tier] = 0
    served[tier] += 1
    _last[op] = tier


def shortcut(op: str, device: torch.device) -> Callable[..., Any] | None:
    """The CUDA tier's quick way through an operation, where that tier comes first, values are not
    to be checked and nothing else forbids it; None if there is none.

    It takes arguments that nobody has checked, and returns None, with nothing done, unless it could
    serve them. Whoever succeeds with it reports so to :func:`record`.
    """
    state = (_forced.get(), settings.state())
    known = _shortcuts.get((op, device))
    if known is None or known[0] != state:
        known = _shortcuts[op, device] = state, _find_shortcut(op, device)
    return known[1]


def _find_shortcut(op: str, device: torch.device) -> Callable[..., Any] | None:
    if forced_backend() not in (None, "cuda") or values_wanted():
        return None
    if setting("FLASHMLA_REQUIRE_TIER") not in (None, "", "cuda"):
        return None
    stage, name = op.split(".")
    tier, module = _route(stage, device, None)[0]
    if tier != "cuda" or isinstance(module, str):
        return None
    bind: Callable[[], Callable[..., Any]] | None = getattr(module, f"quick_{name}", None)
    return bind() if bind else None


def implementation(op: str, device: torch.device | str) -> Callable[..., Any]:
    """The tier function that would serve an operation; arguments are not taken into account."""
    return _select(op, torch.device(device), None)[1]


def tier_for(op: str, device: torch.device | str) -> str:
    """The tier that would serve an operation on tensors of a device."""
    return _select(op, torch.device(device), None)[0]


def explain(op: str, device: torch.device | str) -> tuple[str, str]:
    """The tier that would serve an operation on tensors of a device, and why that one."""
    tier, _, reason = _select(op, torch.device(device), None)
    return tier, reason


def last_tier(op: str) -> str | None:
    """The tier that served the last call of an operation in this process, None if none has."""
    return _last.get(op)


def _select(
    op: str, device: torch.device, args: tuple[Any, ...] | None
) -> tuple[str, Callable[..., Any], str]:
    """(tier, function, reason). With args, each tier's ``supports_<function>`` is asked as well."""
    stage, name = op.split(".")
    forced = forced_backend()
    refused: list[tuple[str, str]] = []
    for tier, module in _route(stage, device, forced):
        function, why_not = _function(module, stage, name, args)
        if function is not None:
            break
        refused.append((tier, why_not))
    else:
        asked = f"{forced!r} was asked for, but " if forced else ""
        reasons = "; ".join(f"the {tier} tier {why}" for tier, why in refused)
        raise RuntimeError(f"flashmla: {op} on {device.type} tensors: {asked}{reasons}")
    if forced is None and device.type == "cuda":
        _demand_required_tier(op, tier, refused)
    if args is None:
        return tier, function, _reason(tier, forced, device, refused)
    if refused:
        _log_once(op, tier, refused)
    return tier, function, ""


def _route(
    stage: str, device: torch.device, forced: str | None
) -> list[tuple[str, ModuleType | str]]:
    """The tiers to try, each with its module for the stage or why it has none to offer."""
    if forced is not None:
        return [(forced, _cannot_run(forced, device) or _module(forced, stage))]
    key = (stage, device)
    route = _routes.get(key)
    if route is None:
        order: tuple[str, ...] = ("torch",)
        if device.type == "cuda":
            order = TIERS if _capability(device) == _HOPPER else ("triton", "torch")
        route = [(tier, _cannot_run(tier, device) or _module(tier, stage)) for tier in order]
        _routes[key] = route
    return route


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _function(
    module: ModuleType | str, stage: str, name: str, args: tuple[Any, ...] | None
) -> tuple[Callable[..., Any] | None, str]:
    """The tier's function, or None and why it cannot serve this call."""
    if isinstance(module, str):
        return None, module
    function = getattr(module, name, None)
    if function is None:
        return None, f"has no {stage}.{name} yet"
    supports = getattr(module, f"supports_{name}", None)
    if args is not None and supports is not None:
        why_not = supports(*args)
        if why_not:
            return None, f"does not take these arguments: {why_not}"
    return function, ""


def _cannot_run(tier: str, device: torch.device) -> str:
    """Why a tier cannot work on tensors of this device at all; empty if it can."""
    if tier == "cuda":
        if device.type != "cuda":
            return f"needs CUDA tensors, got {device.type} tensors"
        major, minor = _capability(device)
        if (major, minor) != _HOPPER:
            return f"needs a Hopper card (compute capability 9.0), got {major}.{minor}"
    if tier == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"needs a GPU, got {device.type} tensors (its interpreter takes CPU tensors, with "
            "TRITON_INTERPRET=1 set before Triton is imported)"
        )
    return ""


def _module(tier: str, stage: str) -> ModuleType | str:
    """The module of a tier for a stage, or why there is none; looked up once."""
    key = (tier, stage)
    found = _modules.get(key)
    if found is None:
        found = _modules[key] = _import(tier, stage)
    return found


def _import(tier: str, stage: str) -> ModuleType | str:
    package = f"flashmla.{tier}"
    try:
        if tier == "cuda":
            available, reason = importlib.import_module("flashmla.cuda.library").available()
            if not available:
                return f"has no kernels: {reason}"
        return importlib.import_module(f"{package}.{stage}")
    except ImportError as error:
        missing = error.name or ""
        if missing in (package, f"{package}.{stage}", f"{package}.library"):
            return f"has no kernels for {stage} yet"
        return f"cannot be imported: {error}"


def _has_cuda_kernel(op: str) -> bool:
    """Whether ``flashmla.cuda`` names the operation, be its library built or not."""
    stage, name = op.split(".")
    try:
        return hasattr(importlib.import_module(f"flashmla.cuda.{stage}"), name)
    except ImportError:
        return False


def _demand_required_tier(op: str, tier: str, refused: list[tuple[str, str]]) -> None:
    required = setting("FLASHMLA_REQUIRE_TIER")
    if required and tier != required and _has_cuda_kernel(op):
        reasons = "; ".join(f"the {name} tier {why}" for name, why in refused)
        raise RuntimeError(
            f"flashmla: FLASHMLA_REQUIRE_TIER={required}, but {op} would run on the {tier} tier: "
            f"{reasons or 'the card is no Hopper card'}"
        )


def _log_once(op: str, tier: str, refused: list[tuple[str, str]]) -> None:
    for other, why in refused:
        key = (op, other, why)
        if key not in _logged:
            _logged.add(key)
            _log.warning("%s runs on the %s tier: the %s tier %s", op, tier, other, why)


def _note_first(op: str, tier: str) -> None:
    """Tells whoever started this process, in the file that ``FLASHMLA_TIER_LOG`` names."""
    path = os.environ.get("FLASHMLA_TIER_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{op} {tier}\n")


def _reason(
    tier: str, forced: str | None, device: torch.device, refused: list[tuple[str, str]]
) -> str:
    if forced:
        return "asked for by use_backend or FLASHMLA_BACKEND"
    if refused:
        return "; ".join(f"the {other} tier {why}" for other, why in refused)
    if device.type != "cuda":
        return f"{device.type} tensors"
    if tier == "cuda":
        return "a Hopper card"
    return "compute capability {}.{}, no Hopper card".format(*_capability(device))


def _checked_name(name: str, source: str) -> str:
    if name not in TIERS:
        raise ValueError(f"{source}: no tier named {name!r}; there are {', '.join(TIERS)}")
    return name
