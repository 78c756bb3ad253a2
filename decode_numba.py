"""The engine that decodes in plain loops on a CPU (decode_loops.py), without PyTorch.

Prepares the arrays, chooses the number of threads, and calls `decode_loops.decode`.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy import float32

import decode_loops
from decode_loops import (
    CHUNK,
    GELU,
    GELU_TANH,
    SILU,
    Buffers,
    Cache,
    Linear,
    Sampling,
    Team,
    Weights,
)
from engine import SamplingParams
from parameters import NGRAM_FACTORS, ModelConfig
from utils.compile_cache import CompileCache
from utils.quantization import quantize_rows

ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU}
COMPILE_SECONDS = 10  # about, on the machines that were tried
WEIGHTS_PER_THREAD = 100_000  # fewer, and waiting for each other takes longer than computing
CACHE_LINE = 64  # bytes
MAX_TOKENS_PER_CALL = 64
SECONDS_PER_CALL = 0.02  # text is printed at least as often as this, if a token takes less
MIN_SECONDS_TO_MEASURE = 0.001  # a shorter call is mostly overhead
CLEARLY_FASTER = 1.25  # machines are noisy
SECONDS_BETWEEN_TRIALS = 1.0  # of the other number of threads
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Linux: microseconds of CPU time in each period


# ----------------------------------------------------------------------------------------------
# Arrays


def allocate(*shape: int, dtype: type = float32) -> np.ndarray:
    """Return zeros that begin at a cache line.

    A row that begins elsewhere takes one more access for every 16 numbers, and two threads that
    write to one line wait for each other.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def align(array: np.ndarray) -> np.ndarray:
    """Return a copy of an array that begins at a cache line."""
    copy = allocate(*array.shape, dtype=array.dtype)
    copy[...] = array
    return copy


# ----------------------------------------------------------------------------------------------
# Weights


class TensorReader:
    """Takes the tensors of a state dict by name; the blocks' are stacked, `(L, ...)`.

    Its methods raise ValueError if a tensor is missing or has another shape. Biases are zeros if
    the model has none.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], n_layer: int, has_biases: bool):
        self._tensors, self._n_layer, self._has_biases = dict(tensors), n_layer, has_biases

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Return a tensor as aligned float32."""
        return align(self._pop(name, shape))

    def _pop(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".bias") and not self._has_biases:
            return np.zeros(shape, dtype=float32)
        tensor = self._tensors.pop(name, None)
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise ValueError(f"{name} {found}, and it should be {list(shape)}")
        return tensor.astype(float32, copy=False)

    def stack(self, name: str, *shape: int) -> np.ndarray:
        """Return a tensor of each block."""
        stacked = allocate(self._n_layer, *shape)
        for layer in range(self._n_layer):
            stacked[layer] = self._pop(f"blocks.{layer}.{name}", shape)
        return stacked

    def stack_norm(self, name: str, size: int) -> np.ndarray:
        """Return weight and bias of a norm in each block, `(L, 2, size)`."""
        weight = self.stack(f"{name}.weight", size)
        return align(np.stack((weight, self.stack(f"{name}.bias", size)), axis=1))

    def stack_linear(self, name: str, outputs: int, inputs: int, *, int8: bool) -> Linear:
        """Return a linear layer of each block, quantized if `int8`."""
        weight = self.stack(f"{name}.weight", outputs, inputs)
        bias = self.stack(f"{name}.bias", outputs)
        if int8:
            rounded, scale = quantize_rows(weight)
            return Linear(align(rounded), scale, bias)
        return Linear(weight, np.ones_like(bias), bias)

    def check_all_taken(self) -> None:
        """Raise ValueError if the state dict has further tensors."""
        if self._tensors:
            raise ValueError(f"{', '.join(sorted(self._tensors))}: unexpected")


