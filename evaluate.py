"""Measure how well a model predicts a text: exactly, over each of its tokens.

    python evaluate.py                                      # the newest run, on its val split
    python evaluate.py --model-name dante --split train
    python evaluate.py --data another.txt --stride 64       # any text; more context for each token
    python evaluate.py runs/20260131_235959_baseline --json
    python evaluate.py --show 500                           # the surprise of each character

Windows of T tokens, the model's context, start every `--stride` tokens. Each token but the first is
predicted exactly once: in the first window that reaches it, with at least T - stride tokens before
it unless it is in the first window of all. The last window may be shorter.

A stride of T, the default, is training's evaluation with eval_iters 0. A shorter one takes longer
and gives a lower loss, as each token is predicted from more context.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from rich.color import blend_rgb
from rich.text import Text

from bundle import WEIGHTS_FILE, Bundle, load_tokenizer, read_bundle
from corpus import MemoryCorpus, StoredCorpus, Tokens, open_corpus
from inference import ModelChoice, find_model, load_model_from_bundle
from parameters import Count, Data, Device, Positive, Switch
from tokenizer import Tokenizer
from utils.checks import format_name
from utils.command_line import Action, CommandLine
from utils.data_files import find_data_problem
from utils.errors import UserError
from utils.output import Output, escape_control, pluralize, run_command
from utils.tables import align_columns

if TYPE_CHECKING:
    from model import LanguageModel


class EvaluateConfig(ModelChoice):
    """Which model, and on what."""

    data: str | None = Field(default=None, min_length=1)
    """A text, as train.py takes it; all of it if no split is named. null: that of its training."""

    split: Literal["train", "val", "test"] | None = None
    """A split of the text, as in training. null: val, or all of the text that --data names."""

    on_unknown: Literal["error", "skip"] = "error"
    """Characters that are not in the vocabulary: error, or skip them."""

    token_store: Switch = "auto"
    """Keep the text's ids on disk, in cache_dir, and map them. auto: from 64 MB of text on."""

    cache_dir: str | None = Field(default=None, min_length=1)
    """The directory of token stores and of standard input. null: the user's cache."""

    stride: Positive | None = None
    """Tokens from one window to the next, at most the model's block_size. null: block_size."""

    show: Count = 0
    """Evaluate the first so many characters only, and show each one's surprise in bits. 0: all."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""

    quantize: Literal["none", "int8"] = "none"
    """int8: with the blocks' weights rounded to 8 bits, as in inference.py."""


ACTIONS = (Action("json", "Print one JSON object."),)
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


# ----------------------------------------------------------------------------------------------
# The text


@dataclass(frozen=True)
class Passage:
    """A text or a part of it, as ids `(N,)` of the tokenizer's dtype, with N at least 2."""

    name: str
    split: str | None
    ids: Tokens


