"""Builds ``csrc/`` into one shared library: at first use, ahead of time, and for the wheel.

Each translation unit is compiled to an object that is kept under a name made of everything that
went into it: its text, the headers of ours that it includes, the compiler, CUTLASS, tvm-ffi and
the flags. An edited kernel therefore rebuilds itself and nothing else. A cached library is named
after the sources and the toolchain; a machine without a toolchain takes any that was made from
these sources, the wheel's first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
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
    "prebuild",
    "prebuilt_path",
    "source_folder",
    "toolchain_problem",
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
OLDEST_CUDA = (12, 8)
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
    return _version_text(nvcc, nvcc.stat().st_mtime_ns).splitlines()[-1]


def toolchain_problem() -> str:
    """Why nothing can be built here; empty if it can."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc: set CUDA_HOME, or install CUDA 12.8 or later"
    text = _version_text(nvcc, nvcc.stat().st_mtime_ns)
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        return f"{nvcc} --version names no release"
    if (int(release[1]), int(release[2])) < OLDEST_CUDA:
        return f"{nvcc} is of CUDA {release[1]}.{release[2]}; 12.8 or later is needed"
    if find_cutlass() is None:
        return (
            "no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0, conda install "
            "cutlass, or set CUTLASS_PATH"
        )
    if importlib.util.find_spec("tvm_ffi") is None:
        return "no tvm-ffi: pip install apache-tvm-ffi"
    return ""


def library_path() -> Path | None:
    """The library for the sources as they are now: the wheel's or a cached one; None if neither.

    ``FLASHMLA_LIBRARY`` names one outright.
    """
    named = os.environ.get("FLASHMLA_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise BuildError(f"FLASHMLA_LIBRARY={named}: no such file")
        return Path(named)
    sources = _sources_digest()
    folder = cache_folder() / "lib"
    if not toolchain_problem():
        found = [folder / f"libflashmla-{sources}-{_toolchain_digest()}.so"]
    else:
        found = sorted(folder.glob(f"libflashmla-{sources}-*.so"))
    candidates = [prebuilt_path(), *found]
    return next((path for path in candidates if path.is_file()), None)


def prebuilt_path() -> Path:
    """Where a wheel has the library for these sources, if it has one."""
    return _PREBUILT / f"libflashmla-{_sources_digest()}.so"


def prebuild(verbose: bool = False) -> Path:
    """Build, and put the library where a wheel takes it from, in place of any older one.

    Raises:
        BuildError: as :func:`build`; or this package is an installed one, which no wheel is made
            from: the next would be without the library, and say nothing.
    """
    if source_folder().parent == _PACKAGE:
        raise BuildError(
            f"--prebuilt is for a checkout, which wheels are made from, and {_PACKAGE} is "
            "installed: run python -m flashmla build --prebuilt in the checkout's root"
        )
    library = build(verbose)
    _PREBUILT.mkdir(exist_ok=True)
    for old in _PREBUILT.glob("*.so"):
        old.unlink()
    return Path(shutil.copy2(library, prebuilt_path()))


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
    problem = toolchain_problem()
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if problem or nvcc is None or cutlass is None:
        raise BuildError(problem)
    flags = _flags(cutlass)
    toolchain = _toolchain_digest()
    target = cache_folder() / "lib" / f"libflashmla-{_sources_digest()}-{toolchain}.so"
    objects = cache_folder() / "obj"
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


@functools.cache
def _version_text(nvcc: Path, changed: int) -> str:
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{nvcc} --version failed: {result.stderr}")
    return result.stdout.strip()


def _toolchain_digest() -> str:
    """What the objects depend on beside our sources and flags."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    assert nvcc is not None and cutlass is not None
    headers = (cutlass / "cutlass" / "version.h").read_text(encoding="utf-8")
    return _digest(compiler_version(nvcc), headers, importlib.metadata.version("apache-tvm-ffi"))


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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), int(memory // MEMORY_PER_JOB)))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _sources_digest() -> str:
    folder = source_folder()
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h"))
    texts = [f"{p.relative_to(folder)}\0{p.read_text(encoding='utf-8')}" for p in files]
    return _digest(*FLAGS, *texts)


def _unit_key(unit: Path, toolchain: str) -> str:
    files = sorted(_closure(unit))
    return _digest(toolchain, *FLAGS, unit.name, *(p.read_text(encoding="utf-8") for p in files))


def _closure(unit: Path) -> set[Path]:
    """The unit and all headers of ours that it includes, directly or not."""
    seen: set[Path] = set()
    todo = [unit.resolve()]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            header = (path.parent / name).resolve()
            if header.is_file():
                todo.append(header)
    return seen


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One build at a time for a cache: the processes of a job share it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "build.lock", "w")
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be written: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
