"""Speed of generation: one text, many at once, a long one, beside a busy neighbour, from the shell.

    python -m benchmarks generation
    python -m benchmarks generation --llama2c llama2.c/run

The models are untrained, as the time of a token does not depend on its value. With `--llama2c`,
that program generates in turns with Folio: a Llama of the same width, number of layers and of
weights. Its clock counts whole milliseconds, so its runs are added up.
"""

import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import CHECKOUT
from decode_numba import NumbaEngine, count_cores, read_weights
from engine import SamplingParams
from generate import stream_tokens
from model import LanguageModel
from parameters import ModelConfig
from trainer import train
from utils.output import Output

V = 65  # the characters of Tiny Shakespeare
GPT2 = {"architecture": "gpt2"}
SHAPES = {
    "0.8 M": {**GPT2, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "10.6 M": {**GPT2, "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "default": {},
}
SAMPLING = SamplingParams(temperature=0.8)
ROUNDS = 5
SECONDS = 2  # of each measurement, about
LLAMA2C_RUNS = 20  # added up to one measurement
SIDE_BY_SIDE = 64
LONG = 10_000
BUSY = "while True: pass"


def run(data: str | None, llama2c: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        for name, shape in SHAPES.items():
            compare_speeds(name, shape, Path(place), llama2c)
        long_text()
        busy_neighbour()
        first_character(Path(place))


def compare_speeds(name: str, shape: dict, place: Path, llama2c: str | None) -> None:
    """Print the medians of tokens per second, measured in turns.

    One text is as long as the context, which is all that llama2.c can generate; `windows` is one of
    many contexts, each prefilled from the one before.
    """
    model, T = create_model(shape), ModelConfig(**shape).block_size
    loops, int8 = create_engine(model), create_engine(model, int8=True)
    works: dict[str, Callable[[], float]] = {
        "torch": lambda: measure_speed(model, T),
        "numba": lambda: measure_speed(loops, T),
        "numba, int8": lambda: measure_speed(int8, T),
        "numba, windows": lambda: measure_speed(loops, 8 * T),
        f"torch, {SIDE_BY_SIDE} texts": lambda: measure_speed(model, T, SIDE_BY_SIDE),
        f"numba, {SIDE_BY_SIDE} texts": lambda: measure_speed(loops, T, SIDE_BY_SIDE),
    }
    if llama2c:
        files = write_llama(ModelConfig(**shape), place)
        for threads in (1, count_cores()):
            works[f"llama2.c, threads: {threads}"] = lambda threads=threads: measure_llama2c(
                llama2c, files, T, threads
            )
    speeds = {work: [] for work in works}
    for _ in range(ROUNDS):
        for work, measure in works.items():
            speeds[work].append(measure())
    medians = {work: statistics.median(values) for work, values in speeds.items()}
    print(f"  {name}: {model.count_parameters():,} parameters, context {T}")
    for work, median in medians.items():
        lowest, highest = min(speeds[work]), max(speeds[work])
        print(f"    {work}: {median:,.0f} tokens/s ({lowest:,.0f} to {highest:,.0f})", flush=True)
    if llama2c:
        best = max(median for work, median in medians.items() if work.startswith("llama2.c"))
        for work in ("numba", "numba, int8"):
            print(f"    {work} / llama2.c: {medians[work] / best:.2f}")
    ratio = medians[f"numba, {SIDE_BY_SIDE} texts"] / medians["torch"]
    print(f"    {SIDE_BY_SIDE} texts by numba / one by torch: {ratio:.1f}", flush=True)


def create_model(shape: dict) -> LanguageModel:
    """Create a model in which every character has some probability."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**shape), V).eval()
    model.config = ModelConfig(**shape)
    return model


def create_engine(model: LanguageModel, *, int8: bool = False) -> NumbaEngine:
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return NumbaEngine(read_weights(tensors, model.config, V, int8=int8), model.config)


def measure_speed(model: LanguageModel | NumbaEngine, length: int, rows: int = 1) -> float:
    """Return tokens per second of texts of `length` tokens, begun anew for about SECONDS."""
    begun, tokens = time.perf_counter(), 0
    while tokens == 0 or time.perf_counter() - begun < SECONDS:
        for part, _ in stream_tokens(model, [0], length, SAMPLING, seeds=range(rows)):
            tokens += part.size
    return tokens / (time.perf_counter() - begun)


# ----------------------------------------------------------------------------------------------
# llama2.c


def write_llama(config: ModelConfig, place: Path) -> tuple[Path, Path]:
    """Write a Llama of this shape and a vocabulary, in the formats of llama2.c.

    Token 1 ends a text there: its logit is always low, by a constant channel of the residual
    stream.
    """
    C, L, T = config.n_embd, config.n_layer, config.block_size
    hidden = -(-C * 8 // 3 // 32) * 32  # as many weights as a plain MLP of 4 C
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape) * 0.02

    embedding, outputs = draw(V, C), [draw(L, C, C) for _ in range(4)]
    gate, down, up = draw(L, hidden, C), draw(L, C, hidden), draw(L, hidden, C)
    head = draw(V, C)
    embedding[:, 0], outputs[3][:, 0], down[:, 0], head[1, 0] = 1, 0, 0, -50
    ones = [np.ones((L, C)), np.ones((L, C)), np.ones(C)]
    rotary = np.zeros(T * C // config.n_head)
    arrays = [embedding, ones[0], *outputs, ones[1], gate, down, up, ones[2], rotary, head]
    model, vocabulary = place / "llama.bin", place / "vocabulary.bin"
    sizes = (C, hidden, L, config.n_head, config.n_head, -V, T)  # -V: a head of its own
    model.write_bytes(
        struct.pack("7i", *sizes) + b"".join(each.astype("<f4").tobytes() for each in arrays)
    )
    words = [b"<%d>" % token for token in range(V)]
    entries = (struct.pack("fi", 0.0, len(word)) + word for word in words)
    vocabulary.write_bytes(struct.pack("i", max(map(len, words))) + b"".join(entries))
    return model, vocabulary


def measure_llama2c(program: str, files: tuple[Path, Path], length: int, threads: int) -> float:
    """Return its own tokens per second, of several runs together."""
    model, vocabulary = files
    flags = f"-z {vocabulary} -t 0.8 -p 1.0 -n {length} -s"
    seconds = 0.0
    for seed in range(1, LLAMA2C_RUNS + 1):
        done = subprocess.run(
            [program, model, *flags.split(), str(seed)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds += (length - 1) / float(done.stderr.split()[-1])
    return LLAMA2C_RUNS * (length - 1) / seconds


# ----------------------------------------------------------------------------------------------
# A long text, a busy machine, the shell


def long_text() -> None:
    """Print the speed of each tenth of a long text."""
    engine = create_engine(create_model(SHAPES["default"]))
    tenths: list[list[float]] = [[] for _ in range(10)]
    for _ in range(ROUNDS):
        arrivals = [(0, time.perf_counter())]
        for part, _ in stream_tokens(engine, [0], LONG, SAMPLING):
            arrivals.append((arrivals[-1][0] + part.shape[1], time.perf_counter()))
        counts, times = zip(*arrivals, strict=True)
        marks = np.interp(np.linspace(0, LONG, 11), counts, times)
        for tenth, seconds in zip(tenths, np.diff(marks), strict=True):
            tenth.append(LONG / 10 / seconds)
    speeds = ", ".join(f"{statistics.median(tenth):,.0f}" for tenth in tenths)
    print(f"  {LONG:,} characters, default, tokens/s in each tenth: {speeds}", flush=True)


def busy_neighbour() -> None:
    """Print the speed beside a program that computes on one core, and without, in turns."""
    for name, shape in SHAPES.items():
        model, length = create_model(shape), 8 * ModelConfig(**shape).block_size
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for is_busy, values in speeds.items():
                neighbour = subprocess.Popen([sys.executable, "-c", BUSY if is_busy else "pass"])
                time.sleep(0.2)
                values.append(measure_speed(create_engine(model), length))
                neighbour.kill()
                neighbour.wait()
        idle, busy = (statistics.median(values) for values in speeds.values())
        print(
            f"  {name}, alone {idle:,.0f} tokens/s, beside a busy loop {busy:,.0f}: "
            f"{busy / idle:.2f}",
            flush=True,
        )


def first_character(place: Path) -> None:
    """Print the time from the shell to the first character: of the first start, and of others."""
    checkout = place / "checkout"  # a copy, in which nothing has been compiled
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "checkpoints", "tests", "docs")
    shutil.copytree(CHECKOUT, checkout, ignore=ignored)
    text = place / "text.txt"
    text.write_text("".join(map(chr, range(32, 32 + V))) * 100, encoding="utf-8")
    config = ModelConfig(data=str(text), max_iters=1, eval_iters=1, runs_dir=str(place / "runs"))
    model = train(config, output=Output(quiet=True)).export_dir
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    first, *seconds = (
        measure_first_character(checkout, model, environment) for _ in range(ROUNDS + 1)
    )
    print(
        f"  from the shell to the first character, default: the very first start {first:.1f} s, "
        f"later {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"
    )


def measure_first_character(checkout: Path, model: Path, environment: dict[str, str]) -> float:
    """Return the seconds until inference.py has printed a character."""
    begun = time.perf_counter()
    command = [sys.executable, checkout / "inference.py", model, "--prompt", "A"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        process.stdout.read(2)  # the prompt's, and the first that is new
        seconds = time.perf_counter() - begun
        process.stdout.read()
    return seconds
