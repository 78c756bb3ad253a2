"""How fast models generate: plain, compiled, in 8 bits, and many texts side by side.

The models are untrained: what a token costs does not depend on which it is. The time to load and
to compile is printed, and not counted.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from decoding import Int8Linear, choose_decoding, compile_decode, quantize
from sampling import SamplingParams
from torch import nn

from model import FastDecoder, LanguageModel
from parameters import ModelConfig
from trainer import train
from utils.output import Output

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
HOW = SamplingParams(temperature=0.8)
REPEATS = 5
SECONDS = 3  # of each repetition, about
SIDE_BY_SIDE = 64
COMPILE = "on"
LONG = 10_000
INFERENCE = Path(__file__).resolve().parent.parent / "inference.py"


def run(data: str | None) -> None:
    for name, shape in SHAPES.items():
        print(f"  {name}")
        plain = one_stream(shape, "none", "off")
        for quantized, compiled in (("none", COMPILE), ("int8", "off"), ("int8", COMPILE)):
            one_stream(shape, quantized, compiled)
        side_by_side(shape, plain)
    flatness()
    first_character()


def one_stream(shape: dict, quantized: str, compiled: str) -> float:
    """Print the characters a second of one text, and what reading the weights alone would allow."""
    model = create_model(shape)
    if quantized == "int8":
        quantize(model)
    fast, seconds = fast_decode(model, compiled, 1)
    speed = characters_per_second(model, 1, fast)
    size = weight_bytes(model)
    allowed = 1 / seconds_to_read(size)
    print(
        f"    one text, {'int8' if quantized == 'int8' else 'fp32'}, "
        f"{'compiled' if fast else 'plain'}: {speed:,.0f} characters/s; "
        f"reading its {size / 1e6:.1f} MB of weights takes {speed / allowed:.0%} of that time"
        + (f"; compiled in {seconds:.0f} s" if fast else ""),
        flush=True,
    )
    return speed


def side_by_side(shape: dict, plain: float) -> None:
    """Print the characters a second of many texts at once, against one by the plain path."""
    model = create_model(shape)
    fast, seconds = fast_decode(model, COMPILE, SIDE_BY_SIDE)
    speed = characters_per_second(model, SIDE_BY_SIDE, fast)
    print(
        f"    {SIDE_BY_SIDE} texts, fp32, {'compiled' if fast else 'plain'}: {speed:,.0f} "
        f"characters/s, {speed / plain:.1f} times one by the plain path"
        + (f"; compiled in {seconds:.0f} s" if fast else ""),
        flush=True,
    )


def create_model(shape: dict) -> LanguageModel:
    """A model of that shape, which gives every character some probability."""
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**shape), V).eval()


def fast_decode(model: LanguageModel, compiled: str, rows: int) -> tuple[FastDecoder | None, float]:
    """The compiled way to decode, and the seconds that took."""
    wanted = choose_decoding(compiled, torch.device("cpu"), 0)
    fast, _, seconds = compile_decode(model, wanted, compiled, HOW, rows=rows)
    return fast, seconds


def characters_per_second(model: LanguageModel, rows: int, fast: FastDecoder | None) -> float:
    """The median of some repetitions, the prompt's reading and the window's included."""

    def seconds(length: int) -> float:
        begun = time.perf_counter()
        for _ in model.stream([0], length, HOW, seeds=range(rows), fast=fast):
            pass
        return time.perf_counter() - begun

    once = model.block_size * 2
    seconds(once)
    length = max(once, int(once * SECONDS / seconds(once)))
    return rows * length / statistics.median(seconds(length) for _ in range(REPEATS))


def weight_bytes(model: LanguageModel) -> int:
    """The bytes of all matrices that a token is multiplied with."""
    size = model.token_embedding.weight.nbytes  # it is the head, or as large as it
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear | Int8Linear):
            size += module.weight.nbytes
    return size


def seconds_to_read(size: int) -> float:
    """The time in which these cores can read that many bytes, again and again."""
    numbers = torch.ones(size // 4)
    numbers.sum()
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def flatness() -> None:
    """Print the speed at the beginning and at the end of a long text."""
    model, arrivals = create_model({}), [time.perf_counter()]
    for _ in model.stream([0], LONG, HOW):
        arrivals.append(time.perf_counter())
    tenth = LONG // 10
    speeds = [
        tenth / (arrivals[end] - arrivals[end - tenth]) for end in range(tenth, LONG + 1, tenth)
    ]
    print(
        f"  {LONG:,} characters of the default model, plain, each tenth: "
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
