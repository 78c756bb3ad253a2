"""Speed of generation: eager, compiled, int8, and many texts in one batch.

The models are untrained, as the time of a token does not depend on its value. The time to load and
to compile is printed, not counted.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from fast_decode import compile_decode
from generate import FastDecoder, SamplingParams, stream_tokens
from model import LanguageModel
from parameters import ModelConfig
from trainer import train
from utils.device import synchronize
from utils.output import Output
from utils.quantization import Int8Linear, quantize

V = 65  # the characters of Tiny Shakespeare
SHAPES = {
    "0.8 M (gpt2: 4 layers, 128 wide, context 64)": {
        **{"architecture": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    },
    "10.6 M (gpt2: 6 layers, 384 wide, context 256)": {
        **{"architecture": "gpt2", "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    },
    "the default model": {},
}
SAMPLING = SamplingParams(temperature=0.8)
REPEATS = 5
SECONDS = 3  # of each repetition, about
SIDE_BY_SIDE = 64
COMPILE = "on"
LONG = 10_000
INFERENCE = Path(__file__).resolve().parent.parent / "inference.py"


def run(data: str | None) -> None:
    for name, shape in SHAPES.items():
        print(f"  {name}")
        eager = one_stream(shape, "none", "off")
        for quantized, compiled in (("none", COMPILE), ("int8", "off"), ("int8", COMPILE)):
            one_stream(shape, quantized, compiled)
        side_by_side(shape, eager)
    long_text()
    first_character()


def one_stream(shape: dict, quantized: str, compiled: str) -> float:
    """Print characters per second of one text, and the share of time to read its weights."""
    model = create_model(shape)
    if quantized == "int8":
        quantize(model)
    fast, seconds = create_fast_decoder(model, compiled, 1)
    speed = measure_speed(model, 1, fast)
    size = count_weight_bytes(model)
    allowed = 1 / measure_read_time(size)
    print(
        f"    one text, {'int8' if quantized == 'int8' else 'fp32'}, "
        f"{'compiled' if fast else 'eager'}: {speed:,.0f} characters/s; "
        f"reading its {size / 1e6:.1f} MB of weights takes {speed / allowed:.0%} of that time"
        + (f"; compiled in {seconds:.0f} s" if fast else ""),
        flush=True,
    )
    return speed


def side_by_side(shape: dict, eager: float) -> None:
    """Print characters per second of a batch of texts, compared with one text, eager."""
    model = create_model(shape)
    fast, seconds = create_fast_decoder(model, COMPILE, SIDE_BY_SIDE)
    speed = measure_speed(model, SIDE_BY_SIDE, fast)
    print(
        f"    {SIDE_BY_SIDE} texts, fp32, {'compiled' if fast else 'eager'}: {speed:,.0f} "
        f"characters/s, {speed / eager:.1f} times one eager text"
        + (f"; compiled in {seconds:.0f} s" if fast else ""),
        flush=True,
    )


def create_model(shape: dict) -> LanguageModel:
    """Create a model in which every character has some probability."""
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**shape), V).eval()


def create_fast_decoder(
    model: LanguageModel, compiled: str, rows: int
) -> tuple[FastDecoder | None, float]:
    """Return compiled decoding, and the seconds to compile it."""
    start = time.perf_counter()
    fast, _ = compile_decode(model, compiled, SAMPLING, rows=rows)
    return fast, time.perf_counter() - start


def measure_speed(model: LanguageModel, rows: int, fast: FastDecoder | None) -> float:
    """Return the median of characters per second, with the prefill of prompt and windows."""

    def seconds(length: int) -> float:
        begun = time.perf_counter()
        for _ in stream_tokens(model, [0], length, SAMPLING, seeds=range(rows), fast=fast):
            pass
        synchronize(model.token_embedding.weight.device)
        return time.perf_counter() - begun

    once = model.block_size * 2
    seconds(once)
    length = max(once, int(once * SECONDS / seconds(once)))
    return rows * length / statistics.median(seconds(length) for _ in range(REPEATS))


def count_weight_bytes(model: LanguageModel) -> int:
    """Return the bytes of all matrices that a token is multiplied with."""
    size = model.token_embedding.weight.nbytes  # the LM head is tied to it, or of the same size
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | Int8Linear):
            size += module.weight.nbytes
    return size


def measure_read_time(size: int) -> float:
    """Return the seconds in which these cores read `size` bytes, repeatedly."""
    numbers = torch.ones(size // 4)
    numbers.sum()
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def long_text() -> None:
    """Print the speed of each tenth of a long text."""
    model, arrivals = create_model({}), [time.perf_counter()]
    for _ in stream_tokens(model, [0], LONG, SAMPLING):
        arrivals.append(time.perf_counter())
    tenth = LONG // 10
    speeds = [
        tenth / (arrivals[end] - arrivals[end - tenth]) for end in range(tenth, LONG + 1, tenth)
    ]
    print(
        f"  {LONG:,} characters of the default model, eager, each tenth: "
        f"{', '.join(f'{speed:,.0f}' for speed in speeds)} characters/s"
    )


def first_character() -> None:
    """Print the time from the shell to the first character of the default model."""
    with tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text.txt"
        text.write_text("".join(map(chr, range(32, 32 + V))) * 100, encoding="utf-8")
        config = ModelConfig(data=str(text), max_iters=1, eval_iters=1, runs_dir=place)
        model = train(config, output=Output(quiet=True)).export_dir
        seconds = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            command = [sys.executable, INFERENCE, str(model), "--prompt", "A"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                process.stdout.read(2)  # the prompt's, and the first that is new
                seconds.append(time.perf_counter() - begun)
                process.stdout.read()
    print(
        f"  the first character of the default model, from the shell: "
        f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"
    )
