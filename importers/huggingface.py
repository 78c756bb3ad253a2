"""Hugging Face: a directory of GPT-2 or Qwen3 that Transformers wrote, if Folio can express it.

The tables of names are the exporter's, so that a model comes back bit for bit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporters.huggingface import ACTIVATIONS, from_transformers, to_transformers
from importers.source import (
    ImportedModel,
    check_dense,
    check_file,
    check_shapes,
    check_vocab_size,
    convert_to_float,
    count_layers,
    create_config,
    create_meta_model,
    get_shapes,
    pad_vocabulary,
    read_json,
    to_float32,
)
from model import get_gated_width
from parameters import ModelConfig
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, list_byte_level_alphabet
from utils.checks import format_name, format_value
from utils.errors import UserError, format_reason
from utils.files import is_present, open_regular

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in the first files of GPT-2
THEIR_ACTIVATIONS = {
    **{theirs: ours for ours, theirs in ACTIVATIONS.items()},
    "gelu_new": "gelu_tanh",
    "swish": "silu",
}
# SHA-256 of GPT-2's 50,257 tokens as vocab.json has them, by their ids, a new line after each.
GPT2_SHA256 = "2d5ce813bdd43a428e2a9ae5e86a22fe1a594a6e7171d84d445ba4101f3a964d"


def read_directory(directory: Path) -> ImportedModel:
    """Read a directory with config.json, safetensors and tokenizer.json. No code in it is run.

    Raises `UserError` that names the field of a model that Folio's architectures cannot express,
    or the file that is missing or damaged.
    """
    path = directory / CONFIG
    theirs = TheirConfig(path, read_json(path))
    theirs.require("auto_map", None, absent=None)  # a model with code of its own
    theirs.require("quantization_config", None, absent=None)
    is_gpt2 = theirs.require("model_type", "gpt2", "qwen3", absent=None) == "gpt2"
    config = create_gpt2_config(theirs) if is_gpt2 else create_qwen3_config(theirs)
    vocab_size = check_vocab_size(path, theirs.get("vocab_size", absent=None))
    tokenizer = read_tokenizer(directory / TOKENIZER, vocab_size)
    files = find_weights(directory)
    path = files[0] if len(files) == 1 else directory / INDEX
    tensors = read_tensors(files)
    if is_gpt2:
        tensors = {
            name if name.startswith(("transformer.", HEAD)) else f"transformer.{name}": tensor
            for name, tensor in tensors.items()
            if not name.endswith(MASKS)
        }
    check_dense(path, tensors)
    embedding = tensors.get("transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight")
    if config.tie_weights and HEAD in tensors:
        head = tensors.pop(HEAD)
        if embedding is None or head.dtype != embedding.dtype or not head.equal(embedding):
            reason = f"{HEAD} in {path.name} differs from the embedding"
            theirs.fail("tie_word_embeddings", True, reason)
    n_layer = count_layers(tensors, r"transformer\.h\." if is_gpt2 else r"model\.layers\.")
    model = create_meta_model(path, config, vocab_size, n_layer)
    check_shapes(path, get_shapes(tensors), get_shapes(to_transformers(model.state_dict(), config)))
    notes: list[str] = []
    tensors = to_float32(path, tensors, notes)
    # GPT-2 always has biases there: they are zeros if the model has none.
    if is_gpt2 and any(tensors[name].any() for name in tensors if name.endswith(".bias")):
        config = config.model_copy(update={"bias": True})
    imported = ImportedModel(
        name=f"{'GPT-2' if is_gpt2 else 'Qwen3'} {directory.absolute().name}",
        weights_sha256=hash_concatenated(files),
        config=config,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        weights=from_transformers(tensors, config),
        notes=notes,
    )
    pad_vocabulary(imported)
    return imported


# ----------------------------------------------------------------------------------------------
# config.json


class TheirConfig:
    """The values of Transformers' `config.json`."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, *, absent: Any) -> Any:
        """Return a value, or the one that Transformers assumes if it is absent."""
        return self.values.get(name, absent)

    def require(self, name: str, *wanted: Any, absent: Any) -> Any:
        """Return a value. Raises `UserError` if it is not one of those that Folio has."""
        value = self.get(name, absent=absent)
        is_bool = isinstance(value, bool)  # in Python, True is 1
        if not any(value == each and isinstance(each, bool) == is_bool for each in wanted):
            self.fail(name, value, f"Folio has {' or '.join(map(format_value, wanted))} only")
        return value

    def fail(self, name: str, value: Any, reason: str) -> None:
        """Raise `UserError` that names a field and its value."""
        raise UserError(f"{self.path}: {name} is {format_value(value)}: {reason}")

    def create_config(self, names: Mapping[str, str], values: Mapping[str, Any]) -> ModelConfig:
        """Create Folio's settings: `values`, and theirs; `names` are Folio's names and theirs."""
        missing = [theirs for theirs in names.values() if theirs not in self.values]
        if missing:
            raise UserError(f"{self.path}: {', '.join(missing)} is missing")
        found = {name: self.values[theirs] for name, theirs in names.items()}
        return create_config(self.path, {**found, **values}, names)


