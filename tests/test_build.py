"""The builder, with a compiler of paper: what is compiled again, and when, and what errors say."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flashmla.cuda import build as builder
from flashmla.cuda import library

NVCC = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = --version ] && {{ echo "cuda release {version}"; echo "Build {version}"; exit 0; }}
for a in "$@"; do last=$a; done
case "$*" in *broken.cu*) echo "broken.cu(3): error: no such thing" >&2; exit 1;; esac
case "$*" in *slow.cu*) echo "wgmma.mma_async instructions are serialized" >&2;; esac
echo object > "$last"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small csrc/ of two kernels that share a header, a paper nvcc, a cache of its own."""
    csrc = tmp_path / "csrc"
    (csrc / "sm90").mkdir(parents=True)
    (csrc / "api.cpp").write_text("int api;\n")
    (csrc / "sm90" / "shared.h").write_text("// shared\n")
    (csrc / "sm90" / "one.cu").write_text('#include "shared.h"\nint one;\n')
    (csrc / "sm90" / "two.cu").write_text("int two;\n")
    cutlass = tmp_path / "cutlass"
    for header in ("cute/tensor.hpp", "cutlass/version.h"):
        (cutlass / header).parent.mkdir(parents=True, exist_ok=True)
        (cutlass / header).write_text("// header\n")
    monkeypatch.setattr(builder, "source_folder", lambda: csrc)
    monkeypatch.setenv("CUTLASS_PATH", str(cutlass))
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHMLA_LIBRARY", raising=False)
    install_nvcc(tmp_path, "13.0", monkeypatch)
    return tmp_path


def install_nvcc(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NVCC.format(log=folder / "log", version=version))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))


def compiled(folder: Path) -> list[str]:
    """The units compiled since the last look."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(Path(w).name for line in lines for w in line.split() if w.endswith((".cu", "pp")))


def test_compiles_all_once(project: Path) -> None:
    path = builder.build()
    assert path.is_file() and compiled(project) == ["api.cpp", "one.cu", "two.cu"]
    assert builder.library_path() == path
    assert builder.build() == path and compiled(project) == []


def test_an_edited_kernel_rebuilds_itself_alone(project: Path) -> None:
    first = builder.build()
    compiled(project)
    (project / "csrc" / "sm90" / "two.cu").write_text("int two = 2;\n")
    assert builder.library_path() is None, "the old library is not the sources' any more"
    assert builder.build() != first and compiled(project) == ["two.cu"]


def test_an_edited_header_rebuilds_what_includes_it(project: Path) -> None:
    builder.build()
    compiled(project)
    (project / "csrc" / "sm90" / "shared.h").write_text("// other\n")
    builder.build()
    assert compiled(project) == ["one.cu"]


def test_another_compiler_compiles_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder.build()
    compiled(project)
    install_nvcc(project, "13.1", monkeypatch)
    assert builder.library_path() is None, "first use must not take the other compiler's library"
    builder.build()
    assert compiled(project) == ["api.cpp", "one.cu", "two.cu"]


def test_an_old_compiler_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvcc(project, "12.4", monkeypatch)
    assert library.available()[0] is False
    with pytest.raises(builder.BuildError, match=r"is of CUDA 12\.4; 12\.8 or later is needed"):
        builder.build()


def test_a_failed_build_is_not_tried_at_every_call(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_failed", "")
    (project / "csrc" / "sm90" / "broken.cu").write_text("nonsense\n")
    for _ in range(2):
        with pytest.raises(builder.BuildError, match="no such thing"):
            library.load()
    assert compiled(project).count("broken.cu") == 1
    assert library.available()[0] is False


def test_prebuilding_leaves_one_library_that_is_found(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project / "prebuilt"
    folder.mkdir()
    (folder / "libflashmla-old.so").write_text("")
    monkeypatch.setattr(builder, "_PREBUILT", folder)
    path = builder.prebuild()
    assert list(folder.iterdir()) == [path]
    assert builder.library_path() == path


def test_an_installed_package_prebuilds_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_PACKAGE", project)  # csrc/ inside it, not beside
    monkeypatch.setattr(builder, "_PREBUILT", project / "prebuilt")
    with pytest.raises(builder.BuildError, match=r"python -m flashmla build --prebuilt in the"):
        builder.prebuild()
    assert not (project / "prebuilt").exists() and not compiled(project)


def test_a_cache_that_cannot_be_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "file").write_text("")
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(project / "file" / "cache"))
    with pytest.raises(builder.BuildError, match="cannot be written"):
        builder.build()


def test_a_failing_compilation_says_what_nvcc_said(project: Path) -> None:
    (project / "csrc" / "sm90" / "broken.cu").write_text("nonsense\n")
    with pytest.raises(
        builder.BuildError, match=r"nvcc failed on .*broken\.cu(?s:.*)no such thing"
    ):
        builder.build()
    assert builder.library_path() is None


def test_serialised_matrix_products_are_an_error(project: Path) -> None:
    (project / "csrc" / "sm90" / "slow.cu").write_text("int slow;\n")
    with pytest.raises(builder.BuildError, match=r"wgmma is serialised in .*slow\.cu"):
        builder.build()


def test_no_compiler(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    available, reason = library.available()
    assert not available and reason.startswith("no built library, and no nvcc: set CUDA_HOME")
    with pytest.raises(builder.BuildError, match="no nvcc: set CUDA_HOME"):
        builder.build()


def test_a_library_built_elsewhere_needs_no_compiler(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = builder.build()
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    assert library.available() == (True, str(path))


def test_no_cutlass(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find_cutlass", lambda: None)
    available, reason = library.available()
    assert not available and reason.startswith("no built library, and no CUTLASS headers")
    with pytest.raises(builder.BuildError, match="no CUTLASS headers: pip install --no-deps"):
        builder.build()


def test_a_named_library(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_LIBRARY", str(project / "nowhere.so"))
    available, reason = library.available()
    assert not available and "no such file" in reason
    (project / "here.so").write_text("")
    monkeypatch.setenv("FLASHMLA_LIBRARY", str(project / "here.so"))
    assert builder.library_path() == project / "here.so"


def test_the_real_sources_are_found() -> None:
    folder = builder.source_folder()
    assert os.path.samefile(folder, Path(__file__).parents[1] / "csrc")
