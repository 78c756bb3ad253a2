"""GGUF: one file for llama.cpp, and the programs built on it, such as Ollama and LM Studio.

`modern` is a `qwen3` there, `gpt2` a `gpt2`; `speedrun` is refused. The format is that of
github.com/ggml-org/ggml, docs/gguf.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from gguf.quants import quantize
from torch import Tensor

from exporters.bpe import list_bpe
from exporters.huggingface import TORCH_DTYPES, is_transposed, to_transformers
from exporters.source import ExportSource
from model import get_gated_width
from tokenizer import CharTokenizer, Tokenizer
from utils.errors import UserError
from utils.files import find_only_file, sync

if TYPE_CHECKING:
    from exporters.llamacpp import LlamaModel

GGUF_DTYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
    torch.uint8: GGMLQuantizationType.Q8_0,  # the bytes of its blocks
}
FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "fp16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
SUFFIXES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
ARCHITECTURES = {"modern": "qwen3", "gpt2": "gpt2"}
ACTIVATIONS = {"modern": "silu", "gpt2": "gelu"}  # the only ones of these architectures there
Q8_0_BLOCK = 32  # numbers that share a scale: a row is a multiple of it, or stays in float16
CONTEXT_STEP = 256  # llama.cpp rounds the context up to a multiple of it
END = "<|endoftext|>"
PROBES = 256  # tokens that are tried as a context, to find a token that is rare


def check(source: ExportSource, dtype: str) -> None:
    """Raise `UserError` if llama.cpp's architectures cannot express the model, or run it."""
    source.check_portable()
    config, path = source.config, source.bundle.path
    architecture, wanted = ARCHITECTURES[config.architecture], ACTIVATIONS[config.architecture]
    if not config.activation.startswith(wanted):  # gelu_tanh, too
        raise UserError(
            f"{path}: activation is {config.activation}, and llama.cpp's {architecture} has "
            f"{wanted} only: use --format hf or onnx"
        )
    if config.architecture == "gpt2" and config.block_size % CONTEXT_STEP:
        raise UserError(
            f"{path}: block_size is {config.block_size}: llama.cpp rounds the context up to a "
            f"multiple of {CONTEXT_STEP}, and is aborted at the first position that gpt2 has no "
            "embedding for: use --format hf or onnx"
        )
    if dtype in ("fp16", "q8_0"):
        source.check_range(torch.float16)


