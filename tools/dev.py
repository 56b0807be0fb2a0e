"""What stands behind the Makefile: environment, kernels, tests, notebooks, book, summary.

Runs with any Python 3.11+ and its standard library alone, since it is what makes the environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOGS = ROOT / ".cache" / "make"
CANARY = ROOT / "tests" / "canary" / "failing.ipynb"
MATHJAX = ROOT / "tools" / "mathjax.py"

# Import names that each command needs; with ENV=system nothing is installed, so they are checked.
NEEDS = {
    "package": ["numpy", "ml_dtypes", "torch", "tvm_ffi"],
    "test": ["pytest", "hypothesis", "nbformat", "matplotlib"],
    "notebooks": [
        "pytest", "nbmake", "ipykernel", "matplotlib", "stack_data", "executing", "pure_eval",
    ],
    "lab": ["jupyterlab", "matplotlib"],
    "book": ["sphinx", "myst_nb", "sphinx_book_theme", "sphinx_exercise", "matplotlib"],
    "bench": ["matplotlib"],
    "lint": ["ruff", "mypy"],
}  # fmt: skip


@dataclass
class Run:
    """One command's life: where it runs, its steps, and what it has to say at the end."""

    env: str
    started: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    @property
    def python(self) -> str:
        """The interpreter that runs the project's code."""
        if self.env == "system":
            return sys.executable
        return str(VENV / ("Scripts" if os.name == "nt" else "bin") / "python")

    def environ(self) -> dict[str, str]:
        """The environment of the project's processes."""
        environ = dict(os.environ)
        if self.env == "system":  # the package is not installed there: it is found by its path
            paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
            environ["PYTHONPATH"] = os.pathsep.join(paths)
        if hopper_card() and "FLASHMLA_REQUIRE_TIER" not in environ:
            environ["FLASHMLA_REQUIRE_TIER"] = "cuda"
        return environ

    def step(self, what: str) -> None:
        """Announces a step, with the time since the command began."""
        print(f"\n==> {what}  [{time.monotonic() - self.started:.0f} s]", flush=True)

    def call(self, *arguments: str, check: bool = True) -> int:
        """Runs the project's Python with these arguments, in the repository's root."""
        code = subprocess.call([self.python, *arguments], cwd=ROOT, env=self.environ())
        if check and code != 0:
            self.finish(code)
        return code

    def note(self, line: str) -> None:
        """A line for the summary."""
        self.lines.append(line)

    def finish(self, code: int) -> NoReturn:
        """Prints the summary and ends the command."""
        print("\n---- summary " + "-" * 60)
        for line in self.lines:
            print(line)
        verdict = "passed" if code == 0 else f"FAILED (exit {code})"
        print(f"{verdict} after {time.monotonic() - self.started:.0f} s", flush=True)
        raise SystemExit(code)


