"""Text -> token ids -> splits -> batches.

Each row of a batch is a pure function of `(seed, step, row)`. There is no sampler state to save, so
a resumed run sees the same batches, and so does one that divides a batch into micro-batches.

B batch, T context (block_size), V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from corpus import EncodedCorpus, Tokens, open_corpus
from parameters import ModelConfig
from tokenizer import Tokenizer
from utils.data_files import resolve_data_path
from utils.errors import UserError
from utils.files import is_present
from utils.output import format_char_counts

DEFAULT_FILE = "input.txt"

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, both `(B, T)` int64; `targets[b, t]` follows `inputs[b, t]` in the text."""

# Separate random streams, so that evaluation and training with seed 0 draw different windows.
# Evaluation ignores the run's seed, so that runs are compared on the same windows.
_TRAINING_STREAM, _EVALUATION_STREAM, _SHUFFLING_STREAM = 0, 1, 2
_EVALUATION_SEED = 0
_FEISTEL_ROUNDS = 6
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fractional part, in units of 2^-64
_MIN_FEISTEL_BITS = 6  # six rounds mix smaller domains poorly


@dataclass(frozen=True)
class Dataset:
    """A text as token ids, divided into splits.

    `splits` maps train, val and test (if `test_split` is set) to `(N,)` arrays of the tokenizer's
    `dtype`, in memory or memory-mapped. `bytes_per_token` is each split's average, in UTF-8 bytes.
    `sha256` is that of the text's bytes, decompressed. `left_out` counts each dropped character.
    """

    name: str
    path: str | None
    sha256: str
    tokenizer: Tokenizer
    splits: dict[str, Tokens]
    bytes_per_token: dict[str, float]
    left_out: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all splits."""
        return sum(tokens.size for tokens in self.splits.values())

    def compute_bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Convert each split's nats per token to bits per byte, comparable between tokenizers."""
        return {
            split: loss / math.log(2) / self.bytes_per_token[split]
            for split, loss in losses.items()
        }