def write(source: ExportSource, directory: Path, dtype: str, name: str) -> list[Path]:
    """Write the file into an empty directory, and return its path. Same bytes each time."""
    path = directory / f"{name}-{SUFFIXES[dtype]}.gguf"
    config = source.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.architecture])
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("folio.weights_sha256", source.weights_sha256)
    writer.add_string("folio.run_id", str(source.bundle.state.run_id))
    writer.add_uint32("folio.step", source.bundle.state.step)
    writer.add_uint32("folio.num_tokens", source.tokenizer.num_tokens)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_head_count(config.n_head)
    if config.architecture == "modern":
        writer.add_feed_forward_length(get_gated_width(config.n_embd))
        writer.add_head_count_kv(config.n_head)
        writer.add_key_length(config.n_embd // config.n_head)
        writer.add_value_length(config.n_embd // config.n_head)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(1e-6)
    else:
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(1e-5)
    add_tokenizer(writer, source.tokenizer)
    for each, tensor in create_tensors(source, dtype).items():
        # numpy has no bfloat16: its bytes are written.
        data = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        writer.add_tensor(each, data.numpy(), raw_dtype=GGUF_DTYPES[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sync(path)
    return [path]


# ----------------------------------------------------------------------------------------------
# Tokenizer


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Write the tokenizer: characters as llama.cpp's `rwkv`, which matches the longest token.

    Another type of llama.cpp would add a space or a token at the beginning, or take two of the
    characters for its end of text. `rwkv` has none of these.
    """
    extra = list_extra_tokens(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        tokens = [char.encode("utf-8") for char in tokenizer.chars] + extra
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list([repr(token)[2:-1] for token in tokens])  # escaped, as \xc3\xa9
        writer.add_token_types([TokenType.NORMAL] * len(tokens))
        writer.add_vocab_size(len(tokens))
        return
    tokens, merges = list_bpe(tokenizer)
    tokens += [token.decode() for token in extra]
    end = tokens.index(END)
    types = [TokenType.CONTROL if token == END else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_vocab_size(len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    # Without these, token 11 would be both: a comma in GPT-2.
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def list_extra_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """Return the tokens that llama.cpp needs and the tokenizer lacks.

    For characters, the proper prefixes of their UTF-8 bytes, none if all are ASCII: at a character
    that the vocabulary lacks, its tokenizer never returns if another begins with the same byte,
    and there is no token of that byte. For BPE, an end of text, which always exists there.
    """
    if isinstance(tokenizer, CharTokenizer):
        encoded = [char.encode("utf-8") for char in tokenizer.chars]
        return sorted({token[:size] for token in encoded for size in range(1, len(token))})
    end = END.encode()
    return [] if end in tokenizer.tokens else [end]


# ----------------------------------------------------------------------------------------------
# Tensors


def create_tensors(source: ExportSource, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of the export by name; in Q8_0, the bytes of their blocks as uint8.

    Vectors, which are few, and the positions stay in float32.
    """
    config, tensors = source.config, {}
    architecture = {"modern": gguf.MODEL_ARCH.QWEN3, "gpt2": gguf.MODEL_ARCH.GPT2}
    names = gguf.get_tensor_name_map(architecture[config.architecture], config.n_layer)
    for theirs, tensor in to_transformers(source.weights, config).items():
        module, _, kind = theirs.rpartition(".")
        name = names.get_name(module)
        is_conv1d = kind == "weight" and is_transposed(module)
        rows = tensor.T.contiguous() if is_conv1d else tensor
        if name in ("token_embd", "output"):
            rows = resize_vocabulary(source, rows)
        is_small = rows.dim() == 1 or name == "position_embd"
        tensors[f"{name}.{kind}"] = convert(rows, "fp32" if is_small else dtype)
    return tensors


def resize_vocabulary(source: ExportSource, rows: Tensor) -> Tensor:
    """Return the rows `(V, C)` of a matrix without padding, and with one for each extra token.

    That is the row of a rare token: the extra ones are generated as rarely.
    """
    rows = rows[: source.tokenizer.num_tokens]
    count = len(list_extra_tokens(source.tokenizer))
    return torch.cat((rows, rows[find_rare_token(source)].expand(count, -1))) if count else rows


@torch.no_grad()
def find_rare_token(source: ExportSource) -> int:
    """Return the token that is the least likely after single tokens."""
    probes = torch.arange(min(source.tokenizer.num_tokens, PROBES))
    probabilities = source.model(probes[:, None])[0][:, 0].softmax(dim=-1)  # (probes, V)
    return int(probabilities.mean(dim=0).argmin())


def convert(tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor in the dtype of the file, rounded by the `gguf` library for Q8_0."""
    if dtype != "q8_0":
        return tensor.to(TORCH_DTYPES[dtype])
    if tensor.size(-1) % Q8_0_BLOCK:
        return tensor.half()
    return torch.from_numpy(quantize(tensor.numpy(), GGMLQuantizationType.Q8_0))


class BoundedReader(gguf.GGUFReader):
    """The library's reader, which ends at the end of the file.

    In gguf 0.19, whose method this is, an array may claim any length: beyond the end, each of its
    values is empty, and reading never ends.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if found.size < count:
            raise ValueError("it is truncated")
        return found


def read_tensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the dtype and the tensors of a GGUF file, as `create_tensors` returns them.

    `path` is the file, or a directory with it. Raises OSError or ValueError if it is none that an
    export could be.
    """
    path = find_file(path)
    kinds = {kind: dtype for dtype, kind in GGUF_DTYPES.items()}
    try:
        reader = BoundedReader(path)
        if sum(int(each.n_bytes) for each in reader.tensors) > path.stat().st_size:
            raise ValueError("its tensors overlap")
        number = reader.fields["general.file_type"].contents()
        dtype = next(name for name, kind in FILE_TYPES.items() if kind == number)
        tensors = {
            each.name: torch.from_numpy(np.array(each.data)).view(kinds[each.tensor_type])
            for each in reader.tensors
        }
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"not a GGUF file of an export: {error!r}") from None
    return dtype, tensors


def open_export(directory: Path) -> "LlamaModel":
    """Load an export by llama.cpp. Raises ImportError if xllamacpp is not installed."""
    from exporters.llamacpp import LlamaModel  # late: its library takes 100 MB of memory

    return LlamaModel(find_file(directory))


def find_file(place: Path) -> Path:
    """Return a file itself, or the only GGUF file of a directory. Raises OSError without one."""
    return find_only_file(place, "*.gguf")
