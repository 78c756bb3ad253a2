"""nanoGPT (github.com/karpathy/nanoGPT): its `ckpt.pt`, and the `meta.pkl` of its characters.

Folio's `gpt2` architecture computes the same logits, bit for bit.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.huggingface import WITHOUT_BIAS, list_names
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
    to_float32,
)
from parameters import MAX_COUNT, NAME_PATTERN
from tokenizer import CharTokenizer, GPT2Tokenizer
from utils.checks import format_value
from utils.errors import UserError
from utils.files import hash_file, is_file, open_regular
from utils.pickles import MAX_PICKLE_BYTES, load_plain_pickle, load_tensors

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")  # the same names as Folio's
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
GPT2_SIZES = (GPT2Tokenizer.num_tokens, GPT2Tokenizer.vocab_size)


def read_checkpoint(path: Path, meta: Path | None = None) -> ImportedModel:
    """Read nanoGPT's `ckpt.pt`, and its characters from `meta`, else from where nanoGPT has them.

    Raises `UserError` if a file is missing, damaged or no file of nanoGPT.
    """
    check_file(path)
    try:
        saved = load_tensors(path)
    except ValueError as error:
        raise UserError(f"{path}: not a checkpoint of nanoGPT: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    parts = saved if isinstance(saved, Mapping) else {}
    arguments, tensors = parts.get("model_args"), parts.get("model")
    if not isinstance(arguments, Mapping) or not isinstance(tensors, Mapping):
        raise UserError(f"{path}: not a checkpoint of nanoGPT: it has no model and model_args")
    if not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items()):
        raise UserError(f"{path}: not a checkpoint of nanoGPT: model is no state dict")
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".attn.bias")}  # causal mask
    check_dense(path, tensors)
    config, vocab_size = _create_config(path, arguments, is_tied=_is_tied(tensors))
    if config.tie_weights:
        tensors.pop(HEAD, None)
    n_layer = count_layers(tensors, r"transformer\.h\.")
    model = create_meta_model(path, config, vocab_size, n_layer).state_dict()
    names = {f"{theirs}.weight": f"{name}.weight" for name, theirs in list_names(config).items()}
    if config.bias:
        names |= {
            f"{theirs}.bias": f"{name}.bias"
            for name, theirs in list_names(config).items()
            if name not in WITHOUT_BIAS
        }
    expected = {theirs: tuple(model[name].shape) for theirs, name in names.items()}
    check_shapes(path, get_shapes(tensors), expected)
    tokenizer = _read_tokenizer(path, meta, parts.get("config"), vocab_size)
    notes: list[str] = []
    weights = to_float32(path, tensors, notes)
    imported = ImportedModel(
        name=f"nanoGPT {path.name}",
        weights_sha256=hash_file(path),
        config=config,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        weights={name: weights[theirs] for theirs, name in names.items()},
        step=_get_step(parts.get("iter_num")),
        notes=notes,
    )
    pad_vocabulary(imported)
    return imported


def _create_config(path: Path, arguments: Mapping[str, Any], is_tied: bool) -> tuple[Any, int]:
    """Return the settings and the vocabulary size that `model_args` claims."""
    missing = [name for name in (*SHAPE, "vocab_size") if name not in arguments]
    if missing:
        raise UserError(f"{path}: model_args has no {', '.join(missing)}")
    values = {name: arguments[name] for name in SHAPE}
    dropout = arguments.get("dropout", 0.0)
    values["dropout"] = convert_to_float(dropout)
    values |= {"architecture": "gpt2", "tie_weights": is_tied, "activation": "gelu"}
    names = {name: f"model_args: {name}" for name in values}
    config = create_config(path, values, names)
    return config, check_vocab_size(path, arguments["vocab_size"])


def _is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the LM head is the embedding, as in nanoGPT itself."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return True
    return head.dtype == embedding.dtype and head.equal(embedding)


def _get_step(iter_num: object) -> int:
    return iter_num if type(iter_num) is int and 0 <= iter_num <= MAX_COUNT else 0


def _read_tokenizer(
    path: Path, meta: Path | None, config: object, vocab_size: int
) -> dict[str, Any]:
    """Return the state of the tokenizer that a checkpoint was trained with.

    nanoGPT's `data/NAME/prepare.py` writes `meta.pkl` beside the tokens if these are characters.
    """
    dataset = config.get("dataset") if isinstance(config, Mapping) else None
    places = [path.parent / "meta.pkl"]
    if isinstance(dataset, str) and re.fullmatch(NAME_PATTERN, dataset):  # no path of a stranger
        places.append(path.absolute().parent.parent / "data" / dataset / "meta.pkl")
    found = meta or next(filter(is_file, places), None)
    if found is not None:
        chars = read_meta(found)
        if len(chars) != vocab_size:
            raise UserError(
                f"{found}: {len(chars)} characters, and {path} has a vocabulary of {vocab_size}: "
                "name the meta.pkl of its data with --meta"
            )
        return {"token_kind": "char", "chars": chars}
    if vocab_size in GPT2_SIZES:
        return {"token_kind": "gpt2"}
    raise UserError(
        f"{path}: a vocabulary of {vocab_size} is not GPT-2's, and there is no "
        f"{' or '.join(map(str, places))}: name nanoGPT's meta.pkl, which has the characters, with "
        "--meta"
    )


def read_meta(path: Path) -> list[str]:
    """Return the characters in nanoGPT's `meta.pkl` in the order of their ids.

    Raises `UserError` if it is not valid, or if it has anything but text, numbers and dictionaries.
    """
    check_file(path)
    with open_regular(path) as file:
        content = file.read(MAX_PICKLE_BYTES + 1)
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise ValueError(f"it is larger than {MAX_PICKLE_BYTES:,} bytes")
        meta = load_plain_pickle(content)
        chars = meta.get("itos") if isinstance(meta, dict) else None
        if not isinstance(chars, dict) or not chars:
            raise ValueError("it has no itos, a dictionary of characters")
        ids = range(len(chars))
        if any(type(number) is not int for number in chars) or sorted(chars) != list(ids):
            raise ValueError("the ids of itos are not 0, 1, 2 and so on")
        chars = [chars[number] for number in ids]
        wrong = [char for char in chars if not isinstance(char, str) or len(char) != 1]
        if wrong:
            raise ValueError(f"itos has {format_value(wrong[0])}, not only single characters")
        "".join(chars).encode("utf-8")  # raises for a lone surrogate, which no file can hold
        if meta.get("stoi", None) not in (
            None,
            {char: number for number, char in enumerate(chars)},
        ):
            raise ValueError("stoi is not the inverse of itos")
        return CharTokenizer(chars).chars
    except ValueError as error:  # UserError is one too: a character that repeats
        raise UserError(f"{path}: not a meta.pkl of nanoGPT: {error}") from None
