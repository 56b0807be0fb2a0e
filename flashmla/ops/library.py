"""Registration of tier functions as torch operators, so that torch.compile can trace them.

An eager call never passes through here: a torch operator costs tens of microseconds, as much as
the work of a small decode step. Under torch.compile the public functions call the operator, whose
fake function gives the compiler the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashmla import backend

__all__ = ["define", "defined", "register_autograd"]

defined: list[str] = []
"""Every operation registered so far, by its name among the tiers."""

_LIBRARY = torch.library.Library("flashmla", "DEF")


def define(
    op: str, schema: str, fake: Callable[..., Any], device_argument: int = 0
) -> Callable[..., Any]:
    """Register a dispatched operation.

    Args:
        op: its name among the tiers, "<stage>.<function>"; the operator is
            ``flashmla::<stage>_<function>``.
        schema: arguments and results in torch's schema language, without the name.
        fake: gives results of the right shapes and dtypes from arguments without data.
        device_argument: which argument's device chooses the tier.

    Returns:
        A function of the same arguments: the tier's when run eagerly, the operator when compiled.
    """
    name = op.replace(".", "_")
    defined.append(op)

    def run(*args: Any) -> Any:
        return backend.call(op, args[device_argument].device, *args)

    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashmla::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.flashmla, name).default

    def dispatch(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else run(*args)

    return dispatch


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Give a defined operator its gradients, for compiled code; see torch.library."""
    name = f"flashmla::{op.replace('.', '_')}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