def load_passage(
    config: EvaluateConfig, bundle: Bundle, tokenizer: Tokenizer, output: Output
) -> Passage:
    """Load the text and split to evaluate on. Note characters left out, and a changed text.

    Raises `UserError` if there is no such text or split, or if it has unknown characters.
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
    text = open_text(config, trained.data, output)
    name = format_name(text.name)
    if config.data is None:
        skip = skip or trained.on_new_chars == "drop"  # as in training
        if text.sha256 != bundle.state.get_fact("data_sha256"):
            output.print_warning(
                f"{name} has changed since the model was trained on it (another SHA-256): "
                "this is the loss on the present text"
            )
    unknown = text.count_unknown(tokenizer)
    if unknown and not skip:
        try:
            tokenizer.encode("".join(unknown))
        except UserError as error:
            raise UserError(f"{name}: {error}; --on-unknown skip leaves them out") from None
    encoded, num_skipped = text.encode(tokenizer, unknown), sum(unknown.values())
    if num_skipped:
        characters = pluralize(num_skipped, "character")
        output.print_note(f"{name}: left out {characters} that are not in the vocabulary")
    start, stop = encoded.split(trained)[split] if split else (0, encoded.tokens.size)
    if stop - start < 2:
        part = f"its {split} split" if split else "it"
        length = pluralize(stop - start, tokenizer.unit)
        raise UserError(f"{name}: {part} has {length}: 2 or more are needed; take a longer text")
    return Passage(text.name, split, encoded.tokens[start:stop])


def open_text(
    config: EvaluateConfig, recorded: str | None, output: Output
) -> MemoryCorpus | StoredCorpus:
    """Open the text that the settings name, or the recorded one; None is the sample corpus.

    Raises `UserError` if it is not there.
    """
    data = config.data or recorded
    if data != config.data and (problem := find_data_problem(data)):
        raise UserError(
            f"{format_name(data)}, the text that the model was trained on: {problem}: "
            "give its new path, or another text, with --data FILE"
        )
    places = {"cache_dir": config.cache_dir, "token_store": config.token_store}
    return open_corpus(data, **places, on_progress=output.print_note)


# ----------------------------------------------------------------------------------------------
# The losses and the score


def find_window_starts(num_tokens: int, block_size: int, stride: int) -> np.ndarray:
    """Return the first token of each window, `(W,)` int64, so that the last reaches the end."""
    inputs = num_tokens - 1  # the last token is a target only
    further = max(0, math.ceil((inputs - block_size) / stride))
    return np.arange(1 + further) * stride


def compute_token_losses(
    model: "LanguageModel",
    tokens: Tokens,
    stride: int,
    on_progress: Callable[[int], None] = lambda num_windows: None,
) -> np.ndarray:
    """Compute the loss of each of `tokens`, `(N,)`, but the first: `(N - 1,)` float32, in nats.

    N is at least 2, and `stride` from 1 to the model's `block_size`. `on_progress` is called with
    the number of windows done.
    """
    import torch
    from torch.nn import functional as F

    from utils.evaluation import count_parallel_windows, enter_evaluation_mode

    T, rows = model.block_size, max(1, count_parallel_windows(model))
    device = model.token_embedding.weight.device
    losses = np.empty(tokens.size - 1, dtype=np.float32)
    starts = find_window_starts(tokens.size, T, stride)
    full = starts[starts + T < tokens.size]  # windows with T targets; the last may have fewer
    batches = [full[first : first + rows] for first in range(0, full.size, rows)]
    if full.size < starts.size:
        batches.append(starts[-1:])
    done = 0
    with enter_evaluation_mode(model):
        for batch in batches:
            length = min(T, tokens.size - 1 - int(batch[-1]))
            windows = tokens[batch[:, None] + np.arange(length + 1)].astype(np.int64)
            windows = torch.from_numpy(windows).to(device)  # (B, length + 1)
            inputs, targets = windows[:, :-1], windows[:, 1:]
            logits = model(inputs)[0].float()  # (B, length, V)
            found = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            for start, row in zip(batch, found.view(targets.shape).cpu().numpy(), strict=True):
                known = T - stride if start > 0 else 0  # predicted in the windows before
                losses[start + known : start + length] = row[known:]
            done += batch.size
            on_progress(done)
    return losses


TOKENS_PER_CHUNK = 1 << 20  # decoded at once to count characters


@dataclass(frozen=True)
class Score:
    """Means over the predicted tokens; `characters` and `bytes` are theirs.

    `loss` is in nats per token; `perplexity` is e to the loss. Bits per character and per byte of
    UTF-8 compare models of any tokenizer.
    """

    tokens: int
    characters: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float


def compute_score(losses: np.ndarray, ids: Tokens, tokenizer: Tokenizer) -> Score:
    """Average the losses `(N - 1,)` of a text `(N,)`, in float64."""
    total = float(losses.sum(dtype=np.float64))
    loss = total / losses.size
    decode, token_bytes = tokenizer.create_stream_decoder(), tokenizer.token_bytes
    characters = size = 0
    for start in range(1, ids.size, TOKENS_PER_CHUNK):
        predicted = np.asarray(ids[start : start + TOKENS_PER_CHUNK])
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


def format_json(facts: Mapping[str, Any]) -> str:
    """Format as one JSON object; numbers that are not finite are null."""
    is_infinite = {k for k, v in facts.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**facts, **dict.fromkeys(is_infinite)}, indent=2)


def format_rows(facts: Mapping[str, Any], windows: int, unit: str, shown: int = 0) -> str:
    """Format as aligned lines of key and value; `unit` is the tokenizer's.

    `shown` is the number of characters if only the first ones were evaluated, else 0.
    """
    sizes = [pluralize(facts["tokens"], unit)]
    if unit != "character":
        sizes.append(pluralize(facts["characters"], "character"))
    if facts["bytes"] != facts["characters"]:
        sizes.append(pluralize(facts["bytes"], "byte"))
    split = f", its {facts['split']} split" if facts["split"] else ""
    whole = f"whole {facts['split']} split" if facts["split"] else "whole text"
    part = f"first {pluralize(shown, 'character')}" if shown else whole
    rows = [
        ("model", f"{facts['model']}, step {facts['step']:,}"),
        ("text", f"{format_name(facts['data'])}{split}"),
        (
            "predicted",
            f"{', '.join(sizes)}; {pluralize(windows, 'window')} of {facts['block_size']}, "
            f"stride {facts['stride']}, {facts['seconds']:.1f} s",
        ),
        ("loss", f"{facts['loss']:.4f} nats per {unit} ({part})"),
        ("perplexity", f"{facts['perplexity']:.4f}"),
        ("bits per character", f"{facts['bits_per_character']:.4f}"),
        ("bits per byte", f"{facts['bits_per_byte']:.4f}"),
    ]
    return align_columns(rows)


# ----------------------------------------------------------------------------------------------
# Surprise: the bits of each character, as colours or as a table

MAX_BITS = 8.0  # the end of the scale: a guess among 256
# Background colours from 0 to MAX_BITS, RGB, all light enough for black letters.
HEAT = ((214, 234, 255), (255, 243, 176), (255, 176, 92), (255, 92, 72))
TABLE_ROWS = 10
CONTEXT_BEFORE, CONTEXT_AFTER = 30, 15  # characters in the table


@dataclass(frozen=True)
class Piece:
    """Text that was predicted at once, and its bits; NaN for the first of a text."""

    text: str
    bits: float


def count_first_tokens(ids: Tokens, tokenizer: Tokenizer, characters: int) -> int:
    """Return the number of tokens that hold the first `characters` characters, at least 2."""
    decode, number, length = tokenizer.create_stream_decoder(), 0, 0
    while number < ids.size and (length < characters or number < 2):
        length += len(decode([int(ids[number])]))
        number += 1
    return number


def split_pieces(ids: Tokens, losses: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
    """Return the text of the tokens, each with its bits.

    A character that spans several tokens of BPE is one piece.
    """
    found: list[Piece] = []
    decode, bits = tokenizer.create_stream_decoder(), 0.0
    for token, cost in zip(ids, np.concatenate(([math.nan], losses / math.log(2))), strict=True):
        text = decode([int(token)])
        bits += float(cost)
        if text:  # else the character continues in the next token
            found.append(Piece(text, bits))
            bits = 0.0
    return found


def print_surprise(output: Output, pieces: Sequence[Piece], unit: str) -> None:
    """Print the text on colours if the terminal has them, else a table of the highest bits."""
    output.print()
    console = output.console
    if not console.is_terminal or console.color_system is None or console.no_color:
        output.print(format_surprise_table(pieces, unit))
        return
    output.print_drawing(draw_surprise(pieces))


def draw_surprise(pieces: Sequence[Piece]) -> Text:
    """Return the text with each piece on the colour of its bits, and a legend."""
    view = Text()
    for piece, following in zip_longest(pieces, pieces[1:]):
        text = piece.text
        if text.endswith("\r") and following and following.text.startswith("\n"):
            text = text[:-1] + "\\r"  # half of a line end, which has bits of its own
        view.append(escape_control(text).replace("\n", "↵\n"), get_heat_style(piece.bits))
    view.append("\n\nsurprise: 0 bits ")
    for half_bits in range(int(2 * MAX_BITS) + 1):
        view.append(" ", get_heat_style(half_bits / 2))
    view.append(f" {MAX_BITS:g} bits and more")
    return view


def get_heat_style(bits: float) -> str:
    """Return rich's style for black on the colour of `bits`; for NaN, no style."""
    if math.isnan(bits):
        return ""
    place = min(max(bits / MAX_BITS, 0.0), 1.0) * (len(HEAT) - 1)
    below = min(int(place), len(HEAT) - 2)
    return f"#000000 on {blend_rgb(HEAT[below], HEAT[below + 1], place - below).hex}"


