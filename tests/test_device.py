"""utils/device.py: the choice of a device. (CUDA and MPS themselves are not run here.)

python -m pytest tests/test_device.py
"""

import pytest
import torch

from utils import device
from utils.device import choose_device, is_out_of_memory
from utils.errors import UserError


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
def test_a_device_that_is_there_is_taken(machine, requested):
    machine(cuda=2, mps=True)
    assert choose_device(requested) == torch.device(requested)


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ("cuda", "--device cuda: PyTorch sees no CUDA device"),
        ("cuda:3", "--device cuda:3: PyTorch sees no CUDA device"),
        ("mps", "--device mps: PyTorch sees no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there_is_a_users_mistake(machine, requested, words):
    machine()
    with pytest.raises(UserError, match=words):
        choose_device(requested)


def test_a_cuda_device_beyond_the_last_is_a_users_mistake(machine):
    machine(cuda=2)
    with pytest.raises(UserError, match="sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_a_cpu_run_never_asks_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for CUDA"))
    device.synchronize(choose_device("cpu"))


def test_running_out_of_memory_is_recognised_on_any_device():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
