"""ONNX: two graphs that ONNX Runtime runs without PyTorch.

    model.onnx      input_ids (B, T) -> logits (B, T, V); any B, T up to block_size
    decoder.onnx    input_ids (B, t) and the keys and values of P tokens before it, each
                    (B, H, P, D) -> the logits (B, V) of the next token, and keys and values of
                    P + t tokens; P is 0 at first, P + t at most block_size

The decoder of architecture speedrun takes previous_ids, too: the ids (B, 3) of the
three tokens before input_ids, for its n-gram embeddings, -1 where there is none.

Their metadata has the vocabulary and the settings.
"""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from exporters import huggingface
from exporters.source import ExportSource
from model import LanguageModel
from parameters import NGRAM_REACH
from utils.errors import UserError
from utils.files import write_durable
from utils.output import format_bytes

if TYPE_CHECKING:
    import onnx

OPSET = 20
MAX_BYTES = 2_000_000_000  # an ONNX file is one message of Protocol Buffers, which end at 2 GiB


class OnnxLayerCache:
    """One layer's keys and values, each `(B, H, P, D)`: see `model.LayerCache`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Append keys and values, then attend to all."""
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        is_future = torch.arange(self.keys.size(2)) > positions[:, None]  # (t, P + t)
        mask = torch.zeros(is_future.shape).masked_fill(is_future, -math.inf)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)


class OnnxCache:
    """The keys and values of all layers, and `previous_ids`: see `model.KVCache`."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]], previous_ids: Tensor | None):
        self.layers = [OnnxLayerCache(*pair) for pair in past]
        self.previous_ids = previous_ids

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Return `idx`, `(B, t)`, after the tokens before, as `NgramEmbedding` reads them."""
        return torch.cat((self.previous_ids, idx), dim=1) + 1

    def get_layers(self, positions: Tensor) -> list[OnnxLayerCache]:
        """Return each layer's part."""
        return self.layers


class WholeSequence(nn.Module):
    """The graph of `model.onnx`."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits `(B, T, V)`."""
        return self.model(input_ids)[0]


class DecodeStep(nn.Module):
    """The graph of `decoder.onnx`."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        previous_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the next token's logits `(B, V)`, and each layer's keys and values."""
        cache, P = OnnxCache(past, previous_ids), past[0][0].size(2)
        positions = torch.arange(P, P + input_ids.size(1))
        logits = self.model.compute_next_logits(input_ids, positions, cache)
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def check(source: ExportSource, dtype: str) -> None:
    """Raise `UserError` if the weights do not fit into one ONNX file."""
    size = 4 * source.model.count_parameters()
    if size > MAX_BYTES:
        is_speedrun = source.config.architecture == "speedrun"
        remedy = "choose a smaller model" if is_speedrun else "export it with --format hf or gguf"
        raise UserError(
            f"{source.bundle.path}: its weights take {format_bytes(size)}, and an ONNX file holds "
            f"{format_bytes(MAX_BYTES)}: {remedy}"
        )


def write(source: ExportSource, directory: Path, dtype: str, name: str) -> None:
    """Write both graphs and the tokenizer into an empty directory."""
    config, model = source.config, source.model
    D = config.n_embd // config.n_head
    ids = torch.zeros((2, 3), dtype=torch.int64)  # any size of 2 or more: it is only an example
    batch, length = Dim("batch"), Dim("length", max=config.block_size)
    sizes = {0: batch, 1: length}
    whole = trace(WholeSequence(model), (ids,), (sizes,), ["input_ids"], ["logits"])
    shape = (2, config.n_head, 4, D)  # different tensors, as the same one would be one input
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.n_layer)]
    example = [ids, past]
    sizes = [{0: batch, 1: Dim("new")}, [({0: batch, 2: Dim("past")},) * 2] * config.n_layer]
    inputs, outputs = (list_cache_names(kind, config.n_layer) for kind in ("past", "present"))
    inputs = ["input_ids", *inputs]
    if config.architecture == "speedrun":
        example.append(torch.full((2, NGRAM_REACH), -1))
        sizes.append({0: batch})
        inputs.append("previous_ids")
    step = trace(DecodeStep(model), tuple(example), tuple(sizes), inputs, ["logits", *outputs])
    metadata = create_metadata(source)
    for file, graph in (("model.onnx", whole), ("decoder.onnx", step)):
        save(graph, directory / file, metadata)
    huggingface.write_tokenizer(directory / "tokenizer.json", source.tokenizer)