def fail(message: str) -> NoReturn:
    print(f"flashmla: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def hopper_card() -> bool:
    """True if the driver lists a card of compute capability 9.x, whatever torch was installed."""
    return any(capability.startswith("9.") for capability in card_field("compute_cap"))


def card_field(name: str) -> list[str]:
    """A field of each card, from nvidia-smi; empty where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={name}", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.split("\n")[:-1] if found.returncode == 0 else []


def find_nvcc() -> str | None:
    """The CUDA compiler on PATH, in CUDA_HOME, or in its usual place."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")]
    places = [Path(home) / "bin" for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which("nvcc") or next(
        (str(place / "nvcc") for place in places if (place / "nvcc").is_file()), None
    )


# ---- environment -----------------------------------------------------------------------------


def pinned(name: str) -> str:
    """The line of constraints.txt that pins a package."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line
    fail(f"constraints.txt does not pin {name}")


def stamp_of(group: str) -> str:
    """What an installed group depends on: change any of it and it is installed again."""
    digest = hashlib.sha256(f"{group} {sys.version} {sys.executable} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        path = ROOT / name
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def pip(run: Run, *arguments: str) -> None:
    """pip install, showing what arrives and not what was there already."""
    command = [run.python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    shown = ("Downloading", "Processing", "Installing collected", "Building editable")
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / "pip.log").open("a") as log, subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if line.lstrip().startswith((*shown, "ERROR", "error")):
                print(f"    {line.strip()[:160]}", flush=True)
    if process.returncode != 0:
        fail(f"pip failed; its whole output is in {LOGS / 'pip.log'}")


def install(run: Run, group: str, *requirements: str) -> None:
    """Installs a group into .venv, once: a stamp says that it is there and up to date."""
    stamp = VENV / f"flashmla-{group}.stamp"
    wanted = stamp_of(group)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    run.step(f"installing into .venv: {group}")
    pip(run, *requirements)
    stamp.write_text(wanted)


def make_venv(run: Run) -> None:
    """Makes .venv, or makes it again when it is broken or was made by another Python."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if Path(run.python).exists():
        script = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([run.python, "-c", script], capture_output=True, text=True)
        if found.stdout.strip() == version:
            return
        print(f".venv does not run Python {version}: making it again")
    run.step(f"making .venv with Python {version} ({sys.executable})")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if made.returncode != 0:
        fail(
            "this Python cannot make virtual environments: its venv or ensurepip module is "
            "missing (on Debian and Ubuntu: apt install python3-venv). Or use the interpreter "
            "as it is with ENV=system."
        )


def check_system(run: Run, command: str) -> None:
    """With ENV=system: names every module that is missing, at once."""
    wanted = [*NEEDS["package"], *NEEDS.get(command, [])]
    script = (
        "import importlib.util, sys; "
        "print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    )
    found = subprocess.run(
        [run.python, "-c", script, *wanted], capture_output=True, text=True, env=run.environ()
    )
    missing = found.stdout.split()
    if found.returncode != 0 or missing:
        fail(
            f"ENV=system uses {run.python} as it is, and it lacks: "
            f"{', '.join(missing) or found.stderr.strip()}. Install them there, or leave ENV out "
            "to have .venv made."
        )


def environment(run: Run, command: str = "test") -> None:
    """The environment that a command needs: made, completed, or checked."""
    if run.env == "system":
        check_system(run, command)
        return
    make_venv(run)
    constrained = ["-c", "constraints.txt"]
    index = os.environ.get("TORCH_INDEX")
    if index:
        install(run, "torch", "--index-url", index, *constrained, "torch")
    install(run, "package", *constrained, "-e", ".[tests]")
    if find_nvcc() is not None:
        # Headers only: what the package declares as its own needs weighs 350 MB.
        install(run, "cutlass", "--no-deps", pinned("nvidia-cutlass"))
    if command == "book":
        install(run, "book", *constrained, "-e", ".[book]")


# ---- steps -----------------------------------------------------------------------------------


def kernels(run: Run) -> None:
    """Builds the CUDA kernels where there is a compiler; on a card they have to build."""
    nvcc = find_nvcc()
    if nvcc is None:
        run.note("kernels: not built (no nvcc); CUDA tensors of sm_90 would be served by Triton")
        return
    run.step(f"kernels for sm_90a with {nvcc}")
    begun = time.monotonic()
    code = run.call("-m", "flashmla", "build", check=False)
    if code != 0:
        run.note("kernels: the build failed")
        run.finish(code)
    run.note(f"kernels: built for sm_90a, {time.monotonic() - begun:.0f} s (objects are cached)")


def served(log: Path) -> dict[str, list[str]]:
    """Operation -> the tiers that served it, from the log that the dispatcher keeps."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    found: dict[str, list[str]] = {}
    for op, tier in sorted({(line.split()[0], line.split()[1]) for line in lines}):
        found.setdefault(op, []).append(tier)
    return found


def note_tiers(run: Run, log: Path) -> bool:
    """Which tier served what, for the summary; False if Hopper's kernels were due and did not."""
    cards = card_field("name,driver_version")
    run.note(f"machine: {cards[0] if cards else 'no NVIDIA card'}")
    tiers = served(log)
    for op, names in tiers.items():
        run.note(f"  {op:26s} served by {', '.join(names)}")
    due = run.environ().get("FLASHMLA_REQUIRE_TIER") == "cuda"
    if due and "cuda" not in tiers.get("mla.dense_decode", []):
        run.note("the Hopper kernel of mla.dense_decode was due, and did not run")
        return False
    return True


def counts(path: Path) -> dict[str, int]:
    """Passed, failed and skipped of a JUnit file."""
    if not path.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
    }


def pytest(run: Run, name: str, options: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Runs pytest, leaves its counts where CI picks them up, and ends the command.

    A whole run (one without arguments of the caller's) that did not use the card's kernels where
    they are due has failed, whatever its tests say.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    report, log = LOGS / f"{name}.xml", LOGS / f"{name}.tiers"
    for stale in (report, log):
        stale.unlink(missing_ok=True)
    os.environ["FLASHMLA_TIER_LOG"] = str(log)
    command = ["-m", "pytest", f"--junitxml={report}", *options, *arguments]
    code = run.call(*command, check=False)
    result = counts(report)
    (LOGS / f"{name}.json").write_text(json.dumps(result))
    run.note(f"{name}: " + ", ".join(f"{number} {what}" for what, number in result.items()))
    if not note_tiers(run, log) and not arguments:
        code = code or 1
    if code == 0 and result["passed"] == 0:
        run.note(f"{name}: nothing passed, so nothing was shown")
        code = 1
    run.finish(code)


def canary(run: Run) -> None:
    """Proves that the notebook runner sees failures: a notebook that fails must fail."""
    run.step("canary: a notebook that fails must be seen to fail")
    found = subprocess.run(
        [run.python, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", str(CANARY)],
        cwd=ROOT, env=run.environ(), capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode == 1 and "the canary fails as it should" in found.stdout:
        print("it does")
        return
    print(found.stdout[-4000:], found.stderr[-2000:], sep="\n")
    if found.returncode == 0:
        run.note(
            "canary: a failing notebook PASSED, so this environment can't test notebooks; nbmake "
            "1.5.5 does that when stack_data, executing or pure_eval is missing"
        )
    else:
        run.note("canary: the notebook runner did not get as far as the failing cell")
    run.finish(1)


def lesson_model(run: Run) -> None:
    """Trains the lessons' small language model and its indexers once per user, apart from the
    notebooks' time."""
    if not (ROOT / "flashmla" / "lab" / "model.py").exists():
        return
    run.step("the lessons' language model (trained once, then cached)")
    begun = time.monotonic()
    script = (
        "from flashmla.lab import environment, indexer, model; "
        "trained = model.load(environment.device()); "
        "[indexer.load(trained, indexer.recipe_for(trained, relu=relu)) for relu in (True, False)]"
    )
    run.call("-c", script)
    run.note(f"model: ready after {time.monotonic() - begun:.0f} s")


# ---- commands --------------------------------------------------------------------------------


def command_env(run: Run, arguments: list[str]) -> None:
    environment(run)
    run.note(f"environment: {run.python}")


def command_kernels(run: Run, arguments: list[str]) -> None:
    environment(run)
    kernels(run)


def command_test(run: Run, arguments: list[str]) -> None:
    environment(run, "test")
    kernels(run)
    run.step("tests")
    pytest(run, "tests", ["--durations=8"], arguments)


def command_notebooks(run: Run, arguments: list[str]) -> None:
    environment(run, "notebooks")
    kernels(run)
    canary(run)
    lesson_model(run)
    run.step("notebooks")
    where = [] if any(name.endswith(".ipynb") for name in arguments) else ["notebooks"]
    options = ["--nbmake", "--nbmake-timeout=900", "-v", "--durations=0", *where]
    pytest(run, "notebooks", options, arguments)


def command_executed(run: Run, arguments: list[str]) -> None:
    if not hopper_card():
        fail("book/executed holds notebooks as they ran on a Hopper card, and none is here")
    environment(run, "notebooks")
    kernels(run)
    canary(run)
    lesson_model(run)
    run.step("notebooks, their outputs kept for the book")
    copies = fresh_copies(ROOT / "notebooks", ROOT / "book" / "executed")
    options = ["--nbmake", "--overwrite", "--nbmake-timeout=900", "-v", *map(str, copies)]
    pytest(run, "executed", options, arguments)


def fresh_copies(notebooks: Path, target: Path) -> list[Path]:
    """Copies of the source notebooks, and no others, to be executed in place."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(notebooks, target, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return sorted(target.glob("*.ipynb"))


def command_lab(run: Run, arguments: list[str]) -> None:
    environment(run, "lab")
    if hopper_card():  # nobody waits for kernels that this machine can't run
        kernels(run)
    run.step("jupyter lab")
    run.call("-m", "jupyter", "lab", "--notebook-dir=notebooks", *arguments)


def command_book(run: Run, arguments: list[str]) -> None:
    environment(run, "book")
    run.step("MathJax for the book, so that its pages need no network")
    run.call(str(MATHJAX))
    run.step("book")
    out = ROOT / "book" / "_build" / "html"
    run.call("-m", "sphinx", "-W", "--keep-going", "-b", "html", *arguments, "book", str(out))
    run.call(str(ROOT / "tools" / "check_book.py"), str(out))
    run.note(f"book: {out / 'index.html'}")


def command_bench(run: Run, arguments: list[str]) -> None:
    environment(run, "bench")
    if hopper_card():  # nobody waits for kernels that this machine can't run
        kernels(run)
    run.step("benchmark")
    run.call("-m", "flashmla", "bench", *arguments)


def command_lint(run: Run, arguments: list[str]) -> None:
    environment(run, "lint")
    run.step("ruff")
    run.call("-m", "ruff", "check", ".")
    run.step("mypy")
    run.call("-m", "mypy")


COMMANDS = {
    name.removeprefix("command_"): function
    for name, function in list(globals().items())
    if name.startswith("command_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", choices=["venv", "system"], default="venv")
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("arguments", nargs="*", help="passed on, after --")
    options = parser.parse_args()
    run = Run(options.env)
    COMMANDS[options.command](run, options.arguments)
    run.finish(0)


if __name__ == "__main__":
    main()
