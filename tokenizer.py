"""Text <-> token ids: by characters, GPT-2's byte pair encoding (BPE), or a BPE of one's own.

A character tokenizer's vocabulary is the sorted set of the characters of a text, without any
normalization. A tokenizer's state is saved as `tokenizer.json` in each bundle.
"""

import codecs
import json
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from parameters import DEFAULT_VOCAB_SIZE, MAX_VOCAB_SIZE
from utils.errors import UserError

MAX_TOKEN_BYTES = 128  # of a BPE's token: runs of dashes or spaces are longer
_CHUNK = 1 << 16  # characters encoded at once, so that intermediate arrays stay in the CPU cache
_LARGE_CHUNK = 1 << 22  # characters that a BPE encodes at once, each different word only once
_KNOWN_WORDS = 1 << 18  # of which a BPE keeps the ids: some 50 MB
# GPT-2's pattern never matches across this place, between a word and a space or a line end.
_WORD_END = re.compile(r"(?<=\S)(?=[ \n])")
_SURROGATES = re.compile("[\ud800-\udfff]")  # of a prompt that is not UTF-8


class CharTokenizer:
    """One token per character (Unicode code point); `chars` are in the order of the ids.

    All `vocab_size` ids, V, stand for text: `num_tokens` is the same. `dtype` is the smallest
    unsigned integer type that holds every id, and V, which stands for unknown characters.

    Raises `UserError` if `chars` is empty, or an entry is not one character or is repeated.
    """

    token_kind = "char"
    unit = "character"
    is_per_character = True  # so a text may be cut anywhere before it is encoded

    def __init__(self, chars: Sequence[str]):
        is_list = isinstance(chars, (list, tuple))
        if not is_list or not chars or any(not isinstance(c, str) or len(c) != 1 for c in chars):
            raise UserError("a tokenizer needs chars, a list of single characters")
        if len(set(chars)) != len(chars):
            raise UserError("a tokenizer's characters must not repeat")
        if any("\ud800" <= char <= "\udfff" for char in chars):
            raise UserError("a tokenizer's characters must not be lone surrogates: UTF-8 has none")
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
    is_per_character = False
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
        lengths = list(map(len, self.tokens))
        return np.array(lengths + [0] * (self.vocab_size - self.num_tokens), dtype=np.int64)

    @property
    def tokens(self) -> list[bytes]:
        """The bytes of each of the `num_tokens` tokens, in the order of the ids."""
        return [self._encoding.decode_single_token_bytes(n) for n in range(self.num_tokens)]

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """Return the ids of `text`, `(N,)` uint16; `drop` has no effect, as none are unknown."""
        ids = self._encoding.encode_to_numpy(_to_unicode(text), disallowed_special=())
        return ids.astype(self.dtype)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([int(token) for token in ids])

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that decodes the next ids of a stream, up to the last whole character.

        An empty sequence of ids ends the stream: an incomplete character becomes U+FFFD.
        """
        return _create_byte_decoder(self._encoding.decode_single_token_bytes)

    def count_unknown(self, text: str) -> dict[str, int]:
        """Return an empty dict: a byte-level vocabulary lacks no character."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """Return the state, in plain JSON values, that `restore_tokenizer` takes."""
        return {"token_kind": self.token_kind}


class BPETokenizer:
    """A byte-level BPE (Sennrich et al. 2016) that was trained on a text, by tokenizers.

    Ids 0 to 255 are the bytes; `merges[i]`, a pair of smaller ids, makes the token of id 256 + i.
    Words are those of GPT-2's pattern, and no token crosses their ends, as in Hugging Face's
    ByteLevel and llama.cpp's `gpt-2`. All `vocab_size` ids, V, stand for text: `num_tokens` is the
    same. `dtype` is the smallest unsigned integer type that holds every id.

    Attributes:
        merges: pairs of ids, in the order in which they are applied.
        tokens: the bytes of each token, in the order of the ids.
        byte_level_tokens: the same as text, in GPT-2's alphabet of 256 printable characters.
        encoder: the `tokenizers.Tokenizer`.

    Raises `UserError` if tokenizers is not installed, or the merges are not valid.
    """

    token_kind = "bpe"
    unit = "token"
    is_per_character = False
    default_prompt = "\n"

    def __init__(self, merges: Sequence[Sequence[int]]):
        self.tokens = _build_tokens(merges)
        self.merges = [(first, second) for first, second in merges]
        self.vocab_size = self.num_tokens = len(self.tokens)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        alphabet = list_byte_level_alphabet()
        self.byte_level_tokens = [
            "".join(map(alphabet.__getitem__, token)) for token in self.tokens
        ]
        vocabulary = {token: number for number, token in enumerate(self.byte_level_tokens)}
        pairs = [tuple(self.byte_level_tokens[part] for part in pair) for pair in self.merges]
        tokenizers = _import_tokenizers()
        self._known_words: dict[str, bytes] = {}  # the ids of words that were encoded
        self.encoder = _create_encoder(tokenizers, tokenizers.models.BPE(vocabulary, pairs))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train a tokenizer of at most `vocab_size` tokens; of fewer if no pair occurs twice.

        The result depends on the words of the texts only, and not on threads or chunks.
        """
        tokenizers = _import_tokenizers()
        encoder = _create_encoder(tokenizers, tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=MAX_TOKEN_BYTES,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        chunks = (chunk for text in texts for chunk in _iter_chunks(_to_unicode(text), _CHUNK))
        encoder.train_from_iterator(chunks, trainer)
        ids = {char: byte for byte, char in enumerate(list_byte_level_alphabet())}
        merges = []
        for first, second in json.loads(encoder.to_str())["model"]["merges"]:
            if first + second not in ids:  # two pairs may make the same token
                merges.append((ids[first], ids[second]))
                ids[first + second] = len(ids)
        if not merges:
            raise UserError("the training split is too short for a BPE: no pair occurs twice")
        return cls(merges)

    @property
    def token_bytes(self) -> np.ndarray:
        """The length of each token in bytes, `(V,)` int64, for bits per byte."""
        return np.array(list(map(len, self.tokens)), dtype=np.int64)

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """Return the ids of `text`, `(N,)` of `dtype`; `drop` has no effect: none are unknown."""
        ids = bytearray()
        for chunk in _iter_chunks(_to_unicode(text), _LARGE_CHUNK):
            words, known = _WORD_END.split(chunk), self._known_words
            new = [word for word in dict.fromkeys(words) if word not in known]
            found = self.encoder.encode_batch_fast(new, add_special_tokens=False)
            arrays = (array(self.dtype.char, each.ids).tobytes() for each in found)
            known.update(zip(new, arrays, strict=True))
            ids += b"".join(map(known.__getitem__, words))
            if len(known) > _KNOWN_WORDS or sum(map(len, new)) > len(chunk) // 2:
                known.clear()  # in a text without spaces, a word is a line that never comes again
        return np.frombuffer(ids, self.dtype)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.tokens.__getitem__, ids)).decode("utf-8", "replace")

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """Return a function that decodes the next ids of a stream; see `GPT2Tokenizer`."""
        return _create_byte_decoder(self.tokens.__getitem__)

    def count_unknown(self, text: str) -> dict[str, int]:
        """Return an empty dict: a byte-level vocabulary lacks no character."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """Return the state, in plain JSON values, that `restore_tokenizer` takes."""
        return {"token_kind": self.token_kind, "merges": list(map(list, self.merges))}


Tokenizer = CharTokenizer | GPT2Tokenizer | BPETokenizer


def create_tokenizer(
    text: str | Iterable[str], kind: str = "char", vocab_size: int | None = None
) -> Tokenizer:
    """Create a tokenizer of that `token_kind`: of the characters of `text`, or trained on it.

    `vocab_size` is that of bpe; None: `DEFAULT_VOCAB_SIZE`, or as many as the text gives.

    Raises `UserError` if the text has no characters or gives fewer tokens than `vocab_size`, or if
    a library or GPT-2's vocabulary is missing.
    """
    if kind == GPT2Tokenizer.token_kind:
        return GPT2Tokenizer()
    texts = [text] if isinstance(text, str) else text
    if kind == CharTokenizer.token_kind:
        return CharTokenizer(collect_chars(texts))
    tokenizer = BPETokenizer.train(texts, vocab_size or DEFAULT_VOCAB_SIZE)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"vocab_size {vocab_size}: the training split is too short: it gives "
            f"{tokenizer.vocab_size} tokens (no further pair occurs twice): lower vocab_size, set "
            "it to null for as many as there are, or use a longer text"
        )
    return tokenizer


def normalize_for(tokenizer: Tokenizer, text: str) -> tuple[str, str | None]:
    """Return `text` in the Unicode normalization with the fewest unknown characters, and its name.

    The name is NFC (é is one character), NFD (two), or None if `text` is unchanged.
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
    if kind == BPETokenizer.token_kind:
        return BPETokenizer(state.get("merges"))
    if kind != CharTokenizer.token_kind:
        raise UserError(f"token_kind must be char, gpt2 or bpe, not {kind!r}")
    return CharTokenizer(state.get("chars", []))


