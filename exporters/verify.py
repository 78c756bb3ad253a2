"""Comparison of an export, loaded in its target program, with the model that was exported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from bundle import WEIGHTS_FILE, find_kept_step, find_run_by_id, find_run_of, read_state
from decode_torch import TorchEngine
from engine import SamplingParams
from exporters import huggingface
from exporters.record import RECORD_FILE, ExportRecord, find_changes, read_record
from exporters.source import ExportSource, load_source
from generate import generate_tokens
from utils.errors import UserError, format_reason
from utils.files import is_directory, is_present
from utils.output import pluralize

PROMPTS = 20
PROMPT_TOKENS = 64  # or as many as the context has, if these are fewer
GREEDY_TOKENS = 200
SPARE_BYTES = 1 << 26  # of a file, for its vocabulary and the tensors that Folio has no part of
# How much logits may differ, in units of their standard deviation. In fp32, sums in another order
# differ by 1e-5, and llama.cpp's table of GELU by 1e-3.
MAX_DIFFERENCES = {"fp32": 3e-3, "fp16": 0.03, "bf16": 0.15, "q8_0": 0.5}


class TargetModel(Protocol):
    """A model, loaded by another program. Ids are those of the exported tokenizer."""

    library: str
    """The program and its version."""

    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, V)` of a text, `(T,)`."""

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, one after another, `(n,)`."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_with_source`.

    `difference` is the largest absolute one of the logits over all prompts, `std` their standard
    deviation. `agreeing` of `generated` tokens of greedy text are the same, from the first one on.
    """

    library: str
    difference: float
    std: float
    agreeing: int
    generated: int
    is_text_same: bool

    def is_equal(self, dtype: str) -> bool:
        """Return whether no more differs than rounding to `dtype` explains; greedy text may."""
        return self.is_text_same and self.difference <= MAX_DIFFERENCES[dtype] * self.std

    def format(self) -> str:
        """Return the comparison as one line."""
        text = "identical" if self.is_text_same else "DIFFERENT"
        greedy = f"{self.agreeing} of {pluralize(self.generated, 'greedy token')} identical"
        return (
            f"{self.library}: logits differ by at most {self.difference:.1e} over {PROMPTS} "
            f"prompts, {greedy}, text to ids and back {text}"
        )


@torch.no_grad()
def compare_with_source(source: ExportSource, target: TargetModel) -> Comparison:
    """Compare logits, greedy text and tokenizer."""
    tokenizer, T = source.tokenizer, source.config.block_size
    engine, tokens = TorchEngine(source.model), tokenizer.num_tokens
    start = tokenizer.encode(tokenizer.default_prompt)[-T:]
    prompts = generate_tokens(engine, start, min(PROMPT_TOKENS, T), seeds=range(PROMPTS))[:, -T:]
    ours = np.stack([source.model(ids)[0][0, :, :tokens].numpy() for ids in prompts])
    theirs = np.stack([target.compute_logits(ids)[:, :tokens] for ids in prompts])
    n = min(GREEDY_TOKENS, T - len(start))
    greedy = generate_tokens(engine, start, n, SamplingParams(temperature=0))[0, len(start) :]
    same = greedy == target.generate(np.asarray(start, dtype=np.int64), n)
    text = tokenizer.decode(prompts.ravel())
    if tokenizer.token_kind == "char":
        text += "".join(tokenizer.chars)
    ids = tokenizer.encode(text).tolist()
    encoded = list(target.encode(text))
    return Comparison(
        library=target.library,
        difference=float(np.abs(ours - theirs).max()),  # NaN if there is one
        std=float(ours.std()),
        agreeing=n if same.all() else int(np.argmin(same)),
        generated=n,
        is_text_same=encoded == ids and target.decode(encoded) == text,
    )


# ----------------------------------------------------------------------------------------------
# Check an export against its record and its model


def verify_export(place: Path, bundles: Sequence[Path], runs_dir: Path) -> tuple[list[str], bool]:
    """Compare an export, or a GGUF file, with its record and with the model it was made from.

    `bundles` are those of the model that the user named. Without any, the model is looked for in
    the run that the record names.

    Returns lines to print, and whether nothing differs. Raises `UserError` if `place` cannot be
    read, or there is neither a record nor a bundle.
    """
    record = read_record(place) if is_present(place / RECORD_FILE) else None
    if record is None and not bundles:
        raise UserError(f"{place}: has no {RECORD_FILE}: name the model to compare it with")
    problems = find_changes(place, record) if record else []
    origins = find_origins(bundles, record, runs_dir) if record else list(bundles)
    facts = [f"{pluralize(len(record.files), 'file')} as exported"] if record else []
    if record and bundles and not origins:
        problems.append(f"was made from other weights than those of {bundles[0]}")
    elif not origins:
        facts.append(f"the model with the weights {record.weights_sha256} was not found")
    else:
        facts.append(f"the weights of {origins[0]}")
        # The graphs of an ONNX file depend on PyTorch's version: their record must do.
        if record is None or record.format != "onnx":
            found = [find_differences(load_source(bundle), place, record) for bundle in origins]
            best = min(range(len(found)), key=lambda n: len(found[n]))
            problems += found[best]
            facts[-1] = f"the weights of {origins[best]}"
    lines = [f"{place}: {line}" for line in problems or [", ".join(facts)]]
    return lines, not problems


def find_origins(bundles: Sequence[Path], record: ExportRecord, runs_dir: Path) -> list[Path]:
    """Return the bundle with the weights that were exported, or nothing.

    It is one of `bundles`, or another step that the run of one of them has kept, or, without
    `bundles`, the run that the record names.
    """
    run = find_run_by_id(record.run_id, runs_dir)
    runs = [find_run_of(bundle) for bundle in bundles] or [run]
    kept = [find_kept_step(each, record.step) for each in runs if each]
    for bundle in [*bundles, *filter(None, kept)]:
        if read_state(bundle).files[WEIGHTS_FILE] == record.weights_sha256:
            return [bundle]
    return []


def find_differences(source: ExportSource, place: Path, record: ExportRecord | None) -> list[str]:
    """Return one line for each tensor in which a Transformers directory or GGUF file differs.

    The model is exported again, in the dtype of the file, and compared bit for bit.

    Raises `UserError` if `place` is neither, cannot be read, or needs a library.
    """
    if is_directory(place) and (record is None or record.format == "hf"):
        exporter = huggingface
    else:
        try:
            from exporters import gguf as exporter  # late: it needs an optional dependency
        except ImportError:
            raise UserError("gguf is not installed: `pip install '.[export]'`") from None
    try:
        path = exporter.find_file(place)
        if path.stat().st_size > 4 * source.model.count_parameters() + SPARE_BYTES:
            return [f"{path.name} is too large to be this model"]
        dtype, found = exporter.read_tensors(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{place}: cannot be read: {format_reason(error)}") from None
    expected = exporter.create_tensors(source, dtype)
    shared = [name for name in expected if name in found]
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not a tensor of this model" for name in found if name not in expected),
        *(f"{name} differs" for name in shared if not is_same(found[name], expected[name])),
    ]


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and values."""
    return found.dtype == expected.dtype and torch.equal(found, expected)
