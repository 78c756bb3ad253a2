"""Measure how well a model predicts a text: exactly, over each of its tokens.

    python evaluate.py                                      # the newest run, on its val split
    python evaluate.py --model-name dante --split train
    python evaluate.py --data another.txt --stride 64       # any text; more context for each token
    python evaluate.py runs/20260131_235959_baseline --json
    python evaluate.py --show 500                           # where the model was surprised

The text is read in windows of T tokens, the model's context, each `--stride` tokens after the one
before. Each token is predicted exactly once: in the first window all are, in a later one those that
the windows before did not reach, with T - stride tokens before them at least. The last window ends
with the text and may be shorter. The first token of all has nothing before it and does not count.

With a stride of T, the default, this is the evaluation that training does where eval_iters is 0.
A shorter one takes T / stride times as long and gives a lower loss, that of a model which always
sees much of what came before.
"""

import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.text import Text

from bundle import WEIGHTS_FILE, Bundle, read_bundle
from corpus import MemoryCorpus, StoredCorpus, Tokens, open_corpus
from inference import find_model
from parameters import Count, Data, Device, ModelName, Positive, Settings, Switch
from tokenizer import Tokenizer, restore_tokenizer
from utils.checks import format_name
from utils.command_line import Action, CommandLine
from utils.data_files import find_data_problem
from utils.errors import UserError
from utils.output import Output, align_columns, pluralize, run_command

if TYPE_CHECKING:  # torch is imported when all mistakes have been answered
    from model import LanguageModel


class EvaluateConfig(Settings):
    """Which model, and on what."""

    run: str | None = None
    """A run's id or directory, or a bundle anywhere. null: the newest run in runs_dir."""

    model_name: ModelName | None = None
    """A named model, instead of a run."""

    runs_dir: str = "runs"
    """Where runs are looked for."""

    checkpoints_dir: str = "checkpoints"
    """Where named models are looked for."""

    data: str | None = Field(default=None, min_length=1)
    """A text, as train.py takes it; all of it if no split is named. null: that of its training."""

    split: Literal["train", "val", "test"] | None = None
    """A part of the text, cut as in training. null: val, or all of what --data names."""

    on_unknown: Literal["error", "skip"] = "error"
    """Characters that the model does not know: error, or skip them."""

    token_store: Switch = "auto"
    """Keep the text's ids on disk, in cache_dir, and map them. auto: from 64 MB of text on."""

    cache_dir: str | None = Field(default=None, min_length=1)
    """Where token stores and standard input are kept. null: the user's cache."""

    stride: Positive | None = None
    """Tokens from one window to the next, at most the model's block_size. null: block_size."""

    show: Count = 0
    """Show how surprised the model was by each of the first so many characters. 0: don't."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""

    quantize: Literal["none", "int8"] = "none"
    """int8: with the weights of the blocks rounded to 8 bits, as inference.py has them."""


ACTIONS = (Action("json", "Print one JSON object."),)
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


def main(argv: Sequence[str]) -> int:
    """The command: find the model and the text, predict each token, and say how well that went."""
    command_line = CommandLine(__doc__, EvaluateConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    config = EvaluateConfig(**flags)
    if config.show and "json" in actions:
        raise UserError("--show draws, and --json prints nothing but one object: choose one")
    output = Output()
    bundle = read_bundle(find_model(config, actions.get("model")), WEIGHTS_FILE)
    tokenizer = restore_tokenizer(bundle.tokenizer)
    stride = chosen_stride(config.stride, bundle)
    passage = read_passage(config, bundle, tokenizer, output)

    # Only here is torch imported: help and mistakes are answered at once.
    from checkpoint import load_model_from_bundle
    from decoding import quantize
    from utils.device import choose_device

    model, _ = load_model_from_bundle(bundle, choose_device(config.device))
    if config.quantize == "int8":
        quantize(model)
    windows = window_starts(passage.ids.size, model.block_size, stride).size
    began = time.perf_counter()
    with nullcontext() if "json" in actions else output.show_progress(windows):
        losses = token_losses(
            model, passage.ids, stride, lambda done: output.advance(done, "windows")
        )
    seconds = time.perf_counter() - began
    score = scored(losses, passage.ids, tokenizer)
    if "json" in actions:
        output.print(as_json(bundle, passage, score, stride, seconds, config.quantize))
        return output.exit_status
    output.print(described(bundle, passage, score, tokenizer.unit, stride, seconds))
    if config.show:
        show(output, pieces(passage.ids, losses, tokenizer, config.show), tokenizer.unit)
    return output.exit_status


def chosen_stride(wanted: int | None, bundle: Bundle) -> int:
    """The stride in tokens. Raises `UserError` where tokens between two windows would be missed."""
    T = bundle.config.block_size
    if wanted is not None and wanted > T:
        raise UserError(
            f"--stride {wanted} is more than the model's block_size {T}, and would leave tokens "
            f"out: choose 1 to {T}"
        )
    return wanted or T


# ----------------------------------------------------------------------------------------------
# The text


@dataclass(frozen=True)
class Passage:
    """A text, or the split of one, as ids `(N,)` of the tokenizer's `dtype`; N is 2 or more."""

    name: str
    split: str | None
    ids: Tokens