def list_byte_level_alphabet() -> list[str]:
    """Return GPT-2's character for each byte: itself if it is printable, else one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _iter_chunks(text: str, size: int) -> Iterator[str]:
    """Yield a text in chunks of `size` characters and more, which end with a word."""
    start = 0
    while start < len(text):
        end = _WORD_END.search(text, start + size)
        stop = end.start() if end else len(text)
        yield text[start:stop]
        start = stop


def _to_unicode(text: str) -> str:
    """Replace lone surrogates, which UTF-8 lacks."""
    return _SURROGATES.sub("\ufffd", text)


def _create_byte_decoder(spell: Callable[[int], bytes]) -> Callable[[Sequence[int]], str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda ids: decoder.decode(b"".join(map(spell, ids)), final=len(ids) == 0)


def _build_tokens(merges: Any) -> list[bytes]:
    """Return the bytes of each token. Raises `UserError` if the merges are not valid."""
    limit = MAX_VOCAB_SIZE - 256
    if not isinstance(merges, (list, tuple)) or not 1 <= len(merges) <= limit:
        raise UserError(f"a BPE needs merges, a list of 1 to {limit:,} pairs of ids")
    tokens = [bytes([byte]) for byte in range(256)]
    known = set(tokens)
    for number, pair in enumerate(merges):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or any(
            type(part) is not int or not 0 <= part < len(tokens) for part in pair
        ):
            raise UserError(f"merge {number} of a BPE must be two ids from 0 to {len(tokens) - 1}")
        token = tokens[pair[0]] + tokens[pair[1]]
        if token in known or len(token) > MAX_TOKEN_BYTES:
            raise UserError(
                f"merge {number} of a BPE makes a token that exists, or one of more than "
                f"{MAX_TOKEN_BYTES} bytes"
            )
        known.add(token)
        tokens.append(token)
    return tokens


def _import_tokenizers() -> ModuleType:
    try:
        import tokenizers  # an optional dependency
    except ImportError:
        raise UserError(
            "--tokenizer bpe needs tokenizers: install it with `pip install '.[bpe]'`"
        ) from None
    return tokenizers


def _create_encoder(tokenizers: ModuleType, model: Any) -> Any:
    """Return a `tokenizers.Tokenizer` with GPT-2's words and bytes."""
    encoder = tokenizers.Tokenizer(model)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    return encoder
