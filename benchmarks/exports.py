"""Loss and speed of a model's exports, each in the program that it is for, beside Folio.

    python -m benchmarks.exports runs/20260131_235959_baseline

Every program computes the loss over the whole validation split, in windows of the context, and
generates greedily, one text of a whole context, in turns with the others.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

import export
from benchmarks import get_commit
from bundle import WEIGHTS_FILE, read_bundle
from data import load_dataset
from decode_numba import count_cores
from decode_torch import TorchEngine
from engine import SamplingParams
from exporters.source import ExportSource, load_source
from generate import generate_tokens
from inference import InferenceConfig, find_model, load_engine_from_bundle
from parameters import ModelConfig
from utils.device import get_processor_name
from utils.output import run_command

EXPORTS = [
    *(("hf", dtype) for dtype in ("fp32", "fp16", "bf16")),
    ("onnx", "fp32"),
    *(("gguf", dtype) for dtype in ("fp32", "fp16", "bf16", "q8_0")),
]
ROUNDS = 5
GREEDY = SamplingParams(temperature=0)


def load_validation_split(source: ExportSource) -> np.ndarray:
    """Return the tokens on which the model was evaluated in training, `(N,)`."""
    settings = {**source.config.model_dump(), **source.bundle.state.settings}
    config = ModelConfig(**{**settings, "tokenizer": source.tokenizer.token_kind})
    data = load_dataset(config, tokenizer=source.tokenizer, use_sample_corpus=True)
    return np.asarray(data.splits["val"], dtype=np.int64)


def measure_loss(compute_logits: Callable, tokens: np.ndarray, T: int, num_tokens: int) -> float:
    """Return the mean cross-entropy in nats of each token but the first, in windows of T."""
    total = 0.0
    for start in range(0, tokens.size - 1, T):
        inputs, targets = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        logits = np.asarray(compute_logits(inputs[: targets.size]), dtype=np.float64)
        logits = logits[:, :num_tokens]
        logits -= logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits).sum(axis=1))
        total += float((log_sums - logits[np.arange(targets.size), targets]).sum())
    return total / (tokens.size - 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__)
    parser.add_argument("model", help="a run, a bundle or a named model")
    model = parser.parse_args(argv).model
    bundle = find_model(InferenceConfig(), [model]).path
    print(f"{get_processor_name()}, {date.today()}, commit {get_commit()}")
    source = load_source(bundle)
    tokens, T, V = (
        load_validation_split(source),
        source.config.block_size,
        source.tokenizer.num_tokens,
    )
    start = source.tokenizer.encode(source.tokenizer.default_prompt).astype(np.int64)
    n = T - start.size

    def compute_logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return source.model(ids)[0][0].numpy()

    engines = {
        "Folio, torch": TorchEngine(source.model),
        "Folio, numba": load_engine_from_bundle(
            read_bundle(bundle, WEIGHTS_FILE), InferenceConfig(engine="numba")
        ),
    }
    works = {
        name: lambda engine=engine: generate_tokens(engine, start, n, GREEDY)[0, start.size :]
        for name, engine in engines.items()
    }
    print(f"{'Folio':<24} val loss {measure_loss(compute_logits, tokens, T, V):.5f}")
    with tempfile.TemporaryDirectory() as place:
        for format, dtype in EXPORTS:
            out, words = f"{place}/{format}-{dtype}", [f"--format={format}", f"--dtype={dtype}"]
            if run_command(export.main, [str(bundle), *words, f"--out={out}"]) != 0:
                continue
            module = importlib.import_module(f"exporters.{export.EXPORTERS[format]}")
            target = module.open_export(Path(out))
            name = f"{target.library}, {dtype}"
            loss = measure_loss(target.compute_logits, tokens, T, V)
            print(f"{name:<24} val loss {loss:.5f}", flush=True)
            works[name] = lambda target=target: target.generate(start, n)
        expected = works["Folio, torch"]()
        for name, work in works.items():
            same = np.asarray(work()) == expected
            print(
                f"{name:<24} greedy: {n if same.all() else int(np.argmin(same))} of {n} identical"
            )
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                begin = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begin)
        for name, times in seconds.items():
            rates = sorted(n / each for each in times)
            print(
                f"{name:<24} {statistics.median(rates):>8,.0f} tokens/s "
                f"({rates[0]:,.0f} to {rates[-1]:,.0f})"
            )
    print(f"{count_cores()} cores")


if __name__ == "__main__":
    main()
