"""Which tier serves a call, what is said about it, and what cannot be asked for."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

import flashmla
from flashmla import backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OP = "mla.dense_decode"


@pytest.fixture
def tiers(monkeypatch):
    """Stand-ins for the tiers' modules; {tier: what dense_decode's hook says} fills them."""
    for name in ("FLASHMLA_BACKEND", "FLASHMLA_REQUIRE_TIER", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    modules = {}

    def lookup(tier, stage):
        return modules.get(tier, f"has no kernels for {stage} yet")

    monkeypatch.setattr(backend, "_module", lookup)
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_routes", {})
    monkeypatch.setattr(backend, "calls", {})

    def add(tier, refusal=None, **functions):
        functions = functions or {"dense_decode": lambda *args: tier}
        hook = {"supports_dense_decode": lambda *args: refusal}
        modules[tier] = SimpleNamespace(**functions, **hook)
        backend._routes.clear()

    return add


def test_cpu_tensors_go_to_torch(tiers):
    for tier in backend.TIERS:
        tiers(tier)
    assert backend.tier_for(OP, "cpu") == "torch"
    assert backend.explain(OP, CPU) == ("torch", "cpu tensors")
    assert backend.implementation(OP, "cpu")() == "torch"


def test_a_hopper_card_takes_cuda_then_triton_then_torch(tiers):
    tiers("torch")
    assert backend.tier_for(OP, GPU) == "torch"
    tiers("triton")
    tier, reason = backend.explain(OP, GPU)
    assert tier == "triton" and reason == "the cuda tier has no kernels for mla yet"
    tiers("cuda")
    assert backend.explain(OP, GPU) == ("cuda", "a Hopper card")


def test_other_cards_take_triton(tiers, monkeypatch):
    for tier in backend.TIERS:
        tiers(tier)
    monkeypatch.setattr(backend, "_capability", lambda device: (8, 6))
    assert backend.explain(OP, GPU) == ("triton", "compute capability 8.6, no Hopper card")
    with (
        backend.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"needs a Hopper card \(compute capability 9.0\), got 8"),
    ):
        backend.call(OP, GPU)


def test_a_tier_that_lacks_the_function_is_passed_over(tiers):
    tiers("torch")
    tiers("cuda", other=lambda: None)
    assert backend.tier_for(OP, GPU) == "torch"


def test_a_tier_that_refuses_the_arguments_is_passed_over_and_logged_once(tiers, caplog):
    tiers("cuda", refusal="page size 32, not 64")
    tiers("triton")
    with caplog.at_level(logging.WARNING, logger="flashmla"):
        assert backend.call(OP, GPU, 1, 2) == "triton"
        assert backend.call(OP, GPU, 1, 2) == "triton"
    (message,) = caplog.messages
    assert message == (
        "mla.dense_decode runs on the triton tier: the cuda tier does not take these arguments: "
        "page size 32, not 64"
    )
    assert backend.tier_for(OP, GPU) == "cuda"  # no arguments, nothing to refuse
    with (
        backend.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was asked for.*page size 32, not 64"),
    ):
        backend.call(OP, GPU)


def test_calls_are_counted(tiers):
    tiers("torch")
    tiers("triton")
    for _ in range(2):
        backend.call(OP, GPU)
    with backend.use_backend("torch"):
        backend.call(OP, GPU)
    assert backend.calls == {OP: {"triton": 2, "torch": 1}}
    assert backend.last_tier(OP) == "torch" and backend.last_tier("never.called") is None


def test_the_environment_names_a_tier_and_use_backend_overrides_it(tiers, monkeypatch):
    for tier in backend.TIERS:
        tiers(tier)
    monkeypatch.setenv("FLASHMLA_BACKEND", "triton")
    assert backend.tier_for(OP, GPU) == "triton"
    assert backend.explain(OP, GPU)[1] == "asked for by use_backend or FLASHMLA_BACKEND"
    with backend.use_backend("torch"):
        assert backend.tier_for(OP, GPU) == "torch"
        with backend.use_backend("cuda"):
            assert backend.tier_for(OP, GPU) == "cuda"
        assert backend.tier_for(OP, GPU) == "torch"
    monkeypatch.setenv("FLASHMLA_BACKEND", "opencl")
    with pytest.raises(
        ValueError, match=r"FLASHMLA_BACKEND: no tier named 'opencl'; there are cuda"
    ):
        backend.tier_for(OP, GPU)


def test_use_backend_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), backend.use_backend("torch"):
        raise KeyError
    assert backend.forced_backend() is None
    with pytest.raises(ValueError, match="no tier named 'numpy'"), backend.use_backend("numpy"):
        pass


def test_use_backend_is_of_one_thread():
    seen = []
    with backend.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backend.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_what_a_cpu_tensor_cannot_ask_for(tiers):
    for tier in backend.TIERS:
        tiers(tier)
    with backend.use_backend("cuda"), pytest.raises(RuntimeError, match="needs CUDA tensors"):
        backend.call(OP, CPU)
    with backend.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backend.call(OP, CPU)


def test_triton_takes_cpu_tensors_in_its_interpreter(tiers, monkeypatch):
    tiers("triton")
    tiers("torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.tier_for(OP, CPU) == "torch"
    with backend.use_backend("triton"):
        assert backend.tier_for(OP, CPU) == "triton"


@pytest.mark.parametrize(
    ("op", "want"),
    [("mla.dense_decode", True), ("split_kv.get_metadata", True), ("split_kv.merge_state", True),
     ("split_kv.combine", False), ("dsa.topk", True), ("mha.forward", True)],
)  # fmt: skip
def test_what_hopper_has_kernels_for_is_read_off_the_tier(op, want):
    assert backend._has_cuda_kernel(op) is want


def test_a_required_tier_that_steps_down_is_an_error(tiers, monkeypatch):
    monkeypatch.setenv("FLASHMLA_REQUIRE_TIER", "cuda")
    tiers("torch", dense_decode=lambda: "torch", combine=lambda: "torch")
    with pytest.raises(
        RuntimeError, match="FLASHMLA_REQUIRE_TIER=cuda, but mla.dense_decode would"
    ):
        backend.call(OP, GPU)
    assert backend.call("split_kv.combine", GPU) == "torch"  # has no CUDA kernel to step down from
    assert backend.call(OP, CPU) == "torch"
    with backend.use_backend("torch"):  # asked for, and so no step down
        assert backend.call(OP, GPU) == "torch"


def test_a_stage_nobody_has():
    with pytest.raises(RuntimeError, match="nothing.at_all on cpu tensors: the torch tier has no"):
        backend.tier_for("nothing.at_all", "cpu")


def test_every_operation_has_a_torch_implementation():
    from flashmla.cli import OPERATIONS

    for op in OPERATIONS:
        assert backend.tier_for(op, "cpu") == "torch"


def test_public_calls_are_recorded():
    before = backend.calls.get("split_kv.get_metadata", {}).get("torch", 0)
    with flashmla.use_backend("torch"):
        flashmla.get_mla_metadata(torch.ones(2, dtype=torch.int32), 16, 1)
    assert backend.calls["split_kv.get_metadata"]["torch"] == before + 1


def test_import_needs_neither_triton_nor_a_compiler(tmp_path):
    """A fresh interpreter in which importing triton or tvm_ffi fails."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['tvm_ffi'] = None\n"
        "import torch, flashmla\n"
        "assert not any(name.startswith(('flashmla.triton', 'flashmla.cuda')) "
        "for name in sys.modules)\n"
        "out, lse = flashmla.merge_state(*[torch.ones(2, 4), torch.zeros(2)] * 2)\n"
        "assert lse.allclose(torch.full((2,), 2.0).log())\n"
        "try:\n"
        "    with flashmla.use_backend('triton'):\n"
        "        flashmla.merge_state(*[torch.ones(2, 4), torch.zeros(2)] * 2)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    environment = {"PATH": "/nowhere", "TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the triton tier cannot be imported" in done.stdout