def read_passage(
    config: EvaluateConfig, bundle: Bundle, tokenizer: Tokenizer, output: Output
) -> Passage:
    """What the settings say to evaluate on. Says on stderr what is not as one may expect.

    Raises `UserError` where there is no such text or split, or the model does not know it.
    """
    settings = bundle.state.settings.items()
    trained = Data(**{name: value for name, value in settings if name in Data.model_fields})
    split, skip = config.split, config.on_unknown == "skip"
    if split is None and config.data is None:
        split = "val"
    if split == "test" and trained.test_split == 0:
        raise UserError(
            "--split test: the model was trained without one (test_split 0): "
            "choose --split val, or a text that it has not seen with --data FILE"
        )
    text = open_passage(config, trained.data, output)
    if config.data is None:
        skip = skip or trained.on_new_chars == "drop"  # as training did
        if text.sha256 != bundle.state.get_fact("data_sha256"):
            output.print_warning(
                f"{format_name(text.name)} has changed since the model was trained on it (another "
                "SHA-256): this is the loss on the text as it is now"
            )
    unknown = text.count_unknown(tokenizer)
    if unknown and not skip:
        try:
            tokenizer.encode("".join(unknown))
        except UserError as error:
            raise UserError(
                f"{format_name(text.name)}: {error}; --on-unknown skip leaves out what it does not "
                "know"
            ) from None
    encoded, left_out = text.encode(tokenizer, unknown), sum(unknown.values())
    if left_out:
        count = pluralize(left_out, "character")
        output.print_note(
            f"{format_name(text.name)}: left out {count} that the model does not know"
        )
    start, stop = encoded.split(trained)[split] if split else (0, encoded.tokens.size)
    if stop - start < 2:
        what = f"its {split} split" if split else "it"
        raise UserError(
            f"{format_name(text.name)}: {what} has {pluralize(stop - start, tokenizer.unit)}, and what "
            "is predicted is each one after the first: take a longer text"
        )
    return Passage(text.name, split, encoded.tokens[start:stop])


def open_passage(
    config: EvaluateConfig, recorded: str | None, output: Output
) -> MemoryCorpus | StoredCorpus:
    """The text that the settings name, or that was recorded; no path: the sample corpus.

    Raises `UserError` that says what to do where it is no longer there.
    """
    data = config.data or recorded
    if data is None:
        return open_corpus(None, cache_dir=config.cache_dir)
    if config.data is None and (problem := find_data_problem(data)):
        raise UserError(
            f"{format_name(data)}, the text that the model was trained on: {problem}: "
            "say where it is now, or name another, with --data FILE"
        )
    where = {"cache_dir": config.cache_dir, "token_store": config.token_store}
    return open_corpus(data, **where, on_progress=output.print_note)


# ----------------------------------------------------------------------------------------------
# The measure


def window_starts(tokens: int, block_size: int, stride: int) -> np.ndarray:
    """Where the windows begin, `(W,)` int64: so many that the last one reaches the end."""
    inputs = tokens - 1  # the last token is only ever a target
    further = max(0, math.ceil((inputs - block_size) / stride))
    return np.arange(1 + further) * stride


def token_losses(
    model: "LanguageModel",
    ids: Tokens,
    stride: int,
    tell: Callable[[int], None] = lambda windows: None,
) -> np.ndarray:
    """What each token after the first costs, `(N - 1,)` float32, in nats; computed in float32.

    Args:
        model: in whatever mode; it is left in that.
        ids: the text, `(N,)`, with N of 2 at least.
        stride: from one window to the next, 1 to the model's `block_size`.
        tell: hears how many windows are done.
    """
    import torch
    from torch.nn import functional as F

    device, T = model.token_embedding.weight.device, model.block_size
    losses = np.empty(ids.size - 1, dtype=np.float32)
    was_training = model.training
    model.eval()
    done = 0
    with torch.inference_mode():
        for starts, length in window_batches(ids.size, stride, model):
            windows = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
            windows = torch.from_numpy(windows).to(device)  # (B, length + 1)
            logits, _ = model(windows[:, :-1])  # (B, length, V)
            costs = F.cross_entropy(
                logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
            )
            for start, row in zip(starts, costs.view(-1, length).cpu().numpy(), strict=True):
                known = T - stride if start > 0 else 0  # the windows before have these
                losses[start + known : start + length] = row[known:]
            done += starts.size
            tell(done)
    model.train(was_training)
    return losses


