"""Measure saving: its share of the default run's time, and the peak memory for a larger model.

The default run is shortened to three evaluations; each is a new best, with a checkpoint and an
export. The larger model is saved in its own process, to compare the peak memory before and after.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from bundle import TRAINING_SETTINGS, TrainingState
from checkpoint import CheckpointWriter
from data import load_dataset
from parameters import ModelConfig
from trainer import Trainer, train
from utils.device import get_peak_memory
from utils.output import Output, format_bytes
from utils.run_manager import RunDirectory


def run(data: str | None) -> None:
    seconds: list[float] = []
    save = CheckpointWriter.save

    def time_save(*arguments) -> None:
        start = time.perf_counter()
        save(*arguments)
        seconds.append(time.perf_counter() - start)

    with (
        tempfile.TemporaryDirectory(dir=".") as directory,
        patch.object(CheckpointWriter, "save", time_save),
    ):
        config = ModelConfig(data=data, max_iters=750, runs_dir=directory)
        result = train(config, output=Output(quiet=True))
    print(
        f"  {len(seconds)} saves of {sum(seconds) / len(seconds) * 1e3:.0f} ms, every "
        f"{config.checkpoint_interval} steps: {sum(seconds) / result.seconds * 100:.2f} % "
        f"of a run of {result.seconds:.0f} s"
    )
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        print(pool.apply(_measure_memory, (data,)))


def _measure_memory(data: str | None) -> str:
    config = ModelConfig(data=data, n_embd=768, n_head=12, n_layer=8, batch_size=1)
    trainer = Trainer(config, load_dataset(config), torch.device("cpu"))
    for step in range(2):
        trainer.training_step(step)
    before = get_peak_memory(trainer.device)
    state = TrainingState(
        step=2,
        optimizer_file=None,
        best_val_loss=None,
        val_loss=None,
        run_id=None,
        lineage=[],
        training_config={name: getattr(config, name) for name in TRAINING_SETTINGS},
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        run = RunDirectory(Path(directory))
        trainer.open_checkpoints(run).write(run.export, state)
    seconds = time.perf_counter() - start
    grown = (get_peak_memory(trainer.device) or 0) - (before or 0)
    millions = trainer.model.count_parameters() / 1e6
    return (
        f"  {millions:.0f} M parameters: saved in {seconds:.1f} s; the "
        f"peak of {format_bytes(before or 0)} grew by {format_bytes(grown)}"
    )
