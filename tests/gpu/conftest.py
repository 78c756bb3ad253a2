"""Fixtures of the GPU tests: a small model that exercises the GPU's kernels, on a CUDA device.

python -m pytest tests/gpu -m gpu -n 4 --dist loadgroup
"""

import os
from collections.abc import Callable

import pytest
import torch

from callbacks import TrainResult
from config import ConfigLoader
from parameters import ModelConfig
from resume import plan_run
from trainer import train

# Several workers compile at once: few threads each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")


@pytest.fixture(autouse=True, scope="session")
def device() -> str:
    """The device under test. Without one, all tests of this directory are skipped."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return "cuda"


@pytest.fixture(autouse=True)
def _default_matmul_precision():
    """Undo a run's choice of TF32, which is global, and free its memory."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.cuda.empty_cache()


@pytest.fixture
def make_config(tiny, device) -> Callable[..., ModelConfig]:
    """Return a function that makes a config on the device; keywords change it.

    The context is long enough that attention's backward pass divides it among thread blocks.
    """

    def make(**changes) -> ModelConfig:
        settings = {
            **{"block_size": 256, "n_embd": 128, "n_head": 2, "n_layer": 2, "batch_size": 4},
            **{"max_iters": 8, "lr_decay_iters": 24, "learning_rate": 3e-3, "eval_interval": 4},
            **{"device": device, "torch_compile": "off", "histogram_interval": 0},
        }
        return tiny(**{**settings, **changes})

    return make


@pytest.fixture
def run(make_config, quiet) -> Callable[..., TrainResult]:
    """Return a function that trains on the device; keywords are settings."""
    return lambda **changes: train(make_config(**changes), output=quiet)


@pytest.fixture
def resume(quiet) -> Callable[..., TrainResult]:
    """Return a function that resumes a run; keywords are flags."""

    def resume(result: TrainResult, **flags) -> TrainResult:
        loaded, plan = plan_run(ConfigLoader(flags), resume=str(result.run_dir))
        return train(loaded.config, loaded=loaded, plan=plan, output=quiet)

    return resume
