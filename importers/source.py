"""The model that is imported, and the checks that every importer shares.

A file of another program is data from a stranger: each size that it claims is compared with the
tensors that it has before anything of that size is allocated.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from bundle import MAX_JSON_BYTES
from model import LanguageModel
from parameters import MAX_COUNT, ModelConfig
from tokenizer import GPT2Tokenizer
from utils.checks import format_name, format_value, validate_values
from utils.errors import UserError, format_reason
from utils.files import find_text_file_problem, open_regular
from utils.memory import check_memory

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class ImportedModel:
    """A model of another program, in Folio's terms.

    Attributes:
        name: the program and the name of the file, such as `nanoGPT ckpt.pt`.
        weights_sha256: SHA-256 of that file.
        config: only the settings of the architecture are not the defaults.
        vocab_size: V, the number of rows of the embedding.
        tokenizer: the state that `restore_tokenizer` takes.
        weights: float32 tensors by Folio's names, on the CPU.
        step: the step that the other program recorded, or 0.
        notes: lines for the user.
    """

    name: str
    weights_sha256: str
    config: ModelConfig
    vocab_size: int
    tokenizer: dict[str, Any]
    weights: dict[str, Tensor]
    step: int = 0
    notes: list[str] = field(default_factory=list)

    def save_weights(self, path: Path) -> None:
        """Write the weights as a bundle's `model.safetensors`."""
        with torch.device("meta"):
            model = LanguageModel(self.config, self.vocab_size)
        metadata = {"step": "0", "run_id": "None"}
        model.save_safetensors(path, metadata, self.weights)


def check_file(path: Path) -> None:
    """Raise `UserError` if `path` cannot be read as a regular file."""
    if problem := find_text_file_problem(path):
        raise UserError(f"{path}: {problem}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises `UserError` if it is not valid or too large."""
    check_file(path)
    with open_regular(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {format_reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def create_config(path: Path, values: Mapping[str, Any], names: Mapping[str, str]) -> ModelConfig:
    """Create the settings of the architecture from those of the file `path`.

    `names` are the file's own names of settings that it calls otherwise. Raises `UserError` with
    a line for each value that is not valid.
    """
    _, problems = validate_values(
        ModelConfig, values, label=lambda name: f"{path}: {names.get(name, name)}"
    )
    if problems:
        raise UserError(*problems)
    try:
        return ModelConfig(**values)
    except ValidationError as error:  # settings that do not fit together
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {reason}") from None


def convert_to_float(value: Any) -> Any:
    """Return an integer below 2^53 as a float, exactly; other values unchanged."""
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def check_vocab_size(path: Path, vocab_size: object) -> int:
    """Return the number of rows of the embedding. Raises `UserError` if it is no such number."""
    if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_COUNT:
        raise UserError(
            f"{path}: vocab_size must be a whole number from 1 to {MAX_COUNT:,}, not "
            f"{format_value(vocab_size)}"
        )
    return vocab_size


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Return the number of different N in names that begin with `prefix` and N."""
    return len({match[1] for match in map(re.compile(rf"{prefix}(\d+)\.").match, names) if match})


def create_meta_model(
    path: Path, config: ModelConfig, vocab_size: int, n_layer: int
) -> LanguageModel:
    """Create the model without memory for its tensors; `n_layer` is the number that a file has.

    Raises `UserError` if that is another number, or if the model cannot fit into memory.
    """
    if config.n_layer != n_layer:
        raise UserError(f"{path}: has {n_layer} layers, and n_layer is {config.n_layer}")
    check_memory(config, vocab_size, None)
    with torch.device("meta"):
        return LanguageModel(config, vocab_size)


def get_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(path: Path, found: Shapes, expected: Shapes) -> None:
    """Raise `UserError` if a tensor is missing, has another shape, or is not known."""
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{path}: the tensor {name} is missing")
        if found[name] != shape:
            raise UserError(f"{path}: {name} has the shape {found[name]}, not {shape}")
    if unknown := sorted(found.keys() - expected.keys()):
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise UserError(f"{path}: Folio's architectures have no {format_name(unknown[0])}{more}")


def check_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a tensor that is not floating-point, with memory for all its values.

    Before any is read: a view may claim a size that its file does not have.
    """
    for name, tensor in tensors.items():
        is_plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if not is_plain or not tensor.is_contiguous():
            raise UserError(f"{path}: {format_name(name)} is not a dense, contiguous tensor")
        if tensor.dtype not in FLOATS:
            dtype = _format_dtype(tensor)
            raise UserError(f"{path}: {format_name(name)} is {dtype}, and Folio's are float32")


def to_float32(path: Path, tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors in float32, and append a note if they were of another type.

    Raises `UserError` for a value that is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has values that are NaN or infinite")
    if others := sorted({_format_dtype(tensor) for tensor in tensors.values()} - {"float32"}):
        notes.append(f"{' and '.join(others)} weights become float32, without loss")
    # Copies: the file is memory-mapped, and two of its tensors may share their memory.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def _format_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def pad_vocabulary(model: ImportedModel) -> None:
    """Add rows to GPT-2's 50,257, as Folio's tokenizer of that vocabulary has 50,304.

    Each is the mean of the others. Its logit is thus their mean, and as the exponential is convex,
    the 47 together take at most 47/50257 of the probability, in practice far less.
    """
    if model.tokenizer["token_kind"] != "gpt2" or model.vocab_size != GPT2Tokenizer.num_tokens:
        return
    model.vocab_size = GPT2Tokenizer.vocab_size
    missing = GPT2Tokenizer.vocab_size - GPT2Tokenizer.num_tokens
    for name in {"token_embedding.weight", "head.weight"} & model.weights.keys():
        rows = model.weights[name]  # (V, C)
        mean = rows.mean(dim=0, keepdim=True, dtype=torch.float64).float()
        model.weights[name] = torch.cat((rows, mean.expand(missing, -1)))
    model.notes.append(f"{missing} rows of padding are added to GPT-2's vocabulary")
