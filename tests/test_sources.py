"""What every kernel source keeps to, so that each can be read on one screen and in one sitting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cu", ".cuh", ".h", ".cpp"})
ASM = re.compile(r"\b(__asm__|asm)\b\s*(volatile|__volatile__)?\s*\(")


def name(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def test_there_are_sources():
    assert any(path.suffix == ".cu" for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file_is_short_and_narrow(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 600
    wide = {number: len(line) for number, line in enumerate(lines, 1) if len(line) > 100}
    assert not wide, "lines over 100 columns (line: width)"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_inline_assembly_stays_in_common(path: Path):
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert name(path).startswith("common/") or not ASM.search(text)


def test_assembly_is_recognised():
    for text in ("asm volatile(", "asm(", "__asm__ __volatile__ (", "asm volatile ("):
        assert ASM.search(text), text
    assert not ASM.search("plasma(") and not ASM.search("asm_free(")
