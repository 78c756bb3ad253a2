"""Hugging Face: a directory that Transformers loads without custom code.

`modern` is Qwen3ForCausalLM there, `gpt2` is GPT2LMHeadModel. import_model.py reads such
directories by the same tables.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model import get_gated_width
from parameters import ModelConfig

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
# Qwen3 has three matrices for the three parts of Folio's.
QKV, QKV_PARTS = "blocks.{}.attention.qkv", "model.layers.{}.self_attn.{}_proj"
# GPT-2's matrices of attention and MLP are transposed there (Transformers' Conv1D).
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
WITHOUT_BIAS = ("token_embedding", "position_embedding", "head")  # in GPT-2
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def list_names(config: ModelConfig) -> dict[str, str]:
    """Return Folio's names of the modules of this shape, and those of Transformers."""
    names = QWEN3_NAMES if config.architecture == "modern" else GPT2_NAMES
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
