"""What holds for every test: on a Hopper card no GPU test may be skipped, and the run says which
tiers served it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def hopper_present() -> bool:
    """True if torch sees a card of compute capability 9.x."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def card_expected() -> bool:
    """True where GPU tests have to run: a Hopper card is there, or the caller demands its tier."""
    return hopper_present() or os.environ.get("FLASHMLA_REQUIRE_TIER") == "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if card_expected():
        return
    reason = "needs a Hopper card (sm_90a), and torch sees none"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turns the skip of a GPU test into a failure where a card is there: unproved is not passed."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and item.get_closest_marker("gpu") and card_expected():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"GPU test skipped on a machine with a Hopper card: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for a whole file under gpu/ that skips itself while it is being collected."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and "gpu" in collector.path.parts and card_expected():
        report.outcome = "failed"
        report.longrepr = f"GPU tests skipped on a machine with a Hopper card: {report.longrepr}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which tier served how many calls, from the dispatcher's own record."""
    try:
        from flashmla import backend
    except ImportError:
        return
    calls = getattr(backend, "calls", None)
    if not calls:
        return
    terminalreporter.section("calls served, by operation and tier")
    for op, tiers in sorted(calls.items()):
        served = ", ".join(f"{tier} {count}" for tier, count in sorted(tiers.items()))
        terminalreporter.write_line(f"{op:28s} {served}")
