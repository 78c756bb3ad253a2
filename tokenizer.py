"""Text <-> token ids: by characters, or by GPT-2's byte pair encoding (BPE).

A character tokenizer's vocabulary is the sorted set of the characters of a text, without any
normalization. A tokenizer's state is saved as `tokenizer.json` in each bundle.
"""

import codecs
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from utils.errors import UserError

_CHUNK = 1 << 16  # characters encoded at once, so that intermediate arrays stay in the CPU cache


class CharTokenizer:
    """One token per character (Unicode code point); `chars` are in the order of the ids.

    All `vocab_size` ids, V, stand for text: `num_tokens` is the same. `dtype` is the smallest
    unsigned integer type that holds every id, and V, which stands for unknown characters.

    Raises `UserError` if `chars` is empty, or an entry is not one character or is repeated.
    """

    token_kind = "char"
    unit = "character"

    def __init__(self, chars: Sequence[str]):
        is_list = isinstance(chars, (list, tuple))
        if not is_list or not chars or any(not isinstance(c, str) or len(c) != 1 for c in chars):
            raise UserError("a tokenizer needs chars, a list of single characters")
        if len(set(chars)) != len(chars):
            raise UserError("a tokenizer's characters must not repeat")
        self.chars = list(chars)
        self.vocab_size = self.num_tokens = len(chars)
        self.dtype = np.min_scalar_type(self.vocab_size)
        self.default_prompt = "\n" if "\n" in self.chars else self.chars[0]
        self._code_points = _code_points("".join(self.chars))
        # Maps code points to ids, so that one gather encodes a chunk. Unknown code points map to V,
        # and larger ones are clipped to the last entry, which is V too.
        self._ids = np.full(int(self._code_points.max()) + 2, self.vocab_size, dtype=self.dtype)
        self._ids[self._code_points] = np.arange(self.vocab_size)
        # The same for ASCII text, as a table for `bytes.translate`, if an id is a byte too.
        ascii_ids = self._ids.take(np.arange(256), mode="clip").tobytes()
        self._ascii_ids = ascii_ids if self.dtype == np.uint8 else None

    @property
    def token_bytes(self) -> np.ndarray:
        """The length of each token in UTF-8 bytes, `(V,)` int64, for bits per byte."""
        return np.array([len(char.encode("utf-8")) for char in self.chars], dtype=np.int64)

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """Return the ids of `text`, `(len(text),)` of `dtype`.

        Characters that the vocabulary lacks are left out if `drop` is set; otherwise they raise
        `UserError`, which lists them.
        """
        ids = self._look_up(text)
        if not ids.size or ids.max() != self.vocab_size:
            return ids
        if drop:
            return ids[ids != self.vocab_size]
        unknown = list(self.count_unknown(text))
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        form = normalize_for(self, text)[1]
        hint = f" in Unicode normalization {form}: see --on-unknown normalize" if form else ""
        raise UserError(
            f"the model's vocabulary lacks {' '.join(map(repr, unknown[:20]))}{more}: "
            f"it has the {self.vocab_size} characters of the text it was trained on{hint}"
        )

    def _look_up(self, text: str) -> np.ndarray:
        """Return the ids of `text`; V for unknown characters."""
        ids = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), _CHUNK):
            chunk, out = text[start : start + _CHUNK], ids[start : start + _CHUNK]
            if self._ascii_ids is not None and chunk.isascii():
                out[:] = np.frombuffer(chunk.encode("ascii").translate(self._ascii_ids), np.uint8)
            else:
                self._ids.take(_code_points(chunk), mode="clip", out=out)
        return ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of a sequence of ids."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.intp)
        return str(self._code_points[ids].tobytes(), "utf-32-le", "surrogatepass")

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that decodes the next ids of a stream."""
        return self.decode

    def get_state(self) -> dict[str, Any]:
        """Return the state, in plain JSON values, that `restore_tokenizer` takes."""
        return {"token_kind": self.token_kind, "chars": self.chars}

    def count_unknown(self, text: str) -> dict[str, int]:
        """Count the characters of `text` that the vocabulary lacks, sorted by character."""
        unknown = np.flatnonzero(self._look_up(text) == self.vocab_size)
        return dict(sorted(Counter(text[index] for index in unknown).items()))

    def extend(self, chars: Sequence[str]) -> "CharTokenizer":
        """Return a tokenizer with `chars` added; the ids of the others stay the same."""
        return CharTokenizer([*self.chars, *chars])


class GPT2Tokenizer:
    """GPT-2's BPE (Radford et al. 2019), by tiktoken: any text, about 4 characters a token.

    Raises `UserError` if tiktoken is not installed or cannot load the vocabulary.
    """

    token_kind = "gpt2"
    unit = "token"
    vocab_size = 50_304  # num_tokens rounded up to a multiple of 64, for faster tensor cores
    num_tokens = 50_257
    dtype = np.dtype(np.uint16)
    default_prompt = "\n"

    def __init__(self) -> None:
        try:
            import tiktoken  # an optional dependency
        except ImportError:
            raise UserError(
                "--tokenizer gpt2 needs tiktoken: install it with `pip install '.[gpt2]'`"
            ) from None
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # a failure of the network or the disk, or a damaged file
            raise UserError(
                f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}): tiktoken downloads "
                "it once; without a network, set TIKTOKEN_CACHE_DIR to a copy of its cache"
            ) from None

    @property
    def token_bytes(self) -> np.ndarray:
        """The length of each token in UTF-8 bytes, `(V,)` int64; 0 for the padding."""
        lengths = [len(token) for token in self.list_token_bytes()]
        return np.array(lengths + [0] * (self.vocab_size - self.num_tokens), dtype=np.int64)

    def list_token_bytes(self) -> list[bytes]:
        """Return the bytes of each of the `num_tokens` tokens, in the order of their ids."""
        return [self._encoding.decode_single_token_bytes(n) for n in range(self.num_tokens)]

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """Return the ids of `text`, `(N,)` uint16; `drop` has no effect, as none are unknown."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([int(token) for token in ids])

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that decodes the next ids of a stream, up to the last whole character.

        An empty sequence of ids ends the stream: an incomplete character becomes U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spell = self._encoding.decode_single_token_bytes
        return lambda ids: decoder.decode(b"".join(map(spell, ids)), final=len(ids) == 0)

    def count_unknown(self, text: str) -> dict[str, int]:
        """Return an empty dict: a byte-level vocabulary lacks no character."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """Return the state, in plain JSON values, that `restore_tokenizer` takes."""
        return {"token_kind": self.token_kind}


Tokenizer = CharTokenizer | GPT2Tokenizer


def create_tokenizer(text: str | Iterable[str], kind: str = "char") -> Tokenizer:
    """Create a tokenizer of that `token_kind`; for char, with the characters of `text`.

    Raises `UserError` if there are none, or GPT-2's tokenizer cannot be loaded.
    """
    if kind == GPT2Tokenizer.token_kind:
        return GPT2Tokenizer()
    return CharTokenizer(collect_chars([text] if isinstance(text, str) else text))


def normalize_for(tokenizer: Tokenizer, text: str) -> tuple[str, str | None]:
    """Return `text` in the Unicode normalization that the tokenizer lacks fewest characters of.

    And that normalization, NFC (é is one character) or NFD (two); None if `text` is unchanged.
    """
    forms = [(text, None), *((unicodedata.normalize(form, text), form) for form in ("NFC", "NFD"))]
    return min(forms, key=lambda each: sum(tokenizer.count_unknown(each[0]).values()))


def collect_chars(texts: Iterable[str]) -> list[str]:
    """Return the set of the characters of some texts, sorted."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    known = b""  # ASCII characters seen; deleting them from a chunk soon leaves nothing to mark
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            if not chunk.isascii():
                seen[_code_points(chunk)] = True
            elif new := chunk.encode("ascii").translate(None, known):
                seen[np.frombuffer(new, dtype=np.uint8)] = True
                known = bytes(np.flatnonzero(seen[:128]).tolist())
    return [chr(code_point) for code_point in np.flatnonzero(seen)]


def restore_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """Restore a tokenizer from `get_state()`. Raises `UserError` if the state is not valid."""
    kind = state.get("token_kind")
    if kind == GPT2Tokenizer.token_kind:
        return GPT2Tokenizer()
    if kind != CharTokenizer.token_kind:
        raise UserError(f"tokenizer.json: token_kind must be char or gpt2, not {kind!r}")
    return CharTokenizer(state.get("chars", []))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