def read_weights(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    vocab_size: int,
    num_tokens: int | None = None,
    *,
    int8: bool = False,
) -> Weights:
    """Arrange the state dict of a `LanguageModel` for the loops.

    Args:
        tensors: float arrays by name.
        config: the architecture.
        vocab_size: V, the number of rows of the embedding.
        num_tokens: number of ids that stand for text; those above are never generated.
        int8: quantize the weights of the blocks.

    Raises ValueError if a tensor is missing, is unexpected, or has another shape.
    """
    T, C, H = config.block_size, config.n_embd, config.n_head
    V, D = vocab_size, C // H
    is_modern = config.architecture != "gpt2"
    reader = TensorReader(tensors, config.n_layer, config.bias)
    take, linear = reader.take, reader.stack_linear
    expand = tensors.get("blocks.0.mlp.expand.weight")
    F = len(expand) if expand is not None and expand.ndim else 0
    embedding = take("token_embedding.weight", V, C)
    empty = np.zeros((0, 0), dtype=float32)
    if is_modern:
        names = [f"attention.queries_and_keys.{name}_norm.weight" for name in ("query", "key")]
        query_key_norm = np.stack([reader.stack(name, D) for name in names], axis=1)
        gate = linear("mlp.gate", F, C, int8=int8)
        cos, sin = compute_rotary_tables(config.rope_theta, T, D)
    else:
        query_key_norm, cos, sin = np.zeros((0, 2, D), dtype=float32), empty, empty
        gate = Linear(np.zeros((0, 0, 0), dtype=np.int8 if int8 else float32), empty, empty)
    ngrams = empty
    if config.architecture == "speedrun":
        ngrams = take("ngram_embedding.weight", config.ngram_rows, C)
    weights = Weights(
        is_modern=is_modern,
        activation=ACTIVATIONS[config.activation],
        token_embedding=embedding,
        ngram_embedding=ngrams,
        ngram_factors=np.array(NGRAM_FACTORS, dtype=np.int64),
        position_embedding=empty if is_modern else take("position_embedding.weight", T, C),
        cos=cos,
        sin=sin,
        attention_norm=reader.stack_norm("attention_norm", C),
        qkv=linear("attention.qkv", 3 * C, C, int8=int8),
        query_key_norm=query_key_norm,
        projection=linear("attention.projection", C, C, int8=int8),
        mlp_norm=reader.stack_norm("mlp_norm", C),
        gate=gate,
        up=linear("mlp.expand", F, C, int8=int8),
        down=linear("mlp.projection", C, F, int8=int8),
        final_norm=np.stack((take("final_norm.weight", C), take("final_norm.bias", C))),
        head=(embedding if config.tie_weights else take("head.weight", V, C))[:num_tokens],
    )
    reader.check_all_taken()
    return weights


