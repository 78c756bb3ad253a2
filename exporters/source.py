"""The model that is exported, as the exporters read it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load

from bundle import WEIGHTS_FILE, Bundle, create_weights_error, load_tokenizer, read_bundle
from checkpoint import load_weights
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportSource:
    """A bundle, read with its weights, its tokenizer, and its model: in eval mode, on the CPU."""

    bundle: Bundle
    tokenizer: Tokenizer
    model: LanguageModel

    @property
    def config(self) -> ModelConfig:
        """The settings of the architecture."""
        return self.bundle.config

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by Folio's names, a tied head left out."""
        return load(self.bundle.contents[WEIGHTS_FILE])

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the bundle's `model.safetensors`."""
        return self.bundle.state.files[WEIGHTS_FILE]


def load_source(directory: Path) -> ExportSource:
    """Load a bundle's model. Raises `UserError` or `RunError` as `inference.load_model` does."""
    bundle = read_bundle(directory, WEIGHTS_FILE)
    tokenizer = load_tokenizer(bundle)
    model = LanguageModel(bundle.config, bundle.vocab_size, tokenizer.num_tokens)
    load_weights(bundle, model)
    return ExportSource(bundle, tokenizer, model.eval())
