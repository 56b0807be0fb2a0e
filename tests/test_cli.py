"""The command line: what the doctor tells, what a build that fails says, what bench writes."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from flashmla import backend, cli
from flashmla.bench import run
from flashmla.ops import library


def test_doctor_names_machine_compiler_kernels_and_tiers(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for title in ("machine", "compiler", "kernels", "tiers"):
        assert f"\n{title}\n" in said
    for fact in ("flashmla", "Python", "torch", "driver", "GPU"):
        assert f"\n  {fact}" in said


def test_doctor_tells_each_operations_tier_and_why(capsys, monkeypatch):
    reasons = {name: ("triton", f"because of {name}") for name in cli.OPERATIONS}
    monkeypatch.setattr(backend, "explain", lambda op, device: reasons[op])
    assert cli.main(["doctor", "--tiers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        [name, "triton", "because", "of", name] for name in cli.OPERATIONS
    ]


def test_doctor_goes_on_where_something_is_broken(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no tier can")

    fake = types.SimpleNamespace(find_nvcc=broken, find_cutlass=broken, library_path=broken)
    monkeypatch.setitem(sys.modules, "flashmla.cuda.build", fake)
    monkeypatch.setattr(backend, "explain", broken)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "nvcc                       not found: no tier can" in said
    assert said.count("none    no tier can") == len(cli.OPERATIONS)


def test_doctor_knows_every_operation_there_is():
    """What it lists is what the dispatcher has registered, and the torch tier has all of it."""
    assert sorted(cli.OPERATIONS) == sorted(library.defined)
    for operation in cli.OPERATIONS:
        stage, name = operation.split(".")
        assert hasattr(torch.ops.flashmla, f"{stage}_{name}")
        assert callable(getattr(importlib.import_module(f"flashmla.torch.{stage}"), name))


def with_build(monkeypatch: pytest.MonkeyPatch, folder: Path, build) -> types.SimpleNamespace:
    """Puts a stand-in builder where the command imports it from."""
    package = types.ModuleType("flashmla.cuda")
    fake = types.SimpleNamespace(build=build, __file__=str(folder / "build.py"))
    package.build = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashmla.cuda", package)
    monkeypatch.setitem(sys.modules, "flashmla.cuda.build", fake)
    return fake


def test_build_that_fails_says_why(monkeypatch, capsys, tmp_path):
    def build(verbose=False):
        raise RuntimeError("nvcc was not found")

    with_build(monkeypatch, tmp_path, build)
    assert cli.main(["build"]) == 1
    assert "flashmla build: nvcc was not found" in capsys.readouterr().err


def test_build_prints_where_the_library_is(monkeypatch, capsys, tmp_path):
    fake = with_build(monkeypatch, tmp_path, lambda verbose=False: Path("cached.so"))
    fake.prebuild = lambda verbose=False: Path("wheel.so")
    assert cli.main(["build"]) == 0 and cli.main(["build", "--prebuilt"]) == 0
    assert capsys.readouterr().out.split() == ["cached.so", "wheel.so"]


def test_bench_writes_rows_with_provenance(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device: CEILINGS)
    arguments = ["bench", "--op", "dense_decode", "--device", "cpu", "--rounds", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert result["tiny"] is True
    assert {"gpu", "torch", "commit", "date"} <= set(result["provenance"])
    assert [row["case"] for row in result["rows"]] == [
        "b=2 h_q=16 s_q=1 s_k=256",
        "b=2 h_q=16 s_q=2 s_k=192±64",
    ]
    for row in result["rows"]:
        assert row["impl"] == "flashmla-torch" and row["clock"] == "wall"
        assert row["eager_us"] is None and row["us"] > 0
        assert 0 < row["error"] < 4e-3  # bfloat16 keeps 8 bits of outputs below 1 or so
    assert "nothing about speed" in capsys.readouterr().out


def test_bench_names_the_operations_there_are(capsys, monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device: CEILINGS)
    assert cli.main(["bench", "--op", "decode", "--device", "cpu"]) == 2
    message = "op is 'decode', expected 'all', 'sweep' or one of dense_decode"
    assert message in capsys.readouterr().err


CEILINGS = run.Ceilings(read_gbps=10.0, copy_gbps=9.0, matmul_tflops=0.5)
