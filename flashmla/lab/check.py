"""Comparison of a kernel's results with the oracle's, for tests and notebooks alike.

Outputs and LSEs are judged apart, since a wrong LSE hides behind a right output until two partial
results are merged.  A value passes if it is within the absolute *or* the relative bound.  The
whole has to pass a bound on its cosine difference as well, 1 - 2 Σ xy / Σ (x² + y²), which sees
what the absolute bound lets through where all values are small.  NaN, +inf and -inf have to stand
exactly where the reference has them.

The bounds for bfloat16 outputs and for LSEs are those of FlashMLA's tests of dense decode.
float16 has three more bits, so that its outputs are held to an eighth of the error (and a 64th of
the cosine difference, which is quadratic in it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bounds:
    """How far a value may be off: abs_tol or rel_tol for each, cos_tol for the whole."""

    abs_tol: float
    rel_tol: float
    cos_tol: float | None = None


OUT_BOUNDS = {
    "bfloat16": Bounds(8e-4, 2.01 / 128, 5e-6),
    "float16": Bounds(8e-4 / 8, 2.01 / 1024, 5e-6 / 64),
    "float32": Bounds(1e-6, 1e-5, 1e-10),
    "float64": Bounds(1e-12, 1e-10, 1e-14),
}
LSE_BOUNDS = Bounds(1e-6, 8.01 / 65536)
GRADIENT_COSINE = {"bfloat16": 1e-5, "float16": 1e-5 / 64, "float32": 1e-10, "float64": 1e-14}


@dataclass(frozen=True)
class Comparison:
    """What was measured: the largest errors, where the worst value is, the cosine difference.

    The largest relative error is that of the values beyond the absolute bound, since a value that
    happens to be almost 0 has a relative error without meaning.
    """

    name: str
    max_abs: float
    max_rel: float
    cos_diff: float
    worst: tuple[int, ...] | None
    values: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.values} values, largest error {self.max_abs:.2e} absolute, "
            f"{self.max_rel:.2e} relative, cosine difference {self.cos_diff:.2e}"
        )


def as_float64(x: Any) -> np.ndarray:
    """A torch tensor on any device, or anything NumPy takes, as a float64 array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, np.float64)


def compare(
    name: str,
    got: Any,
    want: Any,
    *,
    abs_tol: float,
    rel_tol: float,
    cos_tol: float | None = None,
) -> Comparison:
    """Raise AssertionError unless `got` is as close to `want` as the bounds say.

    Args:
        name: what is compared, for the message.
        got, want: tensors or arrays of one shape and any float dtype.
        abs_tol, rel_tol: a value passes if |got - want| <= abs_tol or <= rel_tol · |want|.
        cos_tol: the cosine difference must be smaller; None leaves that out.

    Returns:
        The measured errors.
    """
    x, y = as_float64(got), as_float64(want)
    if x.shape != y.shape:
        raise AssertionError(f"{name}: shape {x.shape}, expected {y.shape}")
    for what, where in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        _same_places(name, what, where(x), where(y), x, y)
    x, y = np.where(np.isfinite(y), x, 0.0), np.where(np.isfinite(y), y, 0.0)
    error = np.abs(x - y)
    wrong = error > np.maximum(abs_tol, rel_tol * np.abs(y))
    result = _measure(name, x, y, error, abs_tol, rel_tol)
    if wrong.any() and result.worst is not None:
        at = result.worst
        raise AssertionError(
            f"{name}: {wrong.sum()} of {x.size} values are outside abs {abs_tol:.3g} or rel "
            f"{rel_tol:.3g}{_rows(wrong)}; worst at {_place(at)}: got {x[at]:.6g}, "
            f"expected {y[at]:.6g}, off by {error[at]:.3g}{_hint(x, y)}"
        )
    if cos_tol is not None and not result.cos_diff < cos_tol:
        raise AssertionError(
            f"{name}: cosine difference {result.cos_diff:.3g}, allowed {cos_tol:.3g}, though each "
            f"value is within its own bound: beside values so small the errors are large"
        )
    return result


def assert_out_close(out: Any, ref: Any, dtype: str | None = None, name: str = "out") -> Comparison:
    """Outputs against the oracle's, by the bounds of the output's dtype, or of `dtype` if given.

    Name the dtype where a result was computed with less precision than it is stored in.
    """
    bounds = OUT_BOUNDS[dtype or _dtype_name(out)]
    return compare(
        name, out, ref, abs_tol=bounds.abs_tol, rel_tol=bounds.rel_tol, cos_tol=bounds.cos_tol
    )