def compute_rotary_tables(theta: float, T: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of the rotary angles, `(T, D / 2)`, as `model.NormedRotary` does."""
    frequencies = float32(theta) ** (-np.arange(0, D, 2, dtype=float32) / float32(D))
    angles = np.outer(np.arange(T, dtype=float32), frequencies)
    return np.cos(angles), np.sin(angles)


# ----------------------------------------------------------------------------------------------
# Threads


class ThreadChooser:
    """Chooses how many threads decode: all, unless one was clearly faster lately.

    All are faster on an idle machine. Beside another program they wait for the one whose core it
    uses, and one thread alone is faster. The other choice is tried now and then, as other programs
    come and go.
    """

    def __init__(self, largest: int):
        self.largest = largest
        self._seconds = dict.fromkeys((largest, 1), 0.0)  # per token; 0: not tried yet
        self._since_trial = 0.0  # seconds of decoding

    def choose(self) -> int:
        """Return the number of threads: all, then one to compare, then the better choice."""
        all_seconds, one_seconds = self._seconds[self.largest], self._seconds[1]
        return self.largest if all_seconds <= CLEARLY_FASTER * one_seconds else 1

    def choose_or_try(self) -> int:
        """Return the same; or the other, once in SECONDS_BETWEEN_TRIALS."""
        best = self.choose()
        if self._since_trial < SECONDS_BETWEEN_TRIALS:
            return best
        return 1 if best == self.largest else self.largest

    def record(self, threads: int, seconds: float, tokens: int) -> None:
        """Record the duration of a call, and how many tokens it decoded."""
        before, latest = self._seconds[threads], seconds / tokens
        if before and threads == self.choose():  # a mean, in which one interruption counts little
            self._seconds[threads] = (3 * before + min(latest, 2 * before)) / 4
            self._since_trial += seconds
        else:
            self._seconds[threads] = latest
            self._since_trial = 0.0


def count_cores() -> int:
    """Return how many cores this process may use; OMP_NUM_THREADS lowers it, as for PyTorch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [cores or 1]
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # a container's share
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        limits.append(int(quota) // int(period))
    with contextlib.suppress(ValueError):  # not set
        limits.append(int(os.environ.get("OMP_NUM_THREADS", "")))
    return max(1, min(limits))


# ----------------------------------------------------------------------------------------------
# The engine


class NumbaEngine:
    """Runs a model in plain loops: see `engine.Engine`.

    Args:
        weights: of `read_weights`.
        config: the architecture.
        cache: of the compiled loops, for the dtype of the weights.
        on_progress: called with a line before the loops are compiled.
    """

    name = "numba"

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        cache: CompileCache | None = None,
        *,
        on_progress: Callable[[str], None] = lambda line: None,
    ):
        self.weights, self.block_size, self.n_head = weights, config.block_size, config.n_head
        matrices = (weights.qkv, weights.projection, weights.gate, weights.up, weights.down)
        size = sum(matrix.weight.size for matrix in matrices)
        self.threads = max(1, min(count_cores(), size // WEIGHTS_PER_THREAD))
        self.pool = ThreadPoolExecutor(max(1, self.threads - 1))
        self.lock = threading.Lock()  # a second call would wait for the threads of the first
        self.choosers: dict[int, ThreadChooser] = {}  # by the number of texts
        cache = cache or get_compile_cache(weights.up.weight.dtype)
        if not cache.is_compiled:
            often = "once on this machine" if cache.is_writable else "at each start (no cache)"
            on_progress(f"compiling the decoding loops, {often}: about {COMPILE_SECONDS} s")
        self.loops = cache.get(self._call_once)

    def _call_once(self, loops: Callable) -> None:
        """Call the loops for no tokens, which compiles them."""
        self.loops = loops
        ids, no_draws = np.zeros((1, 1), dtype=np.int64), np.zeros((0, 1), dtype=float32)
        NumbaDecoder(self, ids, SamplingParams()).decode(ids, 0, no_draws)

    def create_decoder(self, prompt: np.ndarray, sampling: SamplingParams) -> "NumbaDecoder":
        """Create a decoder of the texts that begin with `prompt`, `(B, T)` int64."""
        return NumbaDecoder(self, prompt, sampling)


def get_compile_cache(dtype: np.dtype) -> CompileCache:
    """Return the cache of the compiled loops, for weights of a dtype: float32 or int8."""
    options = {**decode_loops.OPTIONS, "fastmath": decode_loops.FAST_MATH}
    return CompileCache(decode_loops.decode, options, np.dtype(dtype).name)


class NumbaDecoder:
    """Continues B texts in plain loops: see `engine.Decoder`."""

    def __init__(self, engine: NumbaEngine, prompt: np.ndarray, sampling: SamplingParams):
        weights, B = engine.weights, len(prompt)
        V = len(weights.head)
        self.engine, self.tokens_per_call = engine, 1  # the first token is wanted soon
        self.cache = allocate_cache(weights, B, engine.block_size, engine.n_head)
        self.buffers = allocate_buffers(weights, B, engine.block_size, engine.threads)
        temperature = sampling.temperature  # 0 is greedy; others as near as float32 has them
        if temperature > 0:
            temperature = np.clip(temperature, np.finfo(float32).tiny, np.finfo(float32).max)
        self.sampling = Sampling(
            float32(sampling.repetition_penalty),
            float32(temperature),
            min(sampling.top_k or V, V),
            float32(sampling.top_p),
            float32(np.log(sampling.min_p) if sampling.min_p else -np.inf),
        )
        seen = np.zeros((B, len(weights.token_embedding)), dtype=bool)
        np.put_along_axis(seen, prompt, True, axis=1)
        self.seen = np.ascontiguousarray(seen[:, :V])
        self._threads = engine.choosers.setdefault(B, ThreadChooser(engine.threads))

    def decode(
        self, ids: np.ndarray, position: int, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate a token for each row of `draws`: see `engine.Decoder`.

        Raises IndexError if an id is not in the vocabulary, or a position not in the context: the
        loops check neither.
        """
        # Copies, as the loops are compiled for arrays that are contiguous and may be written.
        ids = np.array(ids, dtype=np.int64, order="C")
        draws = np.array(draws, dtype=float32, order="C")
        (B, t), n, engine = ids.shape, len(draws), self.engine
        if ids.min() < 0 or ids.max() >= len(engine.weights.token_embedding):
            raise IndexError(f"ids from {ids.min()} to {ids.max()}")
        if position < 0 or position + t + max(n, 1) - 1 > engine.block_size:
            raise IndexError(f"{t} ids and {n} new tokens from position {position} on")
        tokens, log_probs = np.zeros((B, n), dtype=np.int64), np.zeros((B, n), dtype=float32)
        size = self._threads.choose_or_try() if t == 1 else self._threads.choose()
        arguments = (engine.weights, self.cache, self.buffers, self.sampling, self.seen)
        arguments += (ids, position, draws, tokens, log_probs, ids[:, -1].copy())
        begun = time.perf_counter()
        with engine.lock:
            self._run(size, arguments)
        seconds = time.perf_counter() - begun
        if t == 1 and n > 0 and seconds > MIN_SECONDS_TO_MEASURE:
            self._threads.record(size, seconds, n)
        is_short = seconds < SECONDS_PER_CALL / 2
        self.tokens_per_call = min(2 * n, MAX_TOKENS_PER_CALL) if is_short else max(1, n // 2)
        return tokens, log_probs

    def _run(self, size: int, arguments: tuple[Any, ...]) -> None:
        """Call the loops in `size` threads, of which this is one."""
        # Counters lie two cache lines apart, as a processor may fetch lines in pairs.
        counters = allocate(size + 1, 2 * CACHE_LINE // 8, dtype=np.int64)
        arrived = counters[size]
        teams = [Team(rank, size, arrived, counters[rank]) for rank in range(size)]
        loops = self.engine.loops
        try:
            others = [self.engine.pool.submit(loops, *arguments, team) for team in teams[1:]]
            loops(*arguments, teams[0])
        except BaseException:  # Ctrl-C, or no thread could be started: release those that wait
            arrived[0] = np.iinfo(np.int64).max // 2
            raise
        for other in others:
            other.result()


def allocate_cache(weights: Weights, B: int, T: int, H: int) -> Cache:
    """Allocate the cache of B texts; memory is committed when it is first written."""
    L, _, C = weights.qkv.weight.shape
    shape = (B, L, H, T, C // H)
    ids = allocate(B, len(weights.ngram_factors) + T, dtype=np.int64)
    return Cache(allocate(*shape), allocate(*shape), ids)


def allocate_buffers(weights: Weights, B: int, T: int, threads: int) -> Buffers:
    """Allocate the memory for intermediate results of B texts."""
    M, (V, C), F = max(B, min(T, CHUNK)), weights.head.shape, weights.up.weight.shape[1]

    return Buffers(
        texts=allocate(threads, M, dtype=np.int64),
        positions=allocate(threads, M, dtype=np.int64),
        x=allocate(threads, M, C),
        normed=allocate(threads, M, C),
        qkv=allocate(M, 3 * C),
        scores=allocate(threads, T),
        attended=allocate(M, C),
        branch=allocate(M, C),
        gate=allocate(M, F),
        hidden=allocate(M, F),
        logits=allocate(B, V),
        candidates=allocate(threads, V),
        heap=allocate(threads, V, dtype=np.int64),
    )
