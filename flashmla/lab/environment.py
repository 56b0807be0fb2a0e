"""What this machine is to the notebooks, and what was recorded on machines it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["device", "device_name", "recorded", "recorded_ceilings", "sizes"]

T = TypeVar("T")

_RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def device() -> str:
    """``"cuda"`` on a Hopper card (compute capability 9.0), else ``"cpu"``."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return "cuda" if hopper else "cpu"


def device_name() -> str:
    """A label for figures measured here."""
    return torch.cuda.get_device_name() if device() == "cuda" else "this machine's CPU"


def sizes(cpu: T, gpu: T) -> T:
    """Choose a problem size for this machine: the small one with no card, else the large one."""
    return gpu if device() == "cuda" else cpu


def recorded(
    case: str | None = None,
    *,
    op: str | None = None,
    impl: str | None = None,
    results: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows measured earlier on cards that may not be here.

    Args:
        case: keep the rows of this case, as ``flashmla bench`` names it; None keeps all.
        op, impl: likewise for the operation and for who served it.
        results: folder of result files; the checkout's ``benchmarks/results`` by default.

    Returns:
        The rows {op, case, impl, us, eager_us, tflops, gbps, error}, each with a ``device`` label
        and the ``commit`` and ``date`` of its measurement: its own where it has them, kept from
        an earlier run, else the file's. Empty where nothing was recorded.
    """
    wanted = {"case": case, "op": op, "impl": impl}
    rows: list[dict[str, Any]] = []
    for file in _files(results):
        source = _source(file)
        for row in file.get("rows", []):
            if all(value is None or row.get(key) == value for key, value in wanted.items()):
                rows.append({**source, **row})
    return rows


def recorded_ceilings(results: Path | None = None) -> list[dict[str, Any]]:
    """The measured ceilings of every recorded card, one dict a file that has them.

    Each holds ``device``, ``commit`` and ``date`` beside what the file's ``ceilings`` say.
    """
    files = [file for file in _files(results) if file.get("ceilings")]
    return [{**file["ceilings"], **_source(file)} for file in files]


def _files(results: Path | None) -> list[dict[str, Any]]:
    folder = results or _RESULTS
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _source(file: dict[str, Any]) -> dict[str, str]:
    provenance = file.get("provenance", {})
    return {
        "device": str(provenance.get("gpu", "unknown device")),
        "commit": str(provenance.get("commit", "unknown")),
        "date": str(provenance.get("date", "unknown")),
    }
