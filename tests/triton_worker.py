"""Two worker processes for tests of Triton kernels, one that interprets and one that compiles.

Triton settles for a whole process, when a kernel is decorated, whether kernels are compiled or
interpreted. So tests hand their bodies to a process where that is settled one way, whatever the
environment of the test run says. The workers start at first use and serve the whole run.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def _settle(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    import torch

    torch.set_num_threads(1)
    import triton

    assert triton.knobs.runtime.interpret == (interpret == "1")


@functools.cache
def _worker(interpret: str) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_settle, initargs=(interpret,))


def interpreted(body: Callable[..., Any], *args: Any) -> Any:
    """Calls body(*args) where Triton interprets kernels, on CPU tensors; errors come through."""
    return _worker("1").submit(body, *args).result()


def compiled(body: Callable[..., Any], *args: Any) -> Any:
    """Calls body(*args) where Triton compiles kernels."""
    return _worker("0").submit(body, *args).result()
