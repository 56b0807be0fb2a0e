"""Lets docstrings be written as plain text: `code`, max|x|, *args, and formulas set out in columns.

reStructuredText would read emphasis, substitutions and quotations into them. What napoleon
understands (Args, Returns, Raises, ...) is left to it.
"""

from __future__ import annotations

import re
from typing import Any

SECTION = re.compile(r"(Args|Arguments|Returns|Raises|Yields|Attributes|Note|Example)s?:\s*$")
CODE = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`)")
SPECIAL = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")


def escape(line: str) -> str:
    """A line with its code marked as such and everything else taken literally."""
    parts = CODE.split(line)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            parts[number] = SPECIAL.sub(lambda found: f"\\{found.group()}", part)
        elif not part.startswith(("``", ":")):
            parts[number] = f"`{part}`"
    return "".join(parts)


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def plain(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText; indented blocks outside sections stay as they are."""
    result: list[str] = []
    in_section = literal = False
    for line in lines:
        if line.strip() and indent_of(line) == 0:
            in_section, literal = bool(SECTION.match(line)), False
        elif line.strip() and not in_section and not literal:
            literal = True
            if result and result[-1].strip():
                result.append("")
            result += ["::", ""]
        result.append(line if literal or in_section and SECTION.match(line) else escape(line))
    return result


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = plain(lines)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
