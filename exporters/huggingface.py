"""Hugging Face: a directory that Transformers loads without custom code.

`modern` is Qwen3ForCausalLM there, `gpt2` is GPT2LMHeadModel; `speedrun` is refused.
import_model.py reads such directories by the same tables.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from bundle import WEIGHTS_FILE
from exporters.bpe import list_bpe
from exporters.source import ExportSource
from model import get_gated_width
from parameters import ModelConfig
from tokenizer import Tokenizer
from utils.files import read_regular, write_durable

if TYPE_CHECKING:
    import tokenizers


TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Folio's names of modules, and theirs. `{}` is the number of the block.
QWEN3_NAMES = {
    "token_embedding": "model.embed_tokens",
    "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attention.queries_and_keys.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attention.queries_and_keys.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attention.projection": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.expand": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.projection": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
GPT2_NAMES = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.projection": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.expand": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.projection": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
NAMES = {"modern": QWEN3_NAMES, "gpt2": GPT2_NAMES}
# Qwen3 has three matrices for the three parts of Folio's.
QKV, QKV_PARTS = "blocks.{}.attention.qkv", "model.layers.{}.self_attn.{}_proj"
# GPT-2's matrices of attention and MLP are transposed there (Transformers' Conv1D).
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
WITHOUT_BIAS = ("token_embedding", "position_embedding", "head")  # in GPT-2
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def list_names(config: ModelConfig) -> dict[str, str]:
    """Return Folio's names of the modules of this shape, and those of Transformers."""
    names = NAMES[config.architecture]
    if config.tie_weights:
        names = {name: theirs for name, theirs in names.items() if name != "head"}
    return {
        name.format(layer): theirs.format(layer)
        for name, theirs in names.items()
        for layer in range(config.n_layer if "{}" in name else 1)
    }


def is_transposed(name: str) -> bool:
    """Return whether Transformers' matrix of this module is the transpose of Folio's."""
    return name.endswith(TRANSPOSED)


def to_transformers(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return Folio's tensors under the names and in the shapes of Transformers' model.

    GPT-2 there always has biases: they are zeros if `config.bias` is false.
    """
    tensors = {}
    for name, theirs in list_names(config).items():
        weight = weights[f"{name}.weight"]
        tensors[f"{theirs}.weight"] = weight.T if is_transposed(theirs) else weight
        if config.architecture == "gpt2" and name not in WITHOUT_BIAS:
            zeros = torch.zeros(weight.size(0), dtype=weight.dtype)
            tensors[f"{theirs}.bias"] = weights.get(f"{name}.bias", zeros)
    if config.architecture == "modern":
        for layer in range(config.n_layer):
            parts = weights[f"{QKV.format(layer)}.weight"].chunk(3)
            for part, weight in zip("qkv", parts, strict=True):
                tensors[f"{QKV_PARTS.format(layer, part)}.weight"] = weight
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_transformers(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of Transformers' model under Folio's names, in Folio's shapes.

    The inverse of `to_transformers`. Raises KeyError for a tensor that is missing.
    """
    weights = {}
    for name, theirs in list_names(config).items():
        weight = tensors[f"{theirs}.weight"]
        weights[f"{name}.weight"] = weight.T if is_transposed(theirs) else weight
        if config.bias and name not in WITHOUT_BIAS:
            weights[f"{name}.bias"] = tensors[f"{theirs}.bias"]
    if config.architecture == "modern":
        for layer in range(config.n_layer):
            parts = [tensors[f"{QKV_PARTS.format(layer, part)}.weight"] for part in "qkv"]
            weights[f"{QKV.format(layer)}.weight"] = torch.cat(parts)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def create_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return the content of Transformers' `config.json`."""
    shared = {
        "tie_word_embeddings": config.tie_weights,
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    activation = ACTIVATIONS[config.activation]
    if config.architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": None,
            "activation_function": activation,
            "layer_norm_epsilon": 1e-5,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            **shared,
        }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "intermediate_size": get_gated_width(config.n_embd),
        "hidden_act": activation,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,  # read by version 4
        "rope_parameters": rope,  # read by version 5
        # Beyond the context, each token attends to the last block_size tokens: without this, the
        # positions exceed those of training and the text falls apart.
        "use_sliding_window": True,
        "sliding_window": config.block_size,
        "max_window_layers": 0,
        **shared,
    }