def format_surprise_table(pieces: Sequence[Piece], unit: str) -> str:
    """List the positions with the highest bits, in descending order, with their context."""
    text = "".join(piece.text for piece in pieces)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    predicted = [index for index, piece in enumerate(pieces) if not math.isnan(piece.bits)]
    highest = sorted(predicted, key=lambda index: -pieces[index].bits)[:TABLE_ROWS]
    rows = [("bits", "at", "text before", unit, "text after")]
    for index in highest:
        piece, end = pieces[index], int(ends[index])
        start = end - len(piece.text)
        contexts = (text[max(0, start - CONTEXT_BEFORE) : start], text[end : end + CONTEXT_AFTER])
        before, after = map(format_cell, contexts)
        shown = format_cell(piece.text).replace(" ", "␣")
        rows.append((f"{piece.bits:.1f}", f"{start + 1:,}", before, shown, after))
    title = f"The most surprising of the first {pluralize(len(text), 'character')}:"
    return f"{title}\n{align_columns(rows, right=(0, 1, 2))}"


def format_cell(text: str) -> str:
    """Format a text for one cell of a table."""
    return escape_control(text).replace("\n", "↵").replace("\t", "\\t")


def main(argv: Sequence[str]) -> int:
    """Evaluate: resolve the settings, load model and text, compute the losses, print the score."""
    command_line = CommandLine(__doc__, EvaluateConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    config, is_json = EvaluateConfig(**flags), "json" in actions
    if config.show and is_json:
        raise UserError("--show draws, and --json prints one object only: choose one")
    output = Output()
    chosen = find_model(config, actions["model"])
    bundle = read_bundle(chosen.path, WEIGHTS_FILE)
    if chosen.reason:
        output.print_note(f"{chosen.path}: {chosen.reason}")
    tokenizer = load_tokenizer(bundle)
    T = bundle.config.block_size
    stride = config.stride or T
    if stride > T:
        raise UserError(f"--stride {stride} would leave tokens out: choose 1 to block_size {T}")
    passage = load_passage(config, bundle, tokenizer, output)
    if config.show:
        length = count_first_tokens(passage.ids, tokenizer, config.show)
        passage = replace(passage, ids=passage.ids[:length])

    # These bring torch: imported once the settings are known to be good.
    from utils.device import choose_device
    from utils.quantization import round_to_int8

    model, _ = load_model_from_bundle(bundle, choose_device(config.device))
    if config.quantize == "int8":
        round_to_int8(model)
    windows = find_window_starts(passage.ids.size, T, stride).size
    start = time.perf_counter()
    with nullcontext() if is_json else output.show_progress(windows):
        losses = compute_token_losses(
            model, passage.ids, stride, lambda done: output.advance(done, "windows")
        )
    seconds = time.perf_counter() - start
    facts = {
        "model": str(bundle.path),
        "step": bundle.state.step,
        "data": passage.name,
        "split": passage.split,
        **asdict(compute_score(losses, passage.ids, tokenizer)),
        "stride": stride,
        "block_size": T,
        "quantize": config.quantize,
        "seconds": round(seconds, 3),
    }
    rows = format_rows(facts, windows, tokenizer.unit, config.show)
    output.print(format_json(facts) if is_json else rows)
    if config.show:
        print_surprise(output, split_pieces(passage.ids, losses, tokenizer), tokenizer.unit)
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
