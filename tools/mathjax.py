"""Puts MathJax into the book's static files, from npm, checked, and kept for the next time.

The book's pages then need no network. The package is fetched once (`npm pack`) and kept in
FLASHMLA_CACHE_DIR (or ~/.cache/flashmla, with what else is cached); where it lies there, npm is
not needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.2.2"
SHA256 = "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09"  # of the npm package
TARGET = Path(__file__).resolve().parents[1] / "book" / "_static" / "vendor" / "mathjax"
FILES = ("package/es5/tex-svg.js", "package/LICENSE")
# The menu would fetch its speech engine from there; it is off, and no page names such a place.
CDN = b"https://cdn.jsdelivr.net/npm/"


def cached_package() -> Path:
    """Where the package is kept between builds."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("FLASHMLA_CACHE_DIR") or home / "flashmla").expanduser()
    return folder / f"mathjax-{VERSION}.tgz"


def intact(package: Path) -> bool:
    """True if the file is there and is the package that was looked at."""
    return package.exists() and hashlib.sha256(package.read_bytes()).hexdigest() == SHA256


def fetch(package: Path) -> None:
    """Fetches the package by npm into the cache; exits with what is missing if that fails."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(
            f"the book's formulas need MathJax {VERSION}: install npm, or put the npm package "
            f"mathjax-{VERSION}.tgz at {package}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"mathjax@{VERSION}", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        fetched = Path(folder) / package.name
        if done.returncode != 0 or not intact(fetched):
            sys.exit(f"npm did not bring mathjax {VERSION} intact:\n{done.stderr[-2000:]}")
        package.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(fetched, package)


def unpack(package: Path, target: Path) -> None:
    """Writes the script and its licence into the book's static files."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for name in FILES:
            member = archive.extractfile(name)
            assert member is not None
            (target / Path(name).name).write_bytes(member.read().replace(CDN, b""))


def main() -> None:
    package = cached_package()
    if not intact(package):
        fetch(package)
    if not all((TARGET / Path(name).name).exists() for name in FILES):
        unpack(package, TARGET)
    print(f"MathJax {VERSION}: {TARGET}")


if __name__ == "__main__":
    main()