# ----------------------------------------------------------------------------------------------
# Tokenizer


def create_tokenizer(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """Return the same tokenizer as one of the `tokenizers` library.

    A character tokenizer is a BPE without merges there. It leaves out characters that the
    vocabulary lacks.
    """
    import tokenizers  # late: an optional dependency
    from tokenizers import decoders, models, pre_tokenizers

    if tokenizer.token_kind == "char":
        vocabulary = {char: number for number, char in enumerate(tokenizer.chars)}
        theirs = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        theirs.decoder = decoders.Fuse()
        return theirs
    if tokenizer.token_kind == "bpe":
        return tokenizer.encoder
    tokens, merges = list_bpe(tokenizer)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    return theirs


# ----------------------------------------------------------------------------------------------
# The export


def check(source: ExportSource, dtype: str) -> None:
    """Raise `UserError` if no model there has these parts, or a weight overflows in the dtype."""
    source.check_portable()
    source.check_range(TORCH_DTYPES[dtype])


def write(source: ExportSource, directory: Path, dtype: str, name: str) -> None:
    """Write the weights, the configuration and the tokenizer into an empty directory."""
    content = save(create_tensors(source, dtype), metadata={"format": "pt"})
    write_durable(directory / WEIGHTS_FILE, content)
    content = create_config(source.config, source.bundle.vocab_size)
    content["dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    write_json(directory / "config.json", content)
    padding = range(source.tokenizer.num_tokens, source.bundle.vocab_size)
    if padding:  # ids that stand for no text
        write_json(directory / "generation_config.json", {"suppress_tokens": list(padding)})
    write_tokenizer(directory / "tokenizer.json", source.tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.block_size,
        "padding_side": "left",
    }
    write_json(directory / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, indented."""
    write_durable(path, (json.dumps(content, indent=2) + "\n").encode("utf-8"))


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer in the format of the `tokenizers` library."""
    write_durable(path, create_tokenizer(tokenizer).to_str(pretty=True).encode("utf-8"))


def create_tensors(source: ExportSource, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of the export by name."""
    tensors = to_transformers(source.weights, source.config)
    return {name: tensor.to(TORCH_DTYPES[dtype]) for name, tensor in tensors.items()}


def read_tensors(directory: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the dtype and the tensors of an export or of any directory of Transformers.

    Raises OSError, ValueError or SafetensorError if it has none that an export could have.
    """
    tensors = load(read_regular(find_file(directory)))
    kind = next(iter(tensors.values())).dtype if tensors else None
    for dtype, each in TORCH_DTYPES.items():
        if each == kind:
            return dtype, tensors
    raise ValueError(f"its tensors are {kind or 'missing'}")


def find_file(directory: Path) -> Path:
    """Return the file of the weights."""
    return directory / WEIGHTS_FILE


def open_export(directory: Path) -> "TransformersModel":
    """Load an export by Transformers. Raises ImportError if it is not installed."""
    return TransformersModel(directory)


class TransformersModel:
    """An export, loaded by Transformers: see `exporters.verify.TargetModel`."""

    def __init__(self, directory: Path):
        import transformers  # late: an optional dependency

        self.library = f"transformers {transformers.__version__}"
        place = {"pretrained_model_name_or_path": str(directory), "local_files_only": True}
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(**place).float().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)

    @torch.no_grad()
    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, V)` of a text, `(T,)`."""
        return self.model(torch.tensor(ids[None])).logits[0].numpy()

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, one after another, `(n,)`."""
        prompt = torch.tensor(ids[None])
        options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        return self.model.generate(prompt, attention_mask=mask, **options)[0, len(ids) :].numpy()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer(text, verbose=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        """Do nothing: the memory is Python's."""