def window_batches(
    tokens: int, stride: int, model: "LanguageModel"
) -> Iterator[tuple[np.ndarray, int]]:
    """Windows side by side, where they begin, `(B,)`, and their length: as many as are quick."""
    from step import EVALUATED_AT_ONCE, EVALUATED_AT_ONCE_ON_CPU

    T, (V, C) = model.block_size, model.token_embedding.weight.shape
    is_cpu = model.token_embedding.weight.device.type == "cpu"
    numbers = EVALUATED_AT_ONCE_ON_CPU if is_cpu else EVALUATED_AT_ONCE
    rows = max(1, numbers // (T * max(V, C)))
    starts = window_starts(tokens, T, stride)
    whole = starts[starts + T < tokens]
    for first in range(0, whole.size, rows):
        yield whole[first : first + rows], T
    if whole.size < starts.size:
        yield starts[-1:], int(tokens - 1 - starts[-1])


COUNTED_AT_ONCE = 1 << 20  # tokens


@dataclass(frozen=True)
class Score:
    """How well a text was predicted; `characters` and `bytes` are those of the `tokens` predicted.

    `loss` is the mean in nats per token, and `perplexity` what is e to that. Bits for each
    character, and for each byte of UTF-8, compare models of any tokenizer.
    """

    tokens: int
    characters: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float


def scored(losses: np.ndarray, ids: Tokens, tokenizer: Tokenizer) -> Score:
    """The means of the losses `(N - 1,)` of a text `(N,)`, in float64."""
    total = float(losses.sum(dtype=np.float64))
    loss = total / losses.size
    decode, token_bytes = tokenizer.create_stream_decoder(), tokenizer.token_bytes
    characters = size = 0
    for start in range(1, ids.size, COUNTED_AT_ONCE):
        predicted = np.asarray(ids[start : start + COUNTED_AT_ONCE])
        characters += len(decode(predicted.tolist()))
        size += int(token_bytes[predicted].sum())
    characters += len(decode([]))
    return Score(
        tokens=losses.size,
        characters=characters,
        bytes=size,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,  # the largest float is e^709
        bits_per_character=total / math.log(2) / characters,
        bits_per_byte=total / math.log(2) / size,
    )


# ----------------------------------------------------------------------------------------------
# What is printed


def described(
    bundle: Bundle, passage: Passage, score: Score, unit: str, stride: int, seconds: float
) -> str:
    """The score as lines for people."""
    T = bundle.config.block_size
    windows = pluralize(window_starts(score.tokens + 1, T, stride).size, "window")
    sizes = [pluralize(score.tokens, unit)]
    if unit != "character":
        sizes.append(pluralize(score.characters, "character"))
    if score.bytes != score.characters:
        sizes.append(pluralize(score.bytes, "byte"))
    split = f", its {passage.split} split" if passage.split else ""
    rows = [
        ("model", f"{bundle.path}, step {bundle.state.step:,}"),
        ("text", f"{format_name(passage.name)}{split}"),
        ("predicted", f"{', '.join(sizes)}; {windows} of {T}, stride {stride}, {seconds:.1f} s"),
        ("loss", f"{score.loss:.4f} nats per {unit}"),
        ("perplexity", f"{score.perplexity:.4f}"),
        ("bits per character", f"{score.bits_per_character:.4f}"),
        ("bits per byte", f"{score.bits_per_byte:.4f}"),
    ]
    return align_columns(rows)


def as_json(
    bundle: Bundle, passage: Passage, score: Score, stride: int, seconds: float, quantize: str
) -> str:
    """The score as one JSON object; what is not finite is null, as JSON has no word for it."""
    values: Mapping[str, Any] = {
        "model": str(bundle.path),
        "step": bundle.state.step,
        "data": passage.name,
        "split": passage.split,
        **asdict(score),
        "stride": stride,
        "block_size": bundle.config.block_size,
        "quantize": quantize,
        "seconds": round(seconds, 3),
    }
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(finite, indent=2)


# ----------------------------------------------------------------------------------------------
# Where the model was surprised

HOTTEST = 8.0  # bits: a guess among 256
# From calm to hot, red, green and blue: all of them light enough for black letters.
HEAT = ((214, 234, 255), (255, 243, 176), (255, 176, 92), (255, 92, 72))
MOST_SURPRISING = 10
BEFORE, AFTER = 30, 15  # characters of context in the table


@dataclass(frozen=True)
class Piece:
    """Some text that was predicted at once, and what it cost; the text's first has NaN bits."""

    text: str
    bits: float


def pieces(ids: Tokens, losses: np.ndarray, tokenizer: Tokenizer, characters: int) -> list[Piece]:
    """The tokens of the first so many characters, each with its surprise.

    A character that byte pairs spell in several tokens is one piece.
    """
    found: list[Piece] = []
    decode = tokenizer.create_stream_decoder()
    length, bits = 0, 0.0
    costs = np.concatenate(([math.nan], losses / math.log(2)))
    for token, cost in zip(ids, costs, strict=True):
        if length >= characters:
            break
        text = decode([int(token)])
        bits += float(cost)
        if text:  # else the character goes on in the next token
            found.append(Piece(text, bits))
            length, bits = length + len(text), 0.0
    return found


def show(output: Output, shown: Sequence[Piece], unit: str) -> None:
    """The text in colours where the terminal has them, or else what surprised most, as a table."""
    output.print()
    if not has_colours(output.console):
        output.print(most_surprising(shown, unit))
        return
    with output.console.capture() as captured:
        output.console.print(heat_view(shown), soft_wrap=True)
    output.print(captured.get().rstrip("\n"))


def has_colours(console: Console) -> bool:
    """Whether the console is a terminal with colours, and nobody has set NO_COLOR."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def heat_view(shown: Sequence[Piece]) -> Text:
    """The text, each piece on the colour of its surprise, and a legend below it."""
    view = Text()
    for piece in shown:
        view.append(harmless(piece.text).replace("\n", "↵\n"), heat_style(piece.bits))
    view.append("\n\nsurprise: 0 bits ")
    for half_bits in range(int(2 * HOTTEST) + 1):
        view.append(" ", heat_style(half_bits / 2))
    view.append(f" {HOTTEST:g} bits and more")
    return view


def heat_style(bits: float) -> str:
    """Black on the colour of so many bits, in rich's words; of NaN, nothing."""
    if math.isnan(bits):
        return ""
    place = min(max(bits / HOTTEST, 0.0), 1.0) * (len(HEAT) - 1)
    below = min(int(place), len(HEAT) - 2)
    part = place - below
    mixed = (round(a + (b - a) * part) for a, b in zip(HEAT[below], HEAT[below + 1], strict=True))
    return "#000000 on #{:02x}{:02x}{:02x}".format(*mixed)


def most_surprising(shown: Sequence[Piece], unit: str) -> str:
    """The places that cost most, the dearest first: where, bits, and between what they stand."""
    text = "".join(piece.text for piece in shown)
    ends = np.cumsum([len(piece.text) for piece in shown])
    known = [index for index, piece in enumerate(shown) if not math.isnan(piece.bits)]
    dearest = sorted(known, key=lambda index: -shown[index].bits)[:MOST_SURPRISING]
    rows = [("bits", "at", "text before", unit, "text after")]
    for index in dearest:
        piece, end = shown[index], int(ends[index])
        start = end - len(piece.text)
        row = (
            f"{piece.bits:.1f}",
            f"{start + 1:,}",
            one_line(text[max(0, start - BEFORE) : start]),
            one_line(piece.text).replace(" ", "␣"),
            one_line(text[end : end + AFTER]),
        )
        rows.append(row)
    title = f"The most surprising of the first {pluralize(len(text), 'character')}:"
    return f"{title}\n{align_columns(rows, right=(0, 1, 2))}"


def one_line(text: str) -> str:
    """A text as it may stand in a table's cell."""
    return harmless(text).replace("\n", "↵").replace("\t", "\\t")


def harmless(text: str) -> str:
    """A text that cannot drive a terminal: characters that show nothing are escaped.

    Line ends, tabs and the wider kinds of space stay as they are.
    """

    def is_harmless(char: str) -> bool:
        return char in "\n\t" or char.isprintable() or unicodedata.category(char) == "Zs"

    return "".join(char if is_harmless(char) else ascii(char)[1:-1] for char in text)


if __name__ == "__main__":
    sys.exit(run_command(main))
