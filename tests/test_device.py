"""utils/device.py: the choice of device, precision and backend. CUDA and MPS are not run here.

python -m pytest tests/test_device.py
"""

import pytest
import torch

from utils import device
from utils.device import (
    MIN_FLOPS_TO_COMPILE,
    CompileResult,
    autocast,
    choose_backend,
    choose_device,
    choose_precision,
    compile_model,
    configure_matmul,
)
from utils.errors import UserError
from utils.memory import is_out_of_memory


@pytest.fixture
def machine(monkeypatch):
    def make(cuda: int = 0, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (1, True, "cuda")],
)
def test_auto_is_cuda_else_mps_else_cpu(machine, cuda, mps, expected):
    machine(cuda, mps)
    assert choose_device("auto").type == expected


@pytest.mark.parametrize("requested", ["cpu", "mps", "cuda", "cuda:1"])
def test_an_available_device_is_used(machine, requested):
    machine(cuda=2, mps=True)
    assert choose_device(requested) == torch.device(requested)


@pytest.mark.parametrize(
    ("requested", "facts"),
    [
        ("cuda", "--device cuda: .* 0 CUDA.* --device auto"),
        ("cuda:3", "--device cuda:3: .* 0 CUDA.* --device auto"),
        ("mps", "--device mps: .* 0 MPS.* --device auto"),
    ],
)
def test_a_missing_device_is_a_users_mistake(machine, requested, facts):
    machine()
    with pytest.raises(UserError, match=facts):
        choose_device(requested)


def test_a_cuda_device_beyond_the_last_is_a_users_mistake(machine):
    machine(cuda=2)
    with pytest.raises(UserError, match=r"cuda:2.* 2 CUDA devices"):
        choose_device("cuda:2")


def test_a_cpu_run_never_initializes_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for CUDA"))
    device.synchronize(choose_device("cpu"))


def test_out_of_memory_is_recognized_on_any_device():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


# Precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "capability", "has_bf16", "expected"),
    [
        ("cuda", (9, 0), False, "bf16"),
        ("cuda", (8, 0), False, "bf16"),
        ("cuda", (7, 5), True, "fp32"),  # emulated there
        ("cpu", None, True, "bf16"),
        ("cpu", None, False, "fp32"),
        ("mps", None, True, "fp32"),
    ],
)
def test_auto_is_bf16_if_the_processor_supports_it_natively(
    monkeypatch, kind, capability, has_bf16, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device, "has_bf16_instructions", lambda: has_bf16)
    assert choose_precision("auto", torch.device(kind)) == expected


@pytest.mark.parametrize("requested", ["fp32", "bf16", "fp16"])
def test_a_requested_precision_is_used(requested):
    for kind in ("cpu", "cuda", "mps"):
        assert choose_precision(requested, torch.device(kind)) == requested


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_matrix_products_are_in_the_precision_and_weights_stay_float32(precision, dtype):
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), precision):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "requested", "expected"),
    [("cuda", "auto", "high"), ("cuda", "bf16", "high"), ("cuda", "fp32", "highest")],
)
def test_tf32_is_for_cuda_unless_fp32_is_requested(monkeypatch, kind, requested, expected):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    configure_matmul(torch.device("cpu"), requested)
    assert chosen == []
    configure_matmul(torch.device(kind), requested)
    assert chosen == [expected]


# torch.compile --------------------------------------------------------------------------------


LONG, SHORT = 1e30, 1.0


