"""Loads the kernels' library, building it at first use where there is a compiler."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from flashmla.cuda import build as builder
from flashmla.settings import setting

__all__ = ["available", "load"]

_failed = ""  # what a build in this process failed of: it is not tried at every call


def available() -> tuple[bool, str]:
    """Whether the kernels can be had on this machine, and why or from where."""
    try:
        path = builder.library_path()
        if path is not None:
            return True, str(path)
        builder.source_folder()
    except builder.BuildError as error:
        return False, str(error)
    problem = _failed or builder.toolchain_problem()
    return (False, f"no built library, and {problem}") if problem else (True, "built at first use")


def load() -> Any:
    """The library as a tvm-ffi module: an attribute a kernel. Builds it if need be.

    Raises:
        flashmla.cuda.build.BuildError: it is not built and cannot be.
    """
    return _load(setting("FLASHMLA_LIBRARY"), setting("FLASHMLA_CACHE_DIR"))


@functools.cache
def _load(named: str | None, cache: str | None) -> Any:
    import tvm_ffi

    global _failed
    path: Path | None = builder.library_path()
    if path is None:
        if _failed:
            raise builder.BuildError(_failed)
        try:
            path = builder.build()
        except builder.BuildError as error:
            _failed = str(error)
            raise
    return tvm_ffi.load_module(str(path))