def list_cache_names(kind: str, n_layer: int) -> list[str]:
    """Return `past.0.key`, `past.0.value`, `past.1.key` …, or the same with `present`."""
    return [f"{kind}.{layer}.{part}" for layer in range(n_layer) for part in ("key", "value")]


def trace(
    module: nn.Module, inputs: tuple, sizes: tuple, input_names: list[str], output_names: list[str]
) -> "onnx.ModelProto":
    """Return the graph of a module, traced by PyTorch. `sizes` are the dimensions that vary."""
    options = {"input_names": input_names, "output_names": output_names, "dynamic_shapes": sizes}
    with hide_exporter_warnings():
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, opset_version=OPSET, verbose=False, **options
        )
    return program.model_proto


@contextlib.contextmanager
def hide_exporter_warnings() -> Iterator[None]:
    """Hide warnings about operators that no model here has, and about the exporter itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def create_metadata(source: ExportSource) -> dict[str, str]:
    """Return the metadata of both models."""
    config, tokenizer, state = source.config, source.tokenizer, source.bundle.state
    settings = {
        "architecture": config.architecture,
        "block_size": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "head_size": config.n_embd // config.n_head,
        "vocab_size": source.bundle.vocab_size,
        "num_tokens": tokenizer.num_tokens,  # ids above stand for no text
    }
    vocabulary = huggingface.create_tokenizer(tokenizer).get_vocab()
    return {
        "settings": json.dumps(settings),
        "vocabulary": json.dumps(sorted(vocabulary, key=vocabulary.get), ensure_ascii=False),
        "folio.weights_sha256": source.weights_sha256,
        "folio.run_id": str(state.run_id),
        "folio.step": str(state.step),
    }


def save(graph: "onnx.ModelProto", path: Path, metadata: dict[str, str]) -> None:
    """Write a model, without the exporter's notes, which have paths of this machine."""
    import onnx  # late: an optional dependency

    del graph.metadata_props[:], graph.graph.metadata_props[:]
    parts = [*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output]
    for part in [*parts, *graph.graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    write_durable(path, graph.SerializeToString(deterministic=True))


# ----------------------------------------------------------------------------------------------
# ONNX Runtime


def open_export(directory: Path) -> "OnnxModel":
    """Load an export by ONNX Runtime. Raises ImportError if it is not installed."""
    return OnnxModel(directory)


class OnnxModel:
    """An export, loaded by ONNX Runtime: see `exporters.verify.TargetModel`."""

    def __init__(self, directory: Path):
        import onnxruntime  # late, as is tokenizers: optional dependencies
        import tokenizers

        self.library = f"onnxruntime {onnxruntime.__version__}"
        self.whole = onnxruntime.InferenceSession(directory / "model.onnx")
        self.decoder = onnxruntime.InferenceSession(directory / "decoder.onnx")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        metadata = self.whole.get_modelmeta().custom_metadata_map
        self.settings = json.loads(metadata["settings"])

    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, V)` of a text, `(T,)`, by `model.onnx`."""
        return self.whole.run(["logits"], {"input_ids": ids[None]})[0][0]

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, `(n,)`, by `decoder.onnx`."""
        settings, new, generated = self.settings, ids[None], []
        empty = np.zeros((1, settings["n_head"], 0, settings["head_size"]), dtype=np.float32)
        cache = [empty] * (2 * settings["n_layer"])
        names = list_cache_names("past", settings["n_layer"])
        previous = np.full((1, NGRAM_REACH), -1, dtype=np.int64)
        while len(generated) < n:
            inputs = {"input_ids": new, **dict(zip(names, cache, strict=True))}
            if settings["architecture"] == "speedrun":
                inputs["previous_ids"] = previous
            logits, *cache = self.decoder.run(None, inputs)
            generated.append(int(logits[0, : settings["num_tokens"]].argmax()))
            previous = np.concatenate((previous, new), axis=1)[:, -NGRAM_REACH:]
            new = np.array([generated[-1:]], dtype=np.int64)
        return np.array(generated, dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        return self.tokenizer.decode(ids)

    def close(self) -> None:
        """Do nothing: the memory is Python's."""