def load_dataset(
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | None = None,
    may_extend: bool = False,
    use_sample_corpus: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Read and encode the text that `config` names, and split it.

    If `config.data` is null, read `input.txt` in the working directory, or else the sample corpus.

    Args:
        config: the settings.
        tokenizer: the tokenizer of the model that is resumed or fine-tuned; None to create one.
            `config.on_new_chars` decides on characters that it lacks.
        may_extend: whether `on_new_chars` extend is allowed: only for a new model.
        use_sample_corpus: read it even if there is an `input.txt`.
        on_progress: is called with a line before each slow step.

    Raises:
        UserError: there is no such text, it is not UTF-8, a split is too short for
            `config.block_size`, the tokenizer lacks characters, or the cache cannot be written.
        RunError: the cache's disk is full.
    """
    data = config.data
    if data is None and not use_sample_corpus and is_present(Path(DEFAULT_FILE)):
        data = DEFAULT_FILE
    text = open_corpus(
        data,
        cache_dir=config.cache_dir,
        token_store=config.token_store,
        on_progress=on_progress,
        written={"runs_dir": config.runs_dir, "checkpoints_dir": config.checkpoints_dir},
    )
    left_out: dict[str, int] = {}
    if tokenizer is None:
        tokenizer = text.create_tokenizer(config.tokenizer, config)
    elif unknown := text.count_unknown(tokenizer):
        if config.on_new_chars == "drop":
            left_out = unknown
        elif config.on_new_chars == "extend" and may_extend:
            tokenizer = tokenizer.extend(list(unknown))
        else:
            raise UserError(
                f"{text.name}: the model's vocabulary lacks {format_char_counts(unknown)}: "
                "--on-new-chars drop leaves them out; --on-new-chars extend adds them, if a new "
                "model is fine-tuned with --init-from"
            )
    encoded = text.encode(tokenizer, left_out)
    ranges = _split(encoded, config)
    return Dataset(
        name=text.name,
        path=text.path and resolve_data_path(text.path),  # to work from any directory when recorded
        sha256=text.sha256,
        tokenizer=tokenizer,
        splits={split: encoded.tokens[start:stop] for split, (start, stop) in ranges.items()},
        bytes_per_token={
            split: encoded.count_bytes(start, stop) / (stop - start)
            for split, (start, stop) in ranges.items()
        },
        left_out=left_out,
    )


def _split(encoded: EncodedCorpus, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the ranges of the splits that are not empty, each long enough for a window."""
    needed = config.block_size + 1  # a window of T inputs has T targets, shifted by one
    ranges = encoded.split(config)
    for split, (start, stop) in ranges.items():
        if stop - start < needed and (split != "test" or config.test_split > 0):
            raise UserError(
                f"the text is too short: its {split} split has {stop - start} of "
                f"{encoded.tokens.size} {encoded.tokenizer.unit}s, and block_size "
                f"{config.block_size} needs {needed}: lower block_size, change "
                f"{'test_split' if split == 'test' else 'train_split'}, or use a longer text"
            )
    return {split: (start, stop) for split, (start, stop) in ranges.items() if stop > start}


# ----------------------------------------------------------------------------------------------
# Batches


def get_batch(tokens: Tokens, step: int, config: ModelConfig, rows: slice = slice(None)) -> Batch:
    """Return rows of the training batch of `step`, counted from 0, on the CPU.

    A pure function: a row does not depend on which others are selected. With `window_order` random,
    windows are drawn uniformly from `tokens`. Otherwise `tokens` are cut into adjacent windows,
    which every pass visits once, in a new order: with shuffled at multiples of T, with shifted at
    other places in each pass. A batch may have the last windows of one pass and the first of the
    next.
    """
    T, seed, batch_size = config.block_size, config.seed, config.batch_size
    positions = np.arange(batch_size, dtype=np.int64)[rows] + step * batch_size
    if config.window_order == "shuffled":
        starts = _shuffle_windows(positions, count_windows(tokens, config), seed) * T
    elif config.window_order == "shifted":
        starts = _shuffle_shifted_windows(positions, tokens.size, T, seed)
    else:
        starts = _draw_starts(tokens.size - T, step, seed, batch_size, _TRAINING_STREAM)[rows]
    return _get_windows(tokens, starts, T)


def _get_windows(tokens: Tokens, starts: np.ndarray, length: int) -> Batch:
    """Return inputs and targets, both `(B, length)` int64, of windows that begin at `starts`."""
    windows = tokens[starts[:, None] + np.arange(length + 1)]
    windows = torch.from_numpy(windows.astype(np.int64))  # (B, length + 1)
    return windows[:, :-1], windows[:, 1:]


def _draw_starts(count: int, step: int, seed: int, batch_size: int, stream: int) -> np.ndarray:
    """Draw `batch_size` of `count` possible starts of a window, `(B,)` int64.

    Philox is a function from (key, counter) to random bits (Salmon et al. 2011,
    doi.org/10.1145/2063384.2063405). NumPy keeps its raw output the same in every release, but not
    that of `integers`. The modulo bias is below count / 2^64.
    """
    bits = np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0])
    return (bits.random_raw(batch_size) % np.uint64(count)).astype(np.int64)


