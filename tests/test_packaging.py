"""The package as a user gets it: what it needs, what it carries, and what the commands rest on."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What conda-forge calls differently.
CONDA_NAMES = {
    "pytorch": "torch",
    "matplotlib-base": "matplotlib",
    "stack_data": "stack-data",
    "pure_eval": "pure-eval",
}
# What pip does not bring: tools, and things that only a GPU machine needs.
CONDA_ONLY = {
    "pip", "make", "nodejs", "cuda-nvcc", "cuda-cudart-dev", "cuda-cccl", "cxx-compiler", "cutlass",
    "pytorch-gpu",
}  # fmt: skip


def declared() -> dict[str, SpecifierSet]:
    """name -> range of everything in pyproject.toml, the extras included, without itself."""
    lines = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    found = [Requirement(line) for line in lines]
    return {item.name: item.specifier for item in found if item.name != "flashmla"}


def conda() -> dict[str, SpecifierSet]:
    """name -> range of environment.yml, its pip part included."""
    found = {}
    for line in (ROOT / "environment.yml").read_text().splitlines():
        match = re.fullmatch(r"\s+- ([A-Za-z0-9_.-]+)\s*([<>=!][^#:]*)?", line)
        if match and match[1] != "conda-forge":
            found[match[1]] = SpecifierSet((match[2] or "").strip())
    return found


def test_conda_environment_is_in_step_with_pyproject():
    ours = declared()
    theirs = {CONDA_NAMES.get(name, name): spec for name, spec in conda().items()}
    python = theirs.pop("python")
    assert python == SpecifierSet(PROJECT["requires-python"])
    assert {name: str(theirs[name]) for name in theirs if name not in CONDA_ONLY} == {
        name: str(spec) for name, spec in ours.items()
    }


def test_conda_brings_a_compiler_and_the_headers():
    found = conda()
    assert found["cuda-nvcc"].contains("12.8") and not found["cuda-nvcc"].contains("12.6")
    assert found["cutlass"].contains("4.2.0")


def test_constraints_pin_versions_that_pyproject_allows():
    ranges = declared()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    for name, version in pins.items():
        if name != "nvidia-cutlass":  # headers for the build, no dependency of the package
            assert ranges[name].contains(version), f"{name}=={version} is outside {ranges[name]}"


def test_torch_is_a_range_and_python_is_3_11_to_3_13():
    assert str(declared()["torch"]) == ">=2.10"
    supported = SpecifierSet(PROJECT["requires-python"])
    wanted = {"3.10": False, "3.11": True, "3.12": True, "3.13": True, "3.14": False}
    assert {version: supported.contains(version) for version in wanted} == wanted


def test_notebook_runner_has_what_it_silently_needs():
    # Without these three nbmake 1.5.5 reports a failing cell as passed.
    names = {Requirement(line).name for line in PROJECT["optional-dependencies"]["notebooks"]}
    assert {"stack-data", "executing", "pure-eval"} <= names


def test_import_needs_neither_gpu_nor_compiler_nor_extras():
    script = (
        "import sys, json, flashmla; "
        "print(json.dumps([n for n in ('triton', 'tvm_ffi', 'matplotlib') if n in sys.modules]))"
    )
    bare = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")  # of every build


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, by setuptools itself, with no network."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def build_wheel(folder: Path, prebuilt: bool = False) -> Path:
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "prebuilt")
    for name in ("flashmla", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    if prebuilt:
        library = tree / "flashmla" / "cuda" / "prebuilt" / "libflashmla.so"
        library.parent.mkdir(parents=True)
        library.write_bytes(b"\x7fELF")
    return build(tree, "wheel")


def build(tree: Path, kind: str) -> Path:
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}('.'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = tree / done.stdout.split()[-1]
    assert ("holds no library" in done.stderr) == made.name.endswith("-any.whl")
    return made


def test_wheel_carries_every_kernel_source(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".cu", ".cuh", ".h"}
    }
    assert len(sources) > 5
    assert {f"flashmla/{name}" for name in sources} <= inside


def test_wheel_carries_every_module_and_no_test(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flashmla").rglob("*.py")}
    assert modules <= inside and "flashmla/py.typed" in inside
    assert not [name for name in inside if name.startswith(("tests/", "tools/"))]


def test_installed_package_finds_its_sources_and_knows_their_library(wheel: Path, tmp_path: Path):
    from flashmla.cuda import build

    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "from flashmla.cuda import build; print(build.source_folder(), build.prebuilt_path().name)"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd="/", env=environ, capture_output=True, text=True
    )
    assert done.stdout.split() == [
        str(tmp_path / "flashmla" / "csrc"),
        build.prebuilt_path().name,
    ]


def test_wheel_without_a_library_is_for_every_platform(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_with_a_library_is_for_this_platform_and_every_python(tmp_path: Path):
    wheel = build_wheel(tmp_path, prebuilt=True)
    assert re.search(r"-py3-none-(linux|macosx|win)_?\w+\.whl$", wheel.name), wheel.name
    assert "flashmla/cuda/prebuilt/libflashmla.so" in zipfile.ZipFile(wheel).namelist()


def test_source_archive_carries_what_its_tests_read(tmp_path: Path):
    made = shutil.ignore_patterns("__pycache__", "prebuilt", "_build", "generated", "stages")
    for name in ("benchmarks", "book", "csrc", "flashmla", "notebooks", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=made)
    for name in (*FILES, "Makefile", "constraints.txt", "environment.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    wanted = {path.as_posix() for path in files if "vendor" not in path.parts}
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert len(wanted) > 100 and not wanted - inside


def test_version_is_a_literal():
    # setuptools reads it without importing the package, since torch is not there in a build.
    tree = ast.parse((ROOT / "flashmla" / "__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(values) == 1 and isinstance(values[0], ast.Constant)


# ---- what the Makefile rests on --------------------------------------------------------------


def find_python(tmp_path: Path, scripts: dict[str, str], **environ: str):
    """Runs tools/find_python.sh with a PATH that holds these stand-ins alone."""
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "find_python.sh")],
        env={"PATH": str(tmp_path), **environ}, capture_output=True, text=True,
    )  # fmt: skip


def test_python_is_found_past_stubs_that_do_not_run(tmp_path: Path):
    real = f'exec "{sys.executable}" "$@"'
    found = find_python(tmp_path, {"python3": "echo no such version >&2; exit 127", "python": real})
    assert found.returncode == 0 and found.stdout.strip() == str(tmp_path / "python")


def test_missing_python_is_said(tmp_path: Path):
    found = find_python(tmp_path, {"python3": "exit 1"})
    assert found.returncode == 1 and found.stdout == ""
    assert "no Python 3.11, 3.12 or 3.13 was found" in found.stderr


def test_python_that_was_named_is_not_replaced(tmp_path: Path):
    found = find_python(tmp_path, {"python3": "exit 0"}, PYTHON="/no/such/python")
    assert found.returncode == 1 and "PYTHON=/no/such/python is no Python" in found.stderr


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import dev as module

    return module


def test_install_stamp_follows_what_it_depends_on(dev, tmp_path: Path, monkeypatch):
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    before = dev.stamp_of("package")
    assert before == dev.stamp_of("package") and before != dev.stamp_of("book")
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("torch==2.12.0\n")
    assert dev.stamp_of("package") != before


def test_counts_of_a_report(dev, tmp_path: Path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert dev.counts(report) == {"passed": 4, "failed": 3, "skipped": 3}
    assert dev.counts(tmp_path / "none.xml") == {"passed": 0, "failed": 0, "skipped": 0}


def test_system_environment_names_all_that_is_missing(dev, monkeypatch, capsys):
    monkeypatch.setitem(dev.NEEDS, "test", ["pytest", "no_such_module_a", "no_such_module_b"])
    with pytest.raises(SystemExit):
        dev.check_system(dev.Run("system"), "test")
    said = capsys.readouterr().err
    assert "it lacks: no_such_module_a, no_such_module_b" in said


def fake_card(monkeypatch: pytest.MonkeyPatch, folder: Path, capability: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {capability}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("FLASHMLA_REQUIRE_TIER", raising=False)


def test_hopper_machine_demands_the_cuda_tier(dev, monkeypatch, tmp_path: Path):
    fake_card(monkeypatch, tmp_path, "9.0")
    assert dev.Run("system").environ()["FLASHMLA_REQUIRE_TIER"] == "cuda"


def test_other_cards_demand_nothing(dev, monkeypatch, tmp_path: Path):
    fake_card(monkeypatch, tmp_path, "8.0")
    assert "FLASHMLA_REQUIRE_TIER" not in dev.Run("system").environ()


@pytest.mark.parametrize(
    ("log", "required", "fine"),
    [
        ("mla.dense_decode torch\n", "", True),
        ("mla.dense_decode torch\n", "cuda", False),
        ("split_kv.merge_state cuda\n", "cuda", False),
        ("mla.dense_decode torch\nmla.dense_decode cuda\n", "cuda", True),
    ],
)
def test_card_whose_kernels_did_not_run_fails_the_run(
    dev, monkeypatch, tmp_path: Path, log: str, required: str, fine: bool
):
    monkeypatch.setenv("FLASHMLA_REQUIRE_TIER", required)
    (tmp_path / "log").write_text(log)
    run = dev.Run("system")
    assert dev.note_tiers(run, tmp_path / "log") is fine
    op = log.split()[0]
    assert any(line.split()[0] == op for line in run.lines if "served by" in line)


def test_dispatcher_notes_who_served_once(monkeypatch, tmp_path: Path, dev):
    import torch

    from flashmla import backend, merge_state

    log = tmp_path / "log"
    monkeypatch.setenv("FLASHMLA_TIER_LOG", str(log))
    monkeypatch.setattr(backend, "calls", {})
    half = (torch.zeros(1, 2), torch.zeros(1))
    for _ in range(3):
        merge_state(*half, *half)
    assert log.read_text() == "split_kv.merge_state torch\n"
    assert dev.served(log) == {"split_kv.merge_state": ["torch"]}


@pytest.mark.parametrize("answer", ["passed", "broke"])
def test_canary_stops_a_run_that_cannot_see_failures(dev, monkeypatch, capsys, answer):
    result = {"passed": (0, "1 passed"), "broke": (4, "no kernel")}[answer]
    fake = subprocess.CompletedProcess([], result[0], stdout=result[1], stderr="")
    monkeypatch.setattr(dev.subprocess, "run", lambda *_, **__: fake)
    with pytest.raises(SystemExit) as stopped:
        dev.canary(dev.Run("system"))
    assert stopped.value.code == 1
    said = {"passed": "a failing notebook PASSED", "broke": "did not get as far"}[answer]
    assert said in capsys.readouterr().out


def test_executed_copies_need_a_card_and_start_from_the_sources(dev, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(dev, "hopper_card", lambda: False)
    with pytest.raises(SystemExit):
        dev.command_executed(dev.Run("system"), [])
    source, target = tmp_path / "notebooks", tmp_path / "executed"
    for folder, name in ((source, "00_new.ipynb"), (target, "00_gone.ipynb")):
        folder.mkdir()
        (folder / name).write_text("{}")
    assert dev.fresh_copies(source, target) == [target / "00_new.ipynb"]
    assert [path.name for path in target.iterdir()] == ["00_new.ipynb"]


# ---- a skipped GPU test on a card is a failure -----------------------------------------------

GPU_FILE = """
import pytest

{module_level}

@pytest.mark.gpu
def test_on_card():
    pytest.skip("planted")

def test_elsewhere():
    pass
"""


@pytest.mark.parametrize(
    ("required", "module_level", "outcome"),
    [
        ("", "", "1 passed, 1 skipped"),
        ("cuda", "", "1 failed, 1 passed"),
        ("cuda", "pytest.skip('planted', allow_module_level=True)", "1 error"),
    ],
)
def test_skip_on_a_card_is_a_failure(
    tmp_path: Path, required: str, module_level: str, outcome: str
):
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (folder / "test_planted.py").write_text(GPU_FILE.format(module_level=module_level))
    environ = {**os.environ, "FLASHMLA_REQUIRE_TIER": required, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == (required == ""), done.stdout
    assert outcome in done.stdout.replace("1 passed, 1 failed", "1 failed, 1 passed")
