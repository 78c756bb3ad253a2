"""llama.cpp, called through the library in the wheel of xllamacpp, by ctypes.

xllamacpp has a server and no function that returns logits. The functions and structures here are
those of `llama.h` in xllamacpp 2026.10.11549 (github.com/ggml-org/llama.cpp); their layout is
compared with the defaults that the library itself returns, so that another one raises an error.
"""

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np

F32 = 0  # ggml_type
DEFAULTS = (512, 2048, 512, 4, 4, -1, 1, 1)  # of the fields that are read below
MAX_TOKEN_BYTES = 1 << 10


class ContextParams(ctypes.Structure):
    """`llama_context_params`; `rest` is longer than its last fields, which are left as they are."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("before_threads", c_uint32 * 4),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("before_flash_attn", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("before_types", c_int32 * 12),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_void_p * 20),
    )


class ModelParams(ctypes.Structure):
    """`llama_model_params`, left as they are."""

    _fields_ = (("all", c_void_p * 40),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
FUNCTIONS = {
    # A name: the type of the result, and of the arguments.
    "llama_log_set": (None, LogCallback, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, ctypes.c_size_t),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_tokenize": (
        *(c_int32, c_void_p, c_char_p, c_int32),
        *(POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
}


@LogCallback
def _ignore(level: int, text: bytes, data: int) -> None:
    """Print nothing: llama.cpp writes dozens of lines to stderr as it loads."""


def load_library() -> ctypes.CDLL:
    """Load llama.cpp. Raises ImportError if xllamacpp is not installed, or has another layout."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        raise ImportError("No module named 'xllamacpp'", name="xllamacpp")
    (directory,) = spec.submodule_search_locations
    (path,) = [each for each in Path(directory).iterdir() if each.suffix in (".so", ".pyd")]
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_ignore, None)
    found = library.llama_context_default_params()
    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type")
    if tuple(getattr(found, name) for name in (*names, "type_k", "type_v")) != DEFAULTS:
        raise ImportError("another version of llama.cpp than those known", name="xllamacpp")
    library.llama_backend_init()
    return library


class LlamaModel:
    """A GGUF model with a KV cache in float32, and without flash attention, which rounds.

    `num_tokens` is the number of ids that stand for text: see `exporters.verify.TargetModel`.
    """

    def __init__(self, path: Path):
        self.library = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
        self._llama = llama = load_library()
        params = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.vocab_size = llama.llama_vocab_n_tokens(self._vocab)
        self.num_tokens = int(self.get_metadata("folio.num_tokens") or self.vocab_size)
        self.block_size = llama.llama_model_n_ctx_train(self._model)
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.block_size
        params.flash_attn_type, params.type_k, params.type_v = 0, F32, F32
        params.n_threads = params.n_threads_batch = 1  # others wait in a loop that takes a core
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"{path}: llama.cpp cannot use it")

    def close(self) -> None:
        """Free the memory."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def get_metadata(self, key: str) -> str | None:
        """Return a value of the file's metadata as text, or None."""
        buffer = ctypes.create_string_buffer(256)
        size = self._llama.llama_model_meta_val_str(self._model, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if size >= 0 else None

    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, num_tokens)` of a text, `(T,)`, in float32."""
        self._clear()
        return self._decode(ids, 0)[:, : self.num_tokens]

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, one after another, `(n,)`."""
        self._clear()
        generated: list[int] = []
        new, start = np.asarray(ids), 0
        while len(generated) < n:
            logits = self._decode(new, start)[-1]
            start += len(new)
            generated.append(int(logits.argmax()))
            new = np.array(generated[-1:])
        return np.array(generated, dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; -1 for bytes that the vocabulary lacks."""
        content = text.encode("utf-8")
        ids = (c_int32 * (len(content) + 1))()
        arguments = (self._vocab, content, len(content), ids, len(ids), False, False)
        return ids[: self._llama.llama_tokenize(*arguments)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        # llama_detokenize would remove spaces before punctuation.
        return b"".join(map(self._spell, ids)).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        """Return the bytes of a token."""
        buffer = ctypes.create_string_buffer(MAX_TOKEN_BYTES)
        arguments = (self._vocab, int(token), buffer, MAX_TOKEN_BYTES, 0, True)
        size = self._llama.llama_token_to_piece(*arguments)
        return buffer.raw[:size]

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Append ids, `(T,)`, at position `start`, and return their logits, `(T, vocab_size)`."""
        if start + len(ids) > self.block_size:
            raise ValueError(f"{start + len(ids)} tokens exceed the context of {self.block_size}")
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := self._llama.llama_decode(self._context, batch):
                raise ValueError(f"llama_decode returned {status}")
            rows = (self._llama.llama_get_logits_ith(self._context, i) for i in range(len(ids)))
            return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])
        finally:
            self._llama.llama_batch_free(batch)