def create_gpt2_config(theirs: TheirConfig) -> ModelConfig:
    """Return the settings of a GPT-2 without biases. Raises `UserError` if it is not Folio's."""
    names = {"n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
    names["block_size"] = "n_positions"
    theirs.require("scale_attn_weights", True, absent=True)
    theirs.require("scale_attn_by_inverse_layer_idx", False, absent=False)
    theirs.require("reorder_and_upcast_attn", False, absent=False)
    theirs.require("add_cross_attention", False, absent=False)
    theirs.require("layer_norm_epsilon", 1e-5, absent=1e-5)
    activation = theirs.require("activation_function", *THEIR_ACTIVATIONS, absent="gelu_new")
    values = {
        "architecture": "gpt2",
        "activation": THEIR_ACTIVATIONS[activation],
        "tie_weights": theirs.require("tie_word_embeddings", True, False, absent=True),
    }
    if "resid_pdrop" in theirs.values:
        names["dropout"] = "resid_pdrop"
    config = theirs.create_config(names, values)
    theirs.require("n_inner", None, 4 * config.n_embd, absent=None)
    return config


def create_qwen3_config(theirs: TheirConfig) -> ModelConfig:
    """Return the settings of a Qwen3. Raises `UserError` if it is not Folio's `modern`."""
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}
    names |= {"n_layer": "num_hidden_layers", "block_size": "max_position_embeddings"}
    theirs.require("rms_norm_eps", 1e-6, absent=1e-6)
    theirs.require("attention_bias", False, absent=False)
    theirs.require("rope_scaling", None, {"rope_type": "default"}, absent=None)
    activation = theirs.require("hidden_act", *THEIR_ACTIVATIONS, absent="silu")
    values = {
        "architecture": "modern",
        "activation": THEIR_ACTIVATIONS[activation],
        "tie_weights": theirs.require("tie_word_embeddings", True, False, absent=False),
        "rope_theta": get_rope_theta(theirs),
    }
    config = theirs.create_config(names, values)
    theirs.require("num_key_value_heads", config.n_head, absent=32)
    theirs.require("head_dim", config.n_embd // config.n_head, absent=128)
    theirs.require("intermediate_size", get_gated_width(config.n_embd), absent=22016)
    if theirs.require("use_sliding_window", True, False, absent=False):
        window = theirs.get("sliding_window", absent=4096)
        if window is not None and not (type(window) is int and window >= config.block_size):
            theirs.fail("sliding_window", window, f"shorter than {names['block_size']}")
    return config


def get_rope_theta(theirs: TheirConfig) -> float:
    """Return the base of the rotary embeddings: version 5 of Transformers has it in a group.

    Raises `UserError` if they are scaled.
    """
    theta = theirs.get("rope_theta", absent=10_000.0)
    parameters = theirs.get("rope_parameters", absent=None)
    if parameters is not None:
        is_plain = isinstance(parameters, dict) and parameters.get("rope_type") == "default"
        if not is_plain or parameters.keys() - {"rope_type", "rope_theta"}:
            theirs.fail("rope_parameters", parameters, "Folio does not scale positions")
        theta = parameters.get("rope_theta", theta)
    return convert_to_float(theta)


# ----------------------------------------------------------------------------------------------
# The weights


def find_weights(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory, one or several.

    Raises `UserError` if there is none, or if the index names a file elsewhere.
    """
    if is_present(directory / WEIGHTS):
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not is_present(index):
        if is_present(directory / "pytorch_model.bin"):
            raise UserError(
                f"{directory}: pytorch_model.bin is a pickle, which could run any code: convert it "
                f"to {WEIGHTS} with Transformers' save_pretrained, if you trust its origin"
            )
        raise UserError(f"{directory}: has no {WEIGHTS}")
    places = read_json(index).get("weight_map")
    names = [*places.values()] if isinstance(places, dict) and places else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise UserError(f"{index}: {format_value(name)} is no file of this directory")
    return [directory / name for name in sorted(set(names))]


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files, memory-mapped.

    Raises `UserError` if one is damaged, or if two have a tensor of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: not safetensors: {format_reason(error)}") from None
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{path}: {format_name(twice[0])} is in another file too")
        tensors |= found
    return tensors


def hash_concatenated(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open_regular(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------
# The tokenizer


def read_tokenizer(path: Path, vocab_size: int) -> dict[str, Any]:
    """Return the state of the tokenizer in a `tokenizer.json`: of characters, GPT-2's, or a BPE.

    Raises `UserError` if it is another one, or has another number of tokens than the model.
    """
    values = read_json(path)
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = values.get("added_tokens") or []
    try:
        if model["type"] != "BPE":
            raise UserError(f"{path}: a tokenizer of the type {format_value(model['type'])}")
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if any(type(number) is not int for number in ids.values()):
            raise ValueError("an id is no number")
        tokens = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("its ids are not 0, 1, 2 and so on")
        for token in [*tokens, *(part for merge in merges for part in merge)]:
            token.encode("utf-8")  # no number, and no lone surrogate
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer of Folio's: {format_reason(error)}") from None
    changes = {name: values.get(name) for name in ("normalizer", "truncation", "padding")}
    processor = values.get("post_processor")
    if not (isinstance(processor, dict) and processor.get("type") == "ByteLevel"):  # moves offsets
        changes["post_processor"] = processor
    names = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    changes |= {name: model.get(name) for name in names}
    for name, value in changes.items():
        if value:
            raise UserError(f"{path}: {name} is {format_value(value)}: Folio has none")
    splitter = values.get("pre_tokenizer")
    if not merges and not added and splitter is None and all(len(token) == 1 for token in tokens):
        state = {"token_kind": CharTokenizer.token_kind, "chars": tokens}
    elif is_byte_level(splitter):
        state = read_byte_level(path, tokens, merges)
    else:
        raise UserError(f"{path}: neither characters nor a byte-level BPE")
    sizes = {len(tokens)}
    if state["token_kind"] == GPT2Tokenizer.token_kind:
        sizes.add(GPT2Tokenizer.vocab_size)  # with rows of padding
    if vocab_size not in sizes:
        raise UserError(f"{path}: {len(tokens)} tokens, where {CONFIG} has vocab_size {vocab_size}")
    return state


def is_byte_level(splitter: object) -> bool:
    """Return whether a tokenizer splits text as GPT-2's does, and maps bytes to characters."""
    is_split = isinstance(splitter, dict) and splitter.get("type") == "ByteLevel"
    return is_split and not splitter.get("add_prefix_space") and splitter.get("use_regex", True)


def read_byte_level(path: Path, tokens: Sequence[str], merges: Sequence[tuple]) -> dict[str, Any]:
    """Return the state of the tokenizer of a byte-level BPE. Raises `UserError` if it is unknown.

    Ids by rank: after the 256 bytes, each token is the result of a merge, in the merges' order.
    """
    digest = hashlib.sha256("".join(f"{token}\n" for token in tokens).encode()).hexdigest()
    merged = ["".join(merge) for merge in merges]
    if digest == GPT2_SHA256 and merged == list(tokens[256:-1]):
        return {"token_kind": GPT2Tokenizer.token_kind}
    if list(tokens[:256]) != list_byte_level_alphabet() or merged != list(tokens[256:]):
        raise UserError(
            f"{path}: a byte-level BPE of {len(tokens):,} tokens, neither GPT-2's nor one that "
            "export.py wrote, which has the 256 bytes and then a token for each merge"
        )
    ids = {token: number for number, token in enumerate(tokens)}
    try:
        pairs = [[ids[part] for part in merge] for merge in merges]
        return BPETokenizer(pairs).get_state()
    except KeyError as error:
        raise UserError(f"{path}: not a BPE: {format_reason(error)} is no token") from None
    except UserError as error:
        raise UserError(f"{path}: {format_reason(error)}") from None
