"""The model that is exported, as the exporters read it."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bundle import WEIGHTS_FILE, Bundle, find_run_by_id, find_run_of, load_tokenizer, read_bundle
from checkpoint import load_weights
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import Tokenizer
from utils.errors import UserError
from utils.memory import check_memory
from utils.report.runs import LoggedRun


@dataclass(frozen=True)
class ExportSource:
    """A bundle that was read with its weights, its tokenizer, and its model in eval mode."""

    bundle: Bundle
    tokenizer: Tokenizer
    model: LanguageModel

    @property
    def config(self) -> ModelConfig:
        """The settings of the architecture."""
        return self.bundle.config

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's float32 tensors by Folio's names, a tied head left out."""
        return self.model.state_dict()

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the bundle's `model.safetensors`."""
        return self.bundle.state.files[WEIGHTS_FILE]

    def check_portable(self) -> None:
        """Raise `UserError` if Transformers and llama.cpp have no model of this architecture."""
        if self.config.architecture == "speedrun":
            raise UserError(
                f"{self.bundle.path}: architecture speedrun has n-gram embeddings, which no model "
                "of Transformers or llama.cpp has: use --format onnx or html, or train a model of "
                "architecture modern"
            )

    def check_range(self, dtype: torch.dtype, wider: str = "bf16 or fp32") -> None:
        """Raise `UserError` if a weight overflows in the dtype; `wider` names those to choose."""
        limit = torch.finfo(dtype).max
        for name, tensor in self.weights.items():
            if (largest := tensor.abs().max().item()) > limit:
                raise UserError(
                    f"{self.bundle.path}: {name} has a weight of {largest:g}, and {dtype} ends at "
                    f"{limit:g}: choose --dtype {wider}"
                )


def load_run(bundle: Bundle, runs_dir: Path) -> LoggedRun | None:
    """Read the record of the run that saved a bundle: it is in that run, or names its id.

    Returns None if there is no such run in `runs_dir`, or its record is damaged.
    """
    place = find_run_of(bundle.path) or find_run_by_id(bundle.state.run_id, runs_dir)
    with contextlib.suppress(UserError):
        return LoggedRun(place) if place is not None else None
    return None


def load_source(directory: Path) -> ExportSource:
    """Load a bundle's model, in float32 on the CPU.

    Raises `UserError` if a file is missing or damaged or the model does not fit into memory, and
    `RunError` if the weights are not finite.
    """
    bundle = read_bundle(directory, WEIGHTS_FILE)
    tokenizer = load_tokenizer(bundle)
    check_memory(bundle.config, bundle.vocab_size, None)
    model = LanguageModel(bundle.config, bundle.vocab_size, tokenizer.num_tokens)
    load_weights(bundle, model)
    bundle = replace(bundle, contents={})  # frees the bytes of the weights
    return ExportSource(bundle, tokenizer, model.eval())
