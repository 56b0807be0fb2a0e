"""The command line: ``flashmla doctor``, ``flashmla build``, ``flashmla bench``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["main"]

# Every operation of the dispatcher, in the order of the stages.
OPERATIONS = (
    "mha.forward",
    "mha.backward",
    "mla.dense_decode",
    "split_kv.get_metadata",
    "split_kv.merge_state",
    "paged_kv.append",
    "fp8.pack",
    "fp8.unpack",
    "fp8.append",
    "fp8.index_pack",
    "fp8.index_append",
    "fp8.dense_decode",
    "dsa.indexer_logits",
    "dsa.indexer_logits_paged",
    "dsa.topk",
    "dsa.sparse_decode",
    "dsa.sparse_prefill",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashmla", description="Multi-head latent attention.")
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what this machine has, and which tier serves what")
    doctor.add_argument("--tiers", action="store_true", help="only the tiers, a line each")
    doctor.set_defaults(run=_doctor)

    build = commands.add_parser("build", help="compile the CUDA kernels for sm_90a")
    build.add_argument("-v", "--verbose", action="store_true", help="show the compiler's commands")
    build.add_argument(
        "--prebuilt",
        action="store_true",
        help="in a checkout: also put the library where a wheel takes it from",
    )
    build.set_defaults(run=_build)

    bench = commands.add_parser("bench", help="measure the operations, and peers beside them")
    bench.add_argument(
        "--op",
        default="all",
        help="an operation, sweep (dense decode over s_k, b and h_q), or all (the default)",
    )
    bench.add_argument("--quick", action="store_true", help="five cases instead of all")
    bench.add_argument("--device", choices=["cuda", "cpu"], help="a card if there is one")
    bench.add_argument("--tier", action="append", choices=["cuda", "triton", "torch"], dest="tiers")
    bench.add_argument("--no-peers", action="store_true", help="only this package's tiers")
    bench.add_argument("--rounds", type=int, default=21, help="turns of each side (21)")
    bench.add_argument(
        "--out",
        type=Path,
        help="a JSON file for the rows; a folder gets <device>.json. Without it a table is printed",
    )
    bench.set_defaults(run=_bench)
    return parser


# ---- doctor ----------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    sections: list[tuple[str, Callable[[], Iterator[tuple[str, str]]]]] = [
        ("machine", _machine),
        ("compiler", _compiler),
        ("kernels", _kernels),
        ("tiers", _tiers),
    ]
    if options.tiers:
        sections = sections[-1:]
    for title, facts in sections:
        if not options.tiers:
            print(f"\n{title}")
        for name, value in facts():
            print(f"  {name:26s} {value}")
    return 0


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from flashmla import __version__

    yield "flashmla", __version__
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
    for name in ("triton", "tvm_ffi"):
        module = _optional(name)
        yield name, getattr(module, "__version__", "installed") if module else "not installed"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield "driver", driver.splitlines()[0] if driver else "none found (nvidia-smi)"
    if not torch.cuda.is_available():
        hint = "; the driver sees a card: is this torch a CPU build?" if driver else ""
        yield "GPU", f"none that torch can use{hint}"
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield (
            f"GPU {number}",
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} SMs, {card.total_memory / 2**30:.0f} GiB, "
            f"L2 {card.L2_cache_size / 2**20:.0f} MiB",
        )


def _compiler() -> Iterator[tuple[str, str]]:
    build = _optional("flashmla.cuda.build")
    if build is None:
        yield "builder", "flashmla.cuda.build cannot be imported"
        return
    nvcc = _attempt(build.find_nvcc)
    yield "nvcc", str(nvcc)
    if isinstance(nvcc, (str, Path)) and os.path.exists(nvcc):
        release = re.search(r"release ([\d.]+)", _output(str(nvcc), "--version"))
        yield "CUDA toolkit", release.group(1) if release else "unknown"
    yield "CUTLASS", str(_attempt(build.find_cutlass))


def _kernels() -> Iterator[tuple[str, str]]:
    build, library = _optional("flashmla.cuda.build"), _optional("flashmla.cuda.library")
    if build is None or library is None:
        yield "library", "flashmla.cuda cannot be imported"
        return
    path = _attempt(build.library_path)
    yield "library", "not built" if path == "not found" else str(path)
    found = _attempt(library.available)
    available, reason = found if isinstance(found, tuple) else (False, str(found))
    yield "can be had", "yes" if available else f"no: {reason}"


def _tiers() -> Iterator[tuple[str, str]]:
    import torch

    from flashmla import backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for operation in OPERATIONS:
        try:
            tier, reason = backend.explain(operation, torch.device(device))
        except RuntimeError as error:
            tier, reason = "none", str(error)
        yield operation, f"{tier:7s} {reason}"


def _optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _attempt(look: Callable[[], Any]) -> Any:
    """What a look-up finds, or its complaint: a doctor reports what is broken and goes on."""
    try:
        found = look()
    except (OSError, RuntimeError, ImportError) as error:
        return f"not found: {error}"
    return "not found" if found is None else found


def _output(*command: str) -> str:
    """What a program prints; empty if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# ---- build -----------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    from flashmla.cuda import build

    try:
        make = build.prebuild if options.prebuilt else build.build
        print(make(verbose=options.verbose))
    except (OSError, RuntimeError) as error:
        print(f"flashmla build: {error}", file=sys.stderr)
        return 1
    return 0


# ---- bench -----------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    from flashmla.bench import run

    try:
        result = run.benchmark(
            options.op,
            device=options.device,
            quick=options.quick,
            tiers=options.tiers,
            with_peers=not options.no_peers,
            rounds=options.rounds,
        )
    except ValueError as error:
        print(f"flashmla bench: {error}", file=sys.stderr)
        return 2
    if result["tiny"]:
        print("tiny cases on a CPU: they show that the benchmark works, and nothing about speed")
    print(run.table(result))
    if options.out is not None:
        folder = options.out.suffix != ".json"
        path = run.default_path(result, options.out) if folder else options.out
        run.write(result, path)
        print(f"written: {path}")
        if options.op == "sweep" and not result["tiny"]:
            from flashmla.bench import plots

            plots.sweep(result).savefig(path.with_suffix(".svg"))
            print(f"drawn: {path.with_suffix('.svg')}")
    return 0 if result["rows"] else 1
