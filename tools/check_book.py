"""Fails if a page of the built book would load anything from elsewhere.

Links that a reader may follow are no such thing; scripts, styles, images, fonts and frames are.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself: attribute by tag.
LOADS = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src",
    "audio": "src", "embed": "src", "link": "href", "object": "data",
}  # fmt: skip
# Relations of a <link> that are addresses and not fetched.
ADDRESSES = {"canonical", "license", "author", "alternate"}
ELSEWHERE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s;]+)", re.IGNORECASE)
CDN = re.compile(
    r"cdn\.|cdnjs|jsdelivr|unpkg\.com|fonts\.googleapis|polyfill\.io|mathjax\.org/mathjax"
)


class Loads(HTMLParser):
    """Collects what a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        place = attributes.get(LOADS.get(tag, "")) or ""
        relation = set((attributes.get("rel") or "").split())
        if ELSEWHERE.match(place) and not (tag == "link" and relation & ADDRESSES):
            self.found.append(place)
        self.found += IN_STYLE.findall(attributes.get("style") or "")


def loads_of(path: Path) -> list[str]:
    """What one file of the book loads from elsewhere."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        parser = Loads()
        parser.feed(text)
        inline = re.findall(r"<(?:script|style)[^>]*>(.*?)</(?:script|style)>", text, re.DOTALL)
        named = [part for part in inline if CDN.search(part)]
        return [*parser.found, *(f"in a script: {CDN.search(part)[0]}" for part in named)]  # type: ignore[index]
    if path.suffix == ".css":
        return [place for place in IN_STYLE.findall(text)]
    return sorted(set(CDN.findall(text)))


def check(folder: Path) -> list[str]:
    """``file: place`` for everything that the built book would load from elsewhere."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".html", ".css", ".js"})
    if not any(path.suffix == ".html" for path in files):
        return [f"{folder}: no page was built"]
    return [f"{path.relative_to(folder)}: {place}" for path in files for place in loads_of(path)]


def main() -> None:
    found = check(Path(sys.argv[1]))
    for line in found:
        print(line)
    print("the book loads nothing from elsewhere" if not found else f"{len(found)} loads too many")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
