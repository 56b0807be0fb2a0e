"""Show real source in a notebook: a whole object, or the region of a file between two anchors.

Anchors are comments on lines of their own, ``# region: name`` and ``# endregion: name`` in Python,
with ``//`` in CUDA. They may nest. A listing leaves them out. An anchor that isn't there raises:
a notebook must not go on quietly showing something else than it talks about.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Source", "find", "regions", "show"]

_PACKAGE = Path(__file__).resolve().parents[1]
_ANCHOR = re.compile(r"^\s*(?:#|//)\s*(region|endregion):\s*(\S+)\s*$")
_LANGUAGES = {".py": "python", ".cu": "cpp", ".cuh": "cpp", ".h": "cpp"}


@dataclass(frozen=True)
class Source:
    """A stretch of a source file, drawn by a notebook as a listing under its path and lines."""

    path: str
    first_line: int
    last_line: int
    text: str
    language: str
    region: str | None = None

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        where = f"`{self.path}`, lines {self.first_line}–{self.last_line}"
        if self.region:
            where += f", region `{self.region}`"
        return f"{where}\n\n```{self.language}\n{self.text}\n```"


def show(what: Any, region: str | None = None) -> Source:
    """Return the source of an object, of a file, or of a region of a file.

    Args:
        what: a function, class, module or Triton kernel, or a path such as
            ``"csrc/sm90/combine.cu"`` or ``"flashmla/triton/mla.py"``.
        region: the name between ``region:`` anchors; None for all of it. With an object, the
            region is looked for in the file that defines it.

    Raises:
        FileNotFoundError: there is no such file, neither in a checkout nor in the package.
        LookupError: the file has no such region, or the region is never closed.
    """
    if not isinstance(what, str | Path) and region is None:
        return _show_object(what)
    path = find(what) if isinstance(what, str | Path) else Path(_source_file(what))
    lines = path.read_text(encoding="utf-8").splitlines()
    first, last = (1, len(lines)) if region is None else _bounds(lines, region, path)
    return _make(path, first, lines[first - 1 : last], region)


def find(path: str | Path) -> Path:
    """The absolute path of a file named as in a checkout, wherever the package is installed."""
    path = Path(path)
    if path.is_absolute() and path.is_file():
        return path
    # Checkout; wheel with csrc/ beside the modules or beside the builder.
    roots = [_PACKAGE.parent, _PACKAGE, _PACKAGE / "cuda"]
    for root in roots:
        if (root / path).is_file():
            return root / path
    looked = ", ".join(str(root) for root in roots)
    raise FileNotFoundError(f"no source file {path} under any of {looked}")


def regions(path: str | Path) -> list[str]:
    """Names of the regions of a file, in the order in which they open."""
    lines = find(path).read_text(encoding="utf-8").splitlines()
    anchors = (_ANCHOR.match(line) for line in lines)
    return [anchor[2] for anchor in anchors if anchor and anchor[1] == "region"]


def _bounds(lines: list[str], region: str, path: Path) -> tuple[int, int]:
    """First and last line (from 1) between a region's anchors."""
    first = None
    for number, line in enumerate(lines, start=1):
        anchor = _ANCHOR.match(line)
        if not anchor or anchor[2] != region:
            continue
        if anchor[1] == "region":
            first = number + 1
        elif first is not None:
            return first, number - 1
    if first is not None:
        raise LookupError(f"{_label(path)}: region {region!r} is opened and never closed")
    known = ", ".join(regions(path)) or "none"
    raise LookupError(f"{_label(path)} has no region {region!r}; its regions: {known}")


def _show_object(what: Any) -> Source:
    what = _unwrap(what)
    if inspect.ismodule(what):
        return show(_source_file(what))
    lines, first = inspect.getsourcelines(what)
    return _make(Path(_source_file(what)), first, [line.rstrip("\n") for line in lines], None)


def _make(path: Path, first: int, lines: list[str], region: str | None) -> Source:
    kept = [line for line in lines if not _ANCHOR.match(line)]
    text = textwrap.dedent("\n".join(kept)).strip("\n")
    language = _LANGUAGES.get(path.suffix, "text")
    return Source(_label(path), first, first + len(lines) - 1, text, language, region)


def _unwrap(what: Any) -> Any:
    """Triton's kernels, and whatever else decorates a function, hide it in ``fn``."""
    while hasattr(what, "fn"):
        what = what.fn
    return inspect.unwrap(what) if callable(what) else what


def _source_file(what: Any) -> str:
    file = inspect.getsourcefile(_unwrap(what))
    if file is None:
        raise FileNotFoundError(f"no source file is known for {what!r}")
    return file


def _label(path: Path) -> str:
    """The path as in a checkout, so that a listing reads the same on every machine."""
    for root in (_PACKAGE, _PACKAGE / "cuda", _PACKAGE.parent):
        for top in ("flashmla", "csrc"):
            if path.resolve().is_relative_to(root / top):
                return path.resolve().relative_to(root).as_posix()
    return path.name