def _shuffle_windows(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the windows, below `count`, at `positions` of an endless series of shuffled passes.

    A Feistel network, keyed by seed and pass, shuffles each pass without an array of indices. It
    permutes the numbers below a power of 2; results that are not below `count` are permuted again
    (cycle walking: Black and Rogaway 2002, doi.org/10.1007/3-540-45760-7_9).
    """
    bits = max(_MIN_FEISTEL_BITS, (count - 1).bit_length())
    passes, places = np.divmod(positions, count)
    windows = np.empty_like(positions)
    for pass_number in np.unique(passes).tolist():
        philox = np.random.Philox(key=[seed, _SHUFFLING_STREAM], counter=[0, pass_number, 0, 0])
        keys = philox.random_raw(_FEISTEL_ROUNDS)
        in_pass = passes == pass_number
        indices = _permute(places[in_pass].astype(np.uint64), bits, keys)
        while (outside := indices >= count).any():
            indices[outside] = _permute(indices[outside], bits, keys)
        windows[in_pass] = indices.astype(np.int64)
    return windows


def _shuffle_shifted_windows(positions: np.ndarray, size: int, T: int, seed: int) -> np.ndarray:
    """Return the starts of the windows at `positions` in an endless series of passes over the ids.

    Pass p cuts the ids into `count` adjacent windows, the first of which begins at T times the
    fractional part of (u + p φ): the golden ratio φ spreads these offsets evenly over any number of
    passes, and u is drawn from the seed. Fewer than 2 T ids before and after these windows are left
    out of a pass; odd passes begin a window later if there is room, so that no id is always left
    out.
    """
    count = max(1, (size - T) // T)
    num_offsets = min(T, size - count * T)  # of which each leaves room for `count` windows
    passes = (positions // count).astype(np.uint64)
    # In units of 2^-64, which unsigned integers wrap at 1.
    start = np.random.Philox(key=[seed, _SHUFFLING_STREAM], counter=[0, 0, 1, 0]).random_raw()
    fractions = np.uint64(start) + passes * np.uint64(_GOLDEN_RATIO)
    offsets = (fractions >> np.uint64(32)) * np.uint64(num_offsets) >> np.uint64(32)
    offsets = offsets.astype(np.int64)
    is_late = (passes % 2 == 1) & (offsets + (count + 1) * T < size)
    return (_shuffle_windows(positions, count, seed) + is_late) * T + offsets


def _permute(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers of `bits` bits, `(N,)` uint64, with SplitMix64's mixing function."""
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)  # the halves swap each round
    one = np.uint64(1)
    left, right = numbers >> low, numbers & ((one << low) - one)
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & ((one << high) - one))
        low, high = high, low
    return (left << low) | right


def iter_evaluation_batches(
    tokens: Tokens, config: ModelConfig, min_rows: int = 1, max_windows: int | None = None
) -> Iterator[Batch]:
    """Yield the fixed batches on which a split is evaluated, as `get_batch` returns them.

    These are `config.eval_iters * config.batch_size` random windows; or, for 0, the whole split in
    adjacent windows, so that every token but the first is a target once. `max_windows` limits the
    latter to that many, spread evenly. A batch has `min_rows` windows or as many as a micro-batch,
    whichever is more.
    """
    T = config.block_size
    windows = count_windows(tokens, config)
    if config.eval_iters:
        draw = (_EVALUATION_SEED, config.batch_size, _EVALUATION_STREAM)
        steps = range(config.eval_iters)
        chosen = np.concatenate([_draw_starts(tokens.size - T, step, *draw) for step in steps])
        total = chosen.size
    else:
        total = windows if max_windows is None else min(windows, max_windows)
    size = max(min_rows, min(config.micro_batch_size or config.batch_size, config.batch_size))
    for first in range(0, total, size):
        numbers = np.arange(first, min(first + size, total))
        starts = chosen[numbers] if config.eval_iters else numbers * windows // total * T
        yield _get_windows(tokens, starts, T)
    if config.eval_iters == 0 and total == windows and (tokens.size - 1) % T:
        rest = windows * T
        yield _get_windows(tokens, np.array([rest]), tokens.size - 1 - rest)


def count_windows(tokens: Tokens, config: ModelConfig) -> int:
    """Return the number of whole adjacent windows in a split."""
    return (tokens.size - 1) // config.block_size


def split_micro_batches(config: ModelConfig, rows: slice) -> list[slice]:
    """Divide `rows` of a batch into micro-batches; the last may be smaller."""
    size = config.micro_batch_size or config.batch_size
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]
