"""Where a figure comes from: the card, the driver, the libraries, the commit and the day."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

__all__ = ["Provenance", "provenance"]


class Provenance(dict[str, str]):
    """A plain dict of strings that a notebook draws as a two-column table."""

    def _repr_markdown_(self) -> str:
        rows = [f"| {key} | {value} |" for key, value in self.items()]
        return "\n".join(["| what | value |", "|---|---|", *rows])


def provenance() -> Provenance:
    """Describe this machine and this build.

    Returns:
        A dict with the keys ``gpu``, ``driver``, ``cuda``, ``torch``, ``triton``, ``python``,
        ``cpu``, ``flashmla``, ``commit`` and ``date`` (ISO 8601, UTC). Every value is a string;
        what the machine lacks is ``"none"``, what can't be found out ``"unknown"``.
    """
    return Provenance(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        driver=_driver(),
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        cpu=f"{platform.machine()}, {os.cpu_count()} cores",
        flashmla=_flashmla_version(),
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
    )


def _driver() -> str:
    if not torch.cuda.is_available():
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command) or "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _flashmla_version() -> str:
    import flashmla

    return str(getattr(flashmla, "__version__", "unknown"))


def _commit() -> str:
    """The checkout's commit, marked when files differ from it.

    ``FLASHMLA_COMMIT`` speaks for copies of the tree that were made without their history.
    """
    if told := os.environ.get("FLASHMLA_COMMIT"):
        return told
    package = Path(__file__).resolve().parents[1]
    # A wheel may lie inside somebody else's repository; only our own counts.
    if not (package.parent / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(package.parent)]
    commit = _first_line([*git, "rev-parse", "HEAD"])
    if not commit:
        return "unknown"
    changed = _first_line([*git, "status", "--porcelain", "--", "flashmla", "csrc"])
    return f"{commit} + local changes" if changed else commit


def _first_line(command: list[str]) -> str:
    """First line of what a command prints, or "" when it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""
