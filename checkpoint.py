"""A live model into a bundle, and back."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bundle import read_bundle, write_bundle
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import CharTokenizer, from_state
from utils.errors import UserError


def save_export(
    directory: Path,
    model: LanguageModel,
    tokenizer: CharTokenizer,
    config: ModelConfig,
    state: dict[str, Any],
) -> None:
    """Write `model` as it is now into the bundle `directory`, in the place of what is there."""
    device = next(model.parameters()).device.type
    metadata = {"step": str(state["step"]), "run_id": str(state["run_id"])}
    write_bundle(
        directory,
        config=config,
        vocab_size=model.vocab_size,
        device=device,
        tokenizer=tokenizer.state(),
        state=state,
        save_weights=lambda path: model.save_safetensors(path, metadata),
    )


def load_model(
    directory: Path, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, CharTokenizer, dict[str, Any]]:
    """The model in a bundle, its tokenizer and its training state; the model in eval mode.

    Raises `UserError` that names the file that is missing or does not fit.
    """
    bundle = read_bundle(directory)
    tokenizer = from_state(bundle.tokenizer)
    if tokenizer.vocab_size != bundle.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has {tokenizer.vocab_size} tokens and config.json says "
            f"{bundle.vocab_size}: these files are not of one model"
        )
    model = LanguageModel(bundle.config, bundle.vocab_size)
    try:
        model.load_safetensors(bundle.weights)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{bundle.weights}: not the weights of this model: {reason}") from None
    return model.to(device).eval(), tokenizer, bundle.state
