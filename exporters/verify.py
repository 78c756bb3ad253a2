"""Comparison of an export, loaded by the program that it is for, with its source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from bundle import WEIGHTS_FILE, find_kept_step, find_run_by_id, read_state
from decode_torch import TorchEngine
from engine import SamplingParams
from exporters import huggingface
from exporters.record import RECORD_FILE, find_changes, read_record
from exporters.source import ExportSource, load_source
from generate import generate_tokens
from utils.errors import UserError, format_reason
from utils.files import is_present
from utils.output import pluralize

PROMPTS = 20
PROMPT_TOKENS = 64  # or as many as the context has, if these are fewer
GREEDY_TOKENS = 200
# Of logits in fp32: sums in another order differ by 1e-5, llama.cpp's table of GELU by 4e-3.
MAX_DIFFERENCE = 1e-2


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

    `difference` is the largest absolute one of the logits over all prompts. `agreeing` of
    `generated` tokens of greedy text are the same, from the first one on.
    """

    library: str
    difference: float
    agreeing: int
    generated: int
    is_text_same: bool

    def is_equal(self, dtype: str) -> bool:
        """Return whether no more than rounding differs, which is large in half precision."""
        return self.is_text_same and (dtype != "fp32" or self.difference <= MAX_DIFFERENCE)

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
    difference = 0.0
    for ids in prompts:
        logits = source.model(ids)[0][0, :, :tokens].numpy()
        theirs = target.compute_logits(ids)[:, :tokens]
        difference = max(difference, float(np.abs(logits - theirs).max()))
    n = min(GREEDY_TOKENS, T - len(start))
    ours = generate_tokens(engine, start, n, SamplingParams(temperature=0))[0, len(start) :]
    same = ours == target.generate(np.asarray(start, dtype=np.int64), n)
    text = tokenizer.decode(prompts.ravel())
    if tokenizer.token_kind == "char":
        text += "".join(tokenizer.chars)
    ids = tokenizer.encode(text).tolist()
    theirs = list(target.encode(text))
    return Comparison(
        library=target.library,
        difference=difference,
        agreeing=n if same.all() else int(np.argmin(same)),
        generated=n,
        is_text_same=theirs == ids and target.decode(theirs) == text,
    )


# ----------------------------------------------------------------------------------------------
# Whether an export still is what its bundle gave


def verify_export(place: Path, bundles: Sequence[Path], runs_dir: Path) -> tuple[list[str], bool]:
    """Compare an export, or a GGUF file, with its record and with the model it was made from.

    That is the one of `bundles` with the weights that the record names, or else the first; without
    any, it is looked for in the run that the record names.

    Returns lines to print, and whether nothing differs. Raises `UserError` if `place` cannot be
    read, or there is neither a record nor a bundle.
    """
    record = read_record(place) if is_present(place / RECORD_FILE) else None
    if record is None and not bundles:
        raise UserError(f"{place}: has no {RECORD_FILE}: name the model to compare it with")
    if record is not None and not bundles:
        run = find_run_by_id(record.run_id, runs_dir)
        bundles = list(filter(None, [run and find_kept_step(run, record.step)]))
    problems = find_changes(place, record) if record else []
    facts = (
        [] if problems or not record else [f"{pluralize(len(record.files), 'file')} as exported"]
    )
    if bundles:
        hashes = {bundle: read_state(bundle).files[WEIGHTS_FILE] for bundle in bundles}
        same = [bundle for bundle in bundles if record and hashes[bundle] == record.weights_sha256]
        bundle = [*same, *bundles][0]
        if record and not same:
            problems.append(f"was made from other weights than those of {bundle}")
        # The graphs of an ONNX file depend on PyTorch's version: their record must do.
        elif record is None or record.format != "onnx":
            problems += find_differences(load_source(bundle), place)
        facts.append(f"the weights of {bundle}")
    else:
        facts.append(f"the model with the weights {record.weights_sha256} was not found")
    lines = [f"{place}: {line}" for line in problems or [", ".join(facts)]]
    return lines, not problems


def find_differences(source: ExportSource, place: Path) -> list[str]:
    """Return one line for each tensor in which a Transformers directory or GGUF file differs.

    The model is exported again, in the dtype of the file, and compared bit for bit.

    Raises `UserError` if `place` is neither, or cannot be read.
    """
    if place.suffix == ".gguf":
        from exporters import gguf as exporter  # late: it needs an optional dependency
    else:
        exporter = huggingface
    try:
        dtype, found = exporter.read_tensors(place)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
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
