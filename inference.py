"""Generate text with a trained model.

    python inference.py --prompt "ROMEO:"
    python inference.py --run runs/20260131_235959_baseline --temperature 0.7 --num-samples 3
    python inference.py --model-name dante

All it needs is a bundle, wherever that was moved to.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bundle import find_directory, find_named_model, newest_usable_bundle, usable_bundle
from parameters import Count, Device, ModelName, Positive, Seed, Settings
from utils.command_line import CommandLine
from utils.errors import UserError
from utils.output import Output, run_command


class InferenceConfig(Settings):
    """What to generate, and from which model."""

    run: str | None = None
    """A run's id or directory, or a bundle anywhere. null: the newest run in runs_dir."""

    model_name: ModelName | None = None
    """A named model, instead of a run."""

    runs_dir: str = "runs"
    """Where runs are looked for."""

    checkpoints_dir: str = "checkpoints"
    """Where named models are looked for."""

    prompt: str = ""
    """The text to continue. Empty: a new line."""

    max_new_tokens: Count = 500
    """Tokens to generate for each sample."""

    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Below 1: safer; above 1: wilder; 0: always the likeliest token."""

    top_k: Positive | None = None
    """Choose among the k likeliest tokens only. null: among all."""

    num_samples: Positive = 1
    """How many texts to generate."""

    seed: Seed = 1337
    """The same seed gives the same text."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""


def find_model(config: InferenceConfig) -> Path:
    """The bundle that the settings name. Raises `UserError` where there is none."""
    runs_dir, checkpoints_dir = Path(config.runs_dir), Path(config.checkpoints_dir)
    if config.run is not None and config.model_name is not None:
        raise UserError("--run and --model-name both name a model: choose one")
    if config.model_name is not None:
        return usable_bundle(find_named_model(config.model_name, checkpoints_dir))
    if config.run is not None:
        return usable_bundle(find_directory(config.run, runs_dir, checkpoints_dir))
    return newest_usable_bundle(runs_dir)


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings, load the model, print what it says."""
    flags, _, problems = CommandLine(__doc__, InferenceConfig).parse(argv)
    if problems:
        raise UserError(*problems)
    config = InferenceConfig(**flags)
    directory = find_model(config)

    # Only here is torch imported: help and mistakes are answered at once.
    import torch

    from checkpoint import load_model
    from utils.device import choose_device

    device = choose_device(config.device)
    model, tokenizer, state = load_model(directory, device)
    ids = tokenizer.encode(config.prompt or tokenizer.default_prompt)
    prompt = torch.tensor([ids.tolist()], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    output = Output()
    output.remark(f"{directory}, step {state.step}\n")
    for number in range(config.num_samples):
        ids = model.generate(
            prompt,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            num_tokens=tokenizer.num_tokens,
            generator=generator,
        )
        if number > 0:
            output.line("---")
        output.line(tokenizer.decode(ids[0].cpu().numpy()).strip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
