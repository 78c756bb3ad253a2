"""tokenizer.py: encoding and decoding of any text.

python -m pytest tests/test_tokenizer.py
"""

import json
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    create_tokenizer,
    normalize_for,
    restore_tokenizer,
)
from utils.errors import UserError

TEXTS = {
    "ascii": "to be, or not to be\n",
    "crlf": "one\r\ntwo\r\n",
    "emoji": "a 😀 b 👩‍👩‍👧 c",
    "combining": "e\u0301 é o\u0308",
    "right to left": "שלום עולם العربية",
    "nul and controls": "a\x00b\x1b[31m",
    "the last code point": "a\U0010ffff",
    "one character": "x",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_decoding_inverts_encoding(text):
    tokenizer = create_tokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.vocab_size == len(set(text))


@given(st.text(min_size=1))
def test_decoding_inverts_encoding_of_any_text(text):
    tokenizer = create_tokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_follow_the_order_of_the_characters():
    assert create_tokenizer("cab").chars == ["a", "b", "c"]
    assert create_tokenizer("cab").encode("abc").tolist() == [0, 1, 2]


def test_a_text_longer_than_a_chunk_is_encoded_whole():
    text = "abcé" * 50_000
    tokenizer = create_tokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [tokenizer.chars.index(char) for char in text]


def test_the_empty_text_has_no_ids():
    tokenizer = create_tokenizer("ab")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(("size", "dtype"), [(255, np.uint8), (256, np.uint16), (257, np.uint16)])
def test_ids_have_the_smallest_type_that_holds_them(size, dtype):
    text = "".join(chr(0x4E00 + i) for i in range(size))
    tokenizer = create_tokenizer(text)
    assert tokenizer.encode(text).dtype == dtype
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError):
        tokenizer.encode("a")


@pytest.mark.parametrize("unknown", ["A", "\u00e9", "\U0001f600", "`"])
def test_an_unknown_character_is_listed(unknown):
    with pytest.raises(UserError) as caught:
        create_tokenizer("abz").encode("ab" + unknown)
    assert repr(unknown) in str(caught.value)


def test_unknown_characters_beyond_twenty_are_counted_not_listed():
    with pytest.raises(UserError, match="6 more"):
        create_tokenizer("é").encode("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(("known", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_text_in_another_unicode_normalization_is_named_and_normalized(known, other):
    text = "Être là, François"
    tokenizer = create_tokenizer(unicodedata.normalize(known, text))
    with pytest.raises(UserError, match=rf"{known}.*--on-unknown normalize"):
        tokenizer.encode(unicodedata.normalize(other, text))
    expected = unicodedata.normalize(known, text)
    assert normalize_for(tokenizer, unicodedata.normalize(other, text)) == (expected, known)
    assert normalize_for(tokenizer, expected) == (expected, None)
    with pytest.raises(UserError) as caught:
        tokenizer.encode("§")
    assert "normal" not in str(caught.value)


def test_a_tokenizer_is_restored_from_its_state_in_json():
    tokenizer = create_tokenizer('a"\\\n😀\u2028')
    state = json.loads(json.dumps(tokenizer.get_state()))
    assert state == {"token_kind": "char", "chars": sorted('a"\\\n😀\u2028')}
    assert restore_tokenizer(state).chars == tokenizer.chars


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"token_kind": "bpe"},
        {"token_kind": "char"},
        {"token_kind": "char", "chars": ["ab"]},
        {"token_kind": "char", "chars": [1]},
        {"token_kind": "char", "chars": 3},
        {"token_kind": "char", "chars": "abc"},
        {"token_kind": "char", "chars": ["a", "a"]},
    ],
)
def test_an_invalid_state_is_an_error(state):
    with pytest.raises(UserError):
        restore_tokenizer(state)


def test_token_bytes_are_utf8_lengths():
    assert CharTokenizer(["a", "é", "€", "😀"]).token_bytes.tolist() == [1, 2, 3, 4]


def test_a_tokenizer_of_an_empty_text_is_an_error():
    with pytest.raises(UserError):
        create_tokenizer("")


def test_unknown_characters_are_counted_and_appended_to_the_vocabulary():
    tokenizer = create_tokenizer("abc")
    assert tokenizer.count_unknown("aéébß") == {"ß": 1, "é": 2}
    assert tokenizer.count_unknown("abc") == {}
    extended = tokenizer.extend(["ß", "é"])
    assert extended.chars == ["a", "b", "c", "ß", "é"]
    assert extended.encode("aé").tolist() == [0, 4]


# GPT-2's BPE ---------------------------------------------------------------------------------


def test_gpt2_encodes_any_text_with_the_ids_of_gpt2(gpt2_vocabulary):
    tokenizer = create_tokenizer("", "gpt2")
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode("<|endoftext|>").size > 1, "special tokens are plain text"
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.count_unknown(text) == {}
    assert tokenizer.encode("Hello").dtype == np.uint16


def test_gpt2_is_padded_and_the_padding_has_no_bytes(gpt2_vocabulary):
    tokenizer = restore_tokenizer({"token_kind": "gpt2"})
    assert (tokenizer.vocab_size, tokenizer.num_tokens) == (50304, 50257)
    assert tokenizer.token_bytes.shape == (50304,)
    assert tokenizer.token_bytes[15496] == 5
    assert tokenizer.token_bytes[50257:].sum() == 0
    assert tokenizer.get_state() == {"token_kind": "gpt2"}


def test_gpt2_without_tiktoken_or_its_vocabulary_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        create_tokenizer("", "gpt2")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"tiktoken.*pip install"):
        create_tokenizer("", "gpt2")
