"""What the exercises' checkers share: call the reader's function, compare, and say what is wrong.

A checker raises AssertionError until the answer is right, and then prints one line. Its message
names the inputs of the case that failed, and where it can the likely mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["answer", "expect_close", "expect_equal", "passed"]


def answer(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the reader's function returns for these arguments.

    Raises:
        AssertionError: it returned nothing, or still has an ellipsis where the answer belongs.
        Exception: whatever the function itself raised.
    """
    value = function(*args, **kwargs)
    if value is None or value is Ellipsis:
        raise AssertionError(
            f"{function.__name__} returned {value!r}: replace the ... in it with your answer"
        )
    return value


def expect_equal(what: str, got: Any, want: Any, hint: str = "") -> None:
    """Raises AssertionError unless got == want, both plain values."""
    if isinstance(got, np.generic):
        got = got.item()
    if type(got) is bool or not isinstance(got, type(want)) or got != want:
        raise AssertionError(f"{what}: expected {want!r}, got {got!r}{_because(hint)}")


def expect_close(what: str, got: Any, want: Any, tol: float = 1e-9, hint: str = "") -> None:
    """Raises AssertionError unless shapes agree, infinities and NaNs stand in the same places, and
    all else is within `tol`, relative for values beyond 1 and absolute for those below."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise AssertionError(f"{what}: expected shape {want.shape}, got {got.shape}")
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        raise AssertionError(f"{what}: expected {want[~finite][0]}, got {_first(got, ~finite)}")
    near, far = np.where(finite, got, 0.0), np.where(finite, want, 0.0)
    error = np.abs(near - far) / np.maximum(1.0, np.abs(far))
    if not error.max(initial=0.0) <= tol:
        at = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        place = f" at {[int(i) for i in at]}" if at else ""
        raise AssertionError(
            f"{what}: expected {want[at]:.6g}{place}, got {got[at]:.6g}{_because(hint)}"
        )


def passed(what: str) -> None:
    """The line that a checker prints when all of its cases are right."""
    print(f"passed: {what}")


def _because(hint: str) -> str:
    return f". {hint}" if hint else ""


def _first(values: np.ndarray, where: np.ndarray) -> Any:
    return values[where][0]
