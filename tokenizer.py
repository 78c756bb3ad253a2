"""Text to token ids and back.

A character tokenizer's vocabulary is the sorted set of the characters in a text: one token each,
nothing merged, nothing normalised. GPT-2's byte pairs are the other kind. A tokenizer's state is
`tokenizer.json`, which travels with the model.
"""

import codecs
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from utils.errors import UserError

GPT2_TOKENS = 50_257
GPT2_VOCAB_SIZE = 50_304  # the next multiple of 64: matrices of such sizes are faster on GPUs

_LAST_CODE_POINT = 0x10FFFF
_CHUNK = 1 << 16  # characters encoded at once: what they need in between stays in the cache


class CharTokenizer:
    """One token a character (a Unicode code point).

    Args:
        chars: the vocabulary, in the order of the ids.

    Raises:
        UserError: `chars` is empty, or an entry is not exactly one character, or stands twice.
    """

    token_kind = "char"
    unit = "character"

    def __init__(self, chars: Sequence[str]):
        is_list = isinstance(chars, (list, tuple))
        if not is_list or not chars or any(not isinstance(c, str) or len(c) != 1 for c in chars):
            raise UserError("a tokenizer's chars must be a list of single characters")
        if len(set(chars)) != len(chars):
            raise UserError("a tokenizer's chars must be different from one another")
        self.chars = list(chars)
        self._code_points = _code_points("".join(self.chars))
        # Code point -> id, in a table: one gather encodes a whole book. Its last slot, where all
        # code points beyond the largest known one are sent too, says "unknown" with the id V.
        self._ids = np.full(int(self._code_points.max()) + 2, self.vocab_size, dtype=self.dtype)
        self._ids[self._code_points] = np.arange(self.vocab_size)
        # The same for bytes of ASCII, where an id is a byte too.
        ascii_ids = self._ids.take(np.arange(256), mode="clip").tobytes()
        self._ascii_ids = ascii_ids if self.dtype == np.uint8 else None

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return len(self.chars)

    @property
    def num_tokens(self) -> int:
        """The ids below this one stand for text; those from here to `vocab_size` are padding."""
        return self.vocab_size

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id, and one more."""
        return np.min_scalar_type(self.vocab_size)

    @property
    def token_bytes(self) -> np.ndarray:
        """The length of each token in UTF-8 bytes, `(V,)` int64: what bits per byte divide by."""
        return np.array([len(char.encode("utf-8")) for char in self.chars], dtype=np.int64)

    @property
    def default_prompt(self) -> str:
        """What to begin with where nobody gives a prompt: a new line, if the text had lines."""
        return "\n" if "\n" in self.chars else self.chars[0]

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """The ids of `text`, `(len(text),)` of `dtype`.

        Characters that the vocabulary lacks are left out if `drop` is set.

        Raises:
            UserError: `text` has such characters, and `drop` is not set; they are listed.
        """
        ids = np.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), _CHUNK):
            self._look_up(text[start : start + _CHUNK], ids[start : start + _CHUNK])
        if ids.size and ids.max() == self.vocab_size:
            if not drop:
                raise self._unknown_characters(text)
            return ids[ids != self.vocab_size]
        return ids

    def _look_up(self, text: str, ids: np.ndarray) -> None:
        """Write the ids of `text` into `ids`, `(len(text),)`; V where it is unknown."""
        if self._ascii_ids is not None and text.isascii():
            ids[:] = np.frombuffer(text.encode("ascii").translate(self._ascii_ids), dtype=np.uint8)
        else:
            self._ids.take(_code_points(text), mode="clip", out=ids)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of a sequence of ids; the inverse of `encode`."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.intp)
        return str(self._code_points[ids].tobytes(), "utf-32-le", "surrogatepass")

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """`decode` for ids that come a few at a time."""
        return self.decode

    def get_state(self) -> dict[str, Any]:
        """What `restore_tokenizer` makes the same tokenizer from; plain JSON values."""
        return {"token_kind": self.token_kind, "chars": self.chars}

    def count_unknown(self, text: str) -> dict[str, int]:
        """The characters of `text` that the vocabulary lacks, sorted, and how often each stands."""
        counts: Counter[int] = Counter()
        for start in range(0, len(text), _CHUNK):
            chunk = text[start : start + _CHUNK]
            ids = np.empty(len(chunk), dtype=self.dtype)
            self._look_up(chunk, ids)
            if ids.max() == self.vocab_size:
                counts.update(_code_points(chunk)[ids == self.vocab_size].tolist())
        return {chr(code_point): counts[code_point] for code_point in sorted(counts)}

    def extend(self, chars: Sequence[str]) -> "CharTokenizer":
        """A tokenizer that knows `chars` too; the ids of the others stay as they are."""
        return CharTokenizer([*self.chars, *chars])

    def _unknown_characters(self, text: str) -> UserError:
        unknown = sorted(set(text) - set(self.chars))
        listed = " ".join(repr(char) for char in unknown[:20])
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        return UserError(
            f"the model does not know {listed}{more}: "
            f"it knows the {self.vocab_size} characters of the text it was trained on"
        )


class GPT2Tokenizer:
    """GPT-2's byte pairs (Radford et al. 2019), by tiktoken: any text, about 4 characters a token.

    Raises:
        UserError: tiktoken is not installed, or GPT-2's vocabulary is neither in its cache nor to
            be had.
    """

    token_kind = "gpt2"
    unit = "token"
    vocab_size = GPT2_VOCAB_SIZE
    num_tokens = GPT2_TOKENS
    dtype = np.dtype(np.uint16)
    default_prompt = "\n"

    def __init__(self) -> None:
        try:
            import tiktoken  # here, as it is an extra
        except ImportError:
            raise UserError(
                "--tokenizer gpt2 needs tiktoken: install it with `pip install '.[gpt2]'`"
            ) from None
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of the network, the disk or the file, as it happens
            raise UserError(
                f"GPT-2's vocabulary cannot be had ({type(error).__name__}): tiktoken downloads it "
                "once; without a network, set TIKTOKEN_CACHE_DIR to a copy of its cache"
            ) from None

    @property
    def token_bytes(self) -> np.ndarray:
        """The length of each token in UTF-8 bytes, `(V,)` int64; 0 for the padding."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(self.num_tokens):
            lengths[token] = len(self._encoding.decode_single_token_bytes(token))
        return lengths

    def encode(self, text: str, drop: bool = False) -> np.ndarray:
        """The ids of `text`, `(N,)` uint16. There is nothing that they could not spell."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of a sequence of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode([int(token) for token in ids])

    def create_stream_decoder(self) -> Callable[[Sequence[int]], str]:
        """`decode` for ids that come a few at a time: a character is given when it is whole.

        No ids at all are the end: what is left of a character becomes U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spell = self._encoding.decode_single_token_bytes
        return lambda ids: decoder.decode(b"".join(map(spell, ids)), final=len(ids) == 0)

    def count_unknown(self, text: str) -> dict[str, int]:
        """Nothing: byte pairs can spell any text."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """What `restore_tokenizer` makes the same tokenizer from."""
        return {"token_kind": self.token_kind}


Tokenizer = CharTokenizer | GPT2Tokenizer


def remove_unknown(tokenizer: Tokenizer, text: str, replace: bool) -> tuple[str, int]:
    """`text` without the characters that the tokenizer lacks, and how many those were.

    Each is replaced by a space, or by what a text begins with where no space is known; or left out.
    """
    unknown = tokenizer.count_unknown(text)
    space = "" if tokenizer.count_unknown(" ") else " "
    replacement = (space or tokenizer.default_prompt) if replace else ""
    return text.translate({ord(char): replacement for char in unknown}), sum(unknown.values())


def create_tokenizer(text: str | Iterable[str], kind: str = "char") -> Tokenizer:
    """The tokenizer of that `token_kind`; a character tokenizer knows the characters of `text`.

    Raises `UserError` where `text` is empty, or GPT-2's tokenizer is not to be had.
    """
    if kind == GPT2Tokenizer.token_kind:
        return GPT2Tokenizer()
    chars = collect_chars([text] if isinstance(text, str) else text)
    if not chars:
        raise UserError("there is no text to make a tokenizer from")
    return CharTokenizer(chars)


def collect_chars(texts: Iterable[str]) -> list[str]:
    """All different characters of some texts, sorted. Each text is looked at once."""
    seen = np.zeros(_LAST_CODE_POINT + 1, dtype=bool)
    known = b""  # of ASCII: what is left of a text without them is new, and soon nothing is
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
    """The tokenizer that `state()` described.

    Raises `UserError` for a `token_kind` this version does not know, or a state without `chars`.
    """
    kind = state.get("token_kind")
    if kind == GPT2Tokenizer.token_kind:
        return GPT2Tokenizer()
    if kind != CharTokenizer.token_kind:
        raise UserError(f"tokenizer.json: token_kind {kind!r} is not known; char and gpt2 are")
    return CharTokenizer(state.get("chars", []))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
