"""tools/sanitize.py: what it makes of the sanitizer's output, and that its bodies run."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "sanitize.py"
spec = importlib.util.spec_from_file_location("sanitize", TOOL)
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


@pytest.mark.parametrize(
    ("code", "text", "want"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", "clean"),
        (99, "== ERROR SUMMARY: 412 errors\n== ERROR SUMMARY: 312 errors were not printed\n",
         "412 errors"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (99, "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n",
         "3 hazards displayed (3 errors, 0 warnings)"),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n",
         "failed with exit code 0"),
        (98, "", "no CUDA kernel"),
        (0, "no summary at all\n", "failed with exit code 0"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", "failed with exit code 1"),
    ],
)  # fmt: skip
def test_verdict(code, text, want):
    assert sanitize.verdict(code, text) == want


def stand_in(folder: Path, canary: int, others: int) -> Path:
    """A program that claims to be the sanitizer, and to find so many errors."""
    path = folder / "compute-sanitizer"
    path.write_text(f"""#!/bin/sh
case "$*" in *canary*) n={canary};; *) n={others};; esac
echo "========= ERROR SUMMARY: $n errors"
[ $n = 0 ] || exit 99
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("canary", "others", "code", "want"),
    [(12, 0, 0, "clean"), (12, 7, 1, "dsa.topk under memcheck: 7 errors"),
     (0, 0, 1, "the canary was not found, so nothing else counts")],
)  # fmt: skip
def test_a_run_reports_what_the_sanitizer_found(tmp_path, canary, others, code, want):
    program = stand_in(tmp_path, canary, others)
    command = [sys.executable, TOOL, "--sanitizer", program, "--logs", tmp_path, "--tools",
               "memcheck", "--ops", "dsa.topk"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and want in done.stdout, done.stdout + done.stderr
    assert ("dsa.topk" in done.stdout) == (canary > 0)


@pytest.mark.parametrize("op", [op for op in sanitize.BODIES if op != "mla.dense_decode"])
def test_bodies_are_calls_that_the_operations_take(op):
    """On CPU tensors, where the torch tier serves them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = (
        f"import sys; sys.path.insert(0, 'tools'); import sanitize; sanitize.BODIES[{op!r}]('cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
