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
from exporters import html, huggingface
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
MAX_DIFFERENCES = {"fp32": 3e-3, "fp16": 0.03, "bf16": 0.15, "q8_0": 0.5, "int8": 0.5}


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

    def close(self) -> None:
        """Free what the program holds."""


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
    if not is_present(place):
        raise UserError(f"{place}: no such export")
    if not is_present(place / RECORD_FILE):
        if not bundles:
            raise UserError(f"{place}: has no {RECORD_FILE}: name the model to compare it with")
        found = {each: find_differences(load_source(each), place) for each in bundles}
        origin = min(bundles, key=lambda bundle: len(found[bundle]))
        return format_result(place, found[origin], [f"the weights of {origin}"])
    record = read_record(place)
    problems, facts = (
        find_changes(place, record),
        [f"{pluralize(len(record.files), 'file')} as exported"],
    )
    origin = find_origin(bundles, record, runs_dir)
    if origin is not None:
        facts.append(f"the weights of {origin}")
        if record.format != "onnx":  # its graphs depend on PyTorch's version: the hashes must do
            problems += find_differences(load_source(origin), place, record.format)
    elif bundles:
        problems.append(f"was made from other weights than those of {bundles[0]}")
    else:
        facts.append(f"the model with the weights {record.weights_sha256} was not found")
    return format_result(place, problems, facts)


def format_result(
    place: Path, problems: Sequence[str], facts: Sequence[str]
) -> tuple[list[str], bool]:
    """Return a line for each problem, or one with the facts, and whether there is no problem."""
    return [f"{place}: {line}" for line in problems or [", ".join(facts)]], not problems


def find_origin(bundles: Sequence[Path], record: ExportRecord, runs_dir: Path) -> Path | None:
    """Return the bundle with the weights that were exported, or None.

    It is one of `bundles`, or the exported step in the run of one of them. Without `bundles`, it is
    looked for in the run that the record names.
    """
    runs = [find_run_of(each) for each in bundles] or [find_run_by_id(record.run_id, runs_dir)]
    kept = [find_kept_step(run, record.step) for run in runs if run is not None]
    for bundle in [*bundles, *filter(None, kept)]:
        if read_state(bundle).files[WEIGHTS_FILE] == record.weights_sha256:
            return bundle
    return None


def find_differences(source: ExportSource, place: Path, format: str = "") -> list[str]:
    """Return one line for each tensor in which a Transformers directory, GGUF or page differs.

    The model is exported again, in the dtype of the file, and compared bit for bit. `format` is
    that of the record; without it, a directory is Transformers', and a file a page or a GGUF.

    Raises `UserError` if `place` is none of these, cannot be read, or needs a library, or its
    format lacks a part of the model.
    """
    limit = 4 * source.model.count_parameters() + SPARE_BYTES
    if format == "hf" or (not format and is_directory(place)):
        exporter = huggingface
    elif format == "html" or (not format and place.suffix == ".html"):
        exporter, limit = html, html.MAX_PAGE + SPARE_BYTES
    else:
        try:
            from exporters import gguf as exporter  # late: it needs an optional dependency
        except ImportError:
            raise UserError("gguf is not installed: `pip install '.[export]'`") from None
    if exporter is not html:
        source.check_portable()
    try:
        path = exporter.find_file(place)
        if path.stat().st_size > limit:
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
