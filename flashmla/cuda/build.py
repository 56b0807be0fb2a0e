"""Builds ``csrc/`` into one shared library: at first use, ahead of time, and for the wheel.

Each translation unit is compiled to an object that is kept under a name made of everything that
went into it: its text, the headers of ours that it includes, the compiler, CUTLASS and the flags.
An edited kernel therefore rebuilds itself and nothing else. The library's name is made of the
sources and flags alone, so that a machine without a compiler accepts one that was built elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "BuildError",
    "build",
    "cache_folder",
    "compiler_version",
    "find_cutlass",
    "find_nvcc",
    "library_path",
    "source_folder",
]

FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-ftz=true",  # exp2f is then one instruction; what it flushes is below 2^-126
    "-lineinfo",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DNDEBUG",
)
MEMORY_PER_JOB = 3 << 30
"""What compiling a large kernel takes at its worst, in bytes."""

_PACKAGE = Path(__file__).resolve().parents[1]
_PREBUILT = Path(__file__).resolve().parent / "prebuilt"
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """The kernels could not be built; the message says what is missing or what nvcc said."""


def source_folder() -> Path:
    """``csrc/``: beside the package in a checkout, inside it when installed."""
    for folder in (_PACKAGE.parent / "csrc", _PACKAGE / "csrc"):
        if (folder / "api.cpp").is_file():
            return folder
    raise BuildError(f"no kernel sources beside or inside {_PACKAGE}")


def cache_folder() -> Path:
    """Where objects and libraries are kept: ``FLASHMLA_CACHE_DIR``, else ``~/.cache/flashmla``."""
    named = os.environ.get("FLASHMLA_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "flashmla"


def find_nvcc() -> Path | None:
    """The CUDA compiler: ``CUDA_HOME``, then the PATH, then ``/usr/local/cuda``; None if none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    for candidate in (
        Path(home) / "bin" / "nvcc" if home else None,
        Path(on_path) if on_path else None,
        Path("/usr/local/cuda/bin/nvcc"),
    ):
        if candidate is not None and candidate.is_file():
            return candidate
    return None


def find_cutlass() -> Path | None:
    """CUTLASS's include folder: ``CUTLASS_PATH``, the package nvidia-cutlass, conda's; or None."""
    folders: list[Path] = []
    named = os.environ.get("CUTLASS_PATH")
    if named:
        folders += [Path(named), Path(named) / "include"]
    spec = importlib.util.find_spec("cutlass_library")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(place) / "source" / "include")
    for prefix in dict.fromkeys((os.environ.get("CONDA_PREFIX"), sys.prefix)):
        if prefix:
            folders.append(Path(prefix) / "include")
    return next((f for f in folders if (f / "cute" / "tensor.hpp").is_file()), None)


def compiler_version(nvcc: Path) -> str:
    """The line of ``nvcc --version`` that names the build."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.strip().splitlines()[-1]


def library_path() -> Path | None:
    """The library for the sources as they are now: the wheel's or a cached one; None if neither.

    ``FLASHMLA_LIBRARY`` names one outright.
    """
    named = os.environ.get("FLASHMLA_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise BuildError(f"FLASHMLA_LIBRARY={named}: no such file")
        return Path(named)
    name = _library_name()
    folders = (_PREBUILT, cache_folder() / "lib")
    return next((f / name for f in folders if (f / name).is_file()), None)


def build(verbose: bool = False) -> Path:
    """Compile what changed and link the library.

    Args:
        verbose: print the compiler's commands, and what it says of registers and spills.

    Returns:
        The library's path in the cache.

    Raises:
        BuildError: no nvcc (CUDA 12.8 or later), no CUTLASS headers, no tvm-ffi, or a failing
            compilation, with nvcc's message.
    """
    nvcc, cutlass = _tools()
    flags = _flags(cutlass)
    target = cache_folder() / "lib" / _library_name()
    objects = cache_folder() / "obj"
    toolchain = _digest(compiler_version(nvcc), (cutlass / "cutlass" / "version.h").read_text())
    units = _translation_units()
    jobs = [(unit, objects / f"{unit.stem}-{_unit_key(unit, toolchain)}.o") for unit in units]
    with _lock(cache_folder()):
        todo = [(unit, out) for unit, out in jobs if verbose or not out.is_file()]
        for count, (unit, _) in enumerate(todo, 1):
            name = unit.relative_to(source_folder())
            print(f"flashmla: to compile {count}/{len(todo)}: {name}", file=sys.stderr)
        with ThreadPoolExecutor(_parallel_jobs()) as pool:
            for _ in pool.map(lambda job: _compile(nvcc, flags, *job, verbose=verbose), todo):
                pass
        _link(nvcc, [out for _, out in jobs], target)
    return target


def _tools() -> tuple[Path, Path]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: set CUDA_HOME, or install CUDA 12.8 or later")
    cutlass = find_cutlass()
    if cutlass is None:
        raise BuildError(
            "no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0, conda install "
            "cutlass, or set CUTLASS_PATH"
        )
    return nvcc, cutlass


def _flags(cutlass: Path) -> list[str]:
    from tvm_ffi import libinfo

    includes = [str(cutlass), *libinfo.include_paths()]
    return [*FLAGS, *(f"-I{folder}" for folder in includes)]


def _translation_units() -> list[Path]:
    folder = source_folder()
    return sorted([*folder.rglob("*.cu"), *folder.rglob("*.cpp")])


def _compile(nvcc: Path, flags: list[str], unit: Path, out: Path, *, verbose: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(f".{os.getpid()}.tmp.o")
    report = ["-Xptxas", "-v"] if verbose else []
    command = [str(nvcc), *flags, *report, "-c", str(unit), "-o", str(temporary)]
    if verbose:
        print(" ".join(command), file=sys.stderr)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"nvcc failed on {unit}:\n{result.stdout}{result.stderr}")
    if "serialized" in result.stderr:
        # ptxas gave up on running matrix products asynchronously: correct, and far too slow.
        raise BuildError(f"wgmma is serialised in {unit}:\n{result.stderr}")
    if verbose:
        print(result.stderr, file=sys.stderr)
    temporary.replace(out)


def _link(nvcc: Path, objects: list[Path], target: Path) -> None:
    from tvm_ffi import libinfo

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp.so")
    ffi = libinfo.find_libtvm_ffi()
    command = [str(nvcc), "-shared", *map(str, objects), ffi, "-o", str(temporary)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"linking failed:\n{result.stdout}{result.stderr}")
    temporary.replace(target)


def _parallel_jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, int(memory // MEMORY_PER_JOB)))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _library_name() -> str:
    folder = source_folder()
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h"))
    texts = [f"{p.relative_to(folder)}\0{p.read_text()}" for p in files]
    return f"libflashmla-{_digest(*FLAGS, *texts)}.so"


def _unit_key(unit: Path, toolchain: str) -> str:
    files = sorted(_closure(unit))
    return _digest(toolchain, *FLAGS, unit.name, *(p.read_text() for p in files))


def _closure(unit: Path) -> set[Path]:
    """The unit and all headers of ours that it includes, directly or not."""
    seen: set[Path] = set()
    todo = [unit.resolve()]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            header = (path.parent / name).resolve()
            if header.is_file():
                todo.append(header)
    return seen


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One build at a time for a cache: the processes of a job share it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