@pytest.mark.parametrize(
    ("kind", "requested", "backend", "operations", "platform", "mode"),
    [
        ("cpu", "off", "inductor", LONG, "linux", "off"),
        ("cpu", "on", "auto", SHORT, "linux", "inductor"),
        ("cpu", "on", "aot_eager", SHORT, "win32", "aot_eager"),
        ("mps", "on", "auto", SHORT, "darwin", "aot_eager"),
        ("mps", "on", "inductor", SHORT, "darwin", "inductor"),
        ("cpu", "auto", "auto", LONG, "linux", "inductor"),
        ("cpu", "auto", "aot_eager", LONG, "linux", "aot_eager"),
        ("cpu", "auto", "auto", SHORT, "linux", "off"),
        ("cpu", "auto", "auto", MIN_FLOPS_TO_COMPILE["cpu"], "linux", "inductor"),
        ("cpu", "auto", "auto", LONG, "win32", "off"),
        ("cuda", "auto", "auto", LONG, "win32", "inductor"),
        ("cuda", "auto", "auto", LONG, "linux", "inductor"),
        ("cuda", "auto", "auto", MIN_FLOPS_TO_COMPILE["cpu"], "linux", "off"),
        ("mps", "auto", "auto", LONG, "darwin", "off"),
    ],
)
def test_the_backend_depends_on_device_length_and_settings(
    monkeypatch, kind, requested, backend, operations, platform, mode
):
    monkeypatch.setattr(device.sys, "platform", platform)
    chosen = choose_backend(requested, backend, torch.device(kind), operations)
    assert chosen.mode == mode
    assert chosen.reason


def test_compiling_is_probed_with_a_forward_and_backward_pass_that_leave_the_generator_unchanged():
    model, called = torch.nn.Linear(2, 2), []

    def probe(train_model):
        called.append(train_model)
        torch.rand(1)
        train_model(torch.ones(1, 2)).sum().backward()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    train_model, result = compile_model(model, CompileResult("aot_eager", "why"), "on", probe)
    assert called == [train_model]
    assert result == CompileResult("aot_eager", "why")
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


def broken(train_model):
    raise RuntimeError("\n  no compiler here\nand a page of advice")


def test_auto_falls_back_and_records_the_reason():
    model = torch.nn.Linear(2, 2)
    train_model, result = compile_model(model, CompileResult("inductor", "why"), "auto", broken)
    assert train_model is model
    assert (result.mode, result.fell_back) == ("off", True)
    assert "inductor" in result.reason and "RuntimeError: no compiler here" in result.reason


def test_on_is_a_users_mistake_if_compiling_fails():
    with pytest.raises(UserError) as caught:
        compile_model(torch.nn.Linear(2, 2), CompileResult("inductor", ""), "on", broken)
    (line,) = caught.value.problems
    for fact in ("torch_compile is on", "inductor", "no compiler here", "C++ compiler", "off"):
        assert fact in line


def test_off_compiles_nothing():
    model = torch.nn.Linear(2, 2)
    train_model, result = compile_model(model, CompileResult("off", "why"), "off", broken)
    assert train_model is model
    assert result == CompileResult("off", "why")


def test_out_of_memory_is_not_reported_as_a_broken_compiler():
    def probe(train_model):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        compile_model(torch.nn.Linear(2, 2), CompileResult("inductor", ""), "auto", probe)


def test_every_model_of_a_process_is_compiled():
    """PyTorch stops recompiling a function after eight times, with a warning only."""
    counters = torch._dynamo.utils.counters
    for size in range(1, 13):

        def probe(train_model, size=size):
            counters.clear()
            train_model(torch.ones(1, size)).sum().backward()

        compile_model(Sum(size), CompileResult("aot_eager", ""), "on", probe)
        assert counters["frames"]["ok"] == counters["frames"]["total"] > 0, size


class Sum(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x):
        return (x * self.weight).sum()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx512_bf16", True),
        ("fpu avx512f avx512_vnni", False),
    ],
)
def test_bf16_instructions_are_read_from_the_cpu_flags_of_linux(monkeypatch, flags, expected):
    cpuinfo = f"processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: {flags}\n"
    monkeypatch.setattr(device.Path, "read_text", lambda path, encoding: cpuinfo)
    assert device.has_bf16_instructions() == expected
    assert device.get_processor_name() == "A CPU: fast"


def test_a_system_without_cpuinfo_has_no_bf16_and_a_processor_name(monkeypatch):
    def missing(path, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(device.Path, "read_text", missing)
    assert not device.has_bf16_instructions()
    assert device.get_processor_name()