def assert_lse_close(lse: Any, ref: Any, name: str = "lse") -> Comparison:
    """LSEs, or maximal logits, against the oracle's: natural log, whatever the inputs' dtype."""
    return compare(name, lse, ref, abs_tol=LSE_BOUNDS.abs_tol, rel_tol=LSE_BOUNDS.rel_tol)


def assert_gradient_close(
    gradient: Any, ref: Any, dtype: str | None = None, name: str = "gradient"
) -> Comparison:
    """Gradients against the oracle's: the outputs' relative bound, an absolute bound of a quarter
    of it times the largest gradient (they have no natural size), and the cosine difference."""
    dtype = dtype or _dtype_name(gradient)
    rel_tol = OUT_BOUNDS[dtype].rel_tol
    largest = float(np.max(np.abs(as_float64(ref)), initial=0.0))
    cos_tol = GRADIENT_COSINE[dtype] if largest > 0 else None
    return compare(
        name, gradient, ref, abs_tol=rel_tol * largest / 4, rel_tol=rel_tol, cos_tol=cos_tol
    )


def assert_identical(name: str, got: Any, want: Any) -> None:
    """Raise AssertionError unless two tensors or arrays of one dtype agree bit for bit."""
    x, y = _bits(got), _bits(want)
    if x.shape != y.shape or _dtype_name(got) != _dtype_name(want):
        raise AssertionError(
            f"{name}: {_dtype_name(got)} {tuple(got.shape)}, "
            f"expected {_dtype_name(want)} {tuple(want.shape)}"
        )
    different = x != y
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{name}: {different.sum()} of {x.size} bytes differ, the first at byte {at[-1]} of "
            f"row {_place(at[:-1])}"
        )


def _measure(
    name: str, x: np.ndarray, y: np.ndarray, error: np.ndarray, abs_tol: float, rel_tol: float
) -> Comparison:
    """The numbers of a Comparison, from x and y with zeros in place of what isn't finite."""
    if x.size == 0:
        return Comparison(name, 0.0, 0.0, 0.0, None, 0)
    size = np.abs(y)
    excess = error / np.maximum(np.maximum(abs_tol, rel_tol * size), 1e-300)
    worst = np.unravel_index(int(np.argmax(excess)), x.shape)
    counts = error > abs_tol
    squares = float((x * x + y * y).sum())
    return Comparison(
        name=name,
        max_abs=float(error.max()),
        max_rel=float((error[counts] / np.maximum(size[counts], 1e-300)).max(initial=0.0)),
        cos_diff=float((error * error).sum()) / squares if squares > 0 else 0.0,
        worst=tuple(int(i) for i in worst),
        values=x.size,
    )


def _same_places(
    name: str, what: str, got: np.ndarray, want: np.ndarray, x: np.ndarray, y: np.ndarray
) -> None:
    """Raise unless the non-finite values of one kind stand in the same places."""
    if (got == want).all():
        return
    at = tuple(int(i) for i in np.argwhere(got != want)[0])
    raise AssertionError(
        f"{name}: {what} in {got.sum()} places, expected in {want.sum()}; first difference at "
        f"{_place(at)}: got {x[at]:.6g}, expected {y[at]:.6g}"
    )


def _rows(wrong: np.ndarray) -> str:
    """Which entries of the first dimension are affected, if that narrows the search."""
    if wrong.ndim < 2:
        return ""
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if len(rows) == len(wrong):
        return ""
    some = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f", all of them at first index {some}"


def _hint(x: np.ndarray, y: np.ndarray) -> str:
    """A likely cause, where the whole of `got` is a multiple of `want`."""
    squares = float((y * y).sum())
    factor = float((x * y).sum()) / squares if squares > 0 else 0.0
    for value, cause in (
        (1 / np.log(2), "is it in base 2?"),
        (np.log(2), "was it taken from base 2 to natural log twice?"),
    ):
        if abs(factor / value - 1) < 1e-3 and np.allclose(x, value * y, rtol=1e-2):
            return f" (all values are {value:.4f} times the expected ones: {cause})"
    return ""


def _place(at: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(i) for i in at) + "]"


def _dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _bits(x: Any) -> np.ndarray:
    """The bytes of a tensor or array, those of an element along a last dimension of their own."""
    if hasattr(x, "detach"):
        import torch

        x = x.detach().cpu().contiguous()
        shape, x = tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy()
    else:
        shape, x = x.shape, np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    n = int(np.prod(shape))
    return x.reshape(*shape, len(x) // n if n else 0)
