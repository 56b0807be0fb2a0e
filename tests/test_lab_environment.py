"""What the notebooks know about this machine, and about the cards where results were recorded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from flashmla.lab import environment, provenance


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [
        {"op": "dense_decode", "case": "a", "impl": "flashmla-cuda", "us": 10.0},
        {"op": "dense_decode", "case": "b", "impl": "flashmla-cuda", "us": 20.0},
        {"op": "dense_decode", "case": "a", "impl": "peer:x-1", "us": 11.0},
    ]
    first = {
        "provenance": {"gpu": "Card A", "commit": "abc", "date": "2026-01-01"},
        "ceilings": {"read_gbps": 3000.0, "matmul_tflops": 800.0},
        "rows": rows,
    }
    second = {"provenance": {"gpu": "Card B"}, "rows": rows[:1]}
    (tmp_path / "a.json").write_text(json.dumps(first))
    (tmp_path / "b.json").write_text(json.dumps(second))
    return tmp_path


def test_recorded_rows_carry_their_device(results: Path):
    found = environment.recorded("a", impl="flashmla-cuda", results=results)
    assert [(row["device"], row["us"]) for row in found] == [("Card A", 10.0), ("Card B", 10.0)]
    assert (found[0]["commit"], found[0]["date"]) == ("abc", "2026-01-01")
    assert found[1]["commit"] == "unknown"


def test_a_row_of_an_earlier_run_says_so_itself(tmp_path: Path):
    row = {"op": "dense_decode", "case": "a", "impl": "x", "us": 1.0, "commit": "old"}
    file = {"provenance": {"gpu": "Card", "commit": "new", "date": "2026-01-01"}, "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(file))
    (found,) = environment.recorded(results=tmp_path)
    assert (found["device"], found["commit"], found["date"]) == ("Card", "old", "2026-01-01")


def test_recorded_without_a_wish_gives_every_row(results: Path):
    assert len(environment.recorded(results=results)) == 4
    assert [row["case"] for row in environment.recorded(op="dense_decode", results=results)] == [
        *("a", "b", "a"),
        "a",
    ]
    assert environment.recorded(op="sparse_decode", results=results) == []


def test_ceilings_come_only_from_files_that_have_them(results: Path):
    (ceilings,) = environment.recorded_ceilings(results)
    assert (ceilings["device"], ceilings["read_gbps"]) == ("Card A", 3000.0)


def test_nothing_recorded_is_an_empty_list(tmp_path: Path):
    assert environment.recorded(results=tmp_path / "none") == []
    assert environment.recorded_ceilings(tmp_path / "none") == []


@pytest.mark.parametrize(
    "available, capability, want",
    [(False, None, "cpu"), (True, (9, 0), "cuda"), (True, (8, 0), "cpu"), (True, (10, 0), "cpu")],
)
def test_only_a_hopper_card_counts(monkeypatch, available, capability, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert environment.device() == want
    assert environment.sizes("small", "large") == {"cpu": "small", "cuda": "large"}[want]


def test_provenance_names_everything_and_renders_as_a_table():
    told = provenance.provenance()
    wanted = "gpu driver cuda torch triton python cpu flashmla commit date"
    assert list(told) == wanted.split()
    assert all(isinstance(value, str) and value for value in told.values())
    assert told["torch"] == torch.__version__
    assert f"| torch | {torch.__version__} |" in told._repr_markdown_().splitlines()


def test_commit_may_be_told_to_copies_without_history(monkeypatch):
    monkeypatch.setenv("FLASHMLA_COMMIT", "1234abcd")
    assert provenance.provenance()["commit"] == "1234abcd"


def test_commit_is_the_checkouts_and_says_when_files_differ(tmp_path: Path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "flashmla" / "lab" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("one\n")
    monkeypatch.delenv("FLASHMLA_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance._commit() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert provenance._commit() == git("rev-parse", "HEAD")
    module.write_text("two\n")
    assert provenance._commit() == git("rev-parse", "HEAD") + " + local changes"
