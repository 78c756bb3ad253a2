"""tokenizer.py: encoding and decoding of any text.

python -m pytest tests/test_tokenizer.py
"""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tiktoken
from helpers import CHECKOUT, LINES
from hypothesis import given
from hypothesis import strategies as st

from parameters import DEFAULT_VOCAB_SIZE
from tokenizer import (
    MAX_TOKEN_BYTES,
    BPETokenizer,
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
        {"token_kind": "wordpiece"},
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


def test_gpt2_encodes_a_lone_surrogate_as_the_replacement_character(gpt2_vocabulary):
    tokenizer = create_tokenizer("", "gpt2")
    assert tokenizer.decode(tokenizer.encode("caf\udce9")) == "caf\ufffd"


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


# A BPE of one's own --------------------------------------------------------------------------

LANGUAGES = {
    "arabic": "العَرَبِيَّة لُغَةٌ جميلة، أليس كذلك؟",
    "chinese": "学而时习之，不亦说乎？有朋自远方来。",
    "emoji": "👩‍👩‍👧 👍🏽 🏳️‍🌈 and 1️⃣",
    "english": "Don't you think we'll see 1,000 ships?\r\n\tYes!  ",
    "greek": "Ἄνδρα μοι ἔννεπε, Μοῦσα, πολύτροπον",
    "hebrew": "בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों",
    "italian": "Nel mezzo del cammin di nostra vita, così è già più",
    "japanese": "吾輩は猫である。名前はまだ無い。カタカナ",
    "korean": "모든 인간은 태어날 때부터 자유로우며",
    "russian": "Все счастливые семьи похожи друг на друга",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "combining marks": "Z͑ͫa̴l͊g͢o e\u0301\u0323 \u0301",
    "nul and other controls": "a\x00b\x1b[31m\x1c\x1d\x85\u2028\ufeff\u200b",
}


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([LINES * 3, *LANGUAGES.values(), *LANGUAGES.values()], 500)


@pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES.keys())
def test_bpe_encodes_text_of_every_language_and_back(bpe, text):
    english = BPETokenizer.train([LINES], 300)  # has seen none of the others
    for tokenizer in (bpe, english):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.count_unknown(text) == {}


@given(text=st.text())
def test_bpe_encodes_any_text_and_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@given(ids=st.lists(st.integers(0, 499)), size=st.integers(1, 9))
def test_any_ids_of_bpe_are_text_at_once_and_as_a_stream(bpe, ids, size):
    expected = b"".join(bpe.tokens[each] for each in ids).decode("utf-8", "replace")
    decode = bpe.create_stream_decoder()
    parts = [decode(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join([*parts, decode([])]) == bpe.decode(ids) == expected
    assert bpe.encoder.decode(ids) == expected


@pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES.keys())
def test_bpe_has_the_ids_of_the_whole_text_in_the_library(bpe, text):
    text = f"{text} {LINES}" * 3
    assert bpe.encode(text).tolist() == bpe.encoder.encode(text).ids


def test_a_lone_surrogate_becomes_the_replacement_character(bpe):
    assert bpe.decode(bpe.encode("caf\udce9")) == "caf\ufffd"


def test_bpe_of_the_empty_text_has_no_ids(bpe):
    assert bpe.encode("").shape == (0,)
    assert bpe.decode([]) == ""


def test_special_tokens_of_others_are_plain_text_in_bpe(bpe):
    assert bpe.encode("<|endoftext|>").size > 5


def test_bpe_ids_are_the_bytes_and_then_the_merges_in_their_order(bpe):
    assert (bpe.vocab_size, bpe.num_tokens, bpe.dtype) == (500, 500, np.uint16)
    assert bpe.tokens[:256] == [bytes([byte]) for byte in range(256)]
    for (first, second), token in zip(bpe.merges, bpe.tokens[256:], strict=True):
        assert bpe.tokens[first] + bpe.tokens[second] == token
    assert bpe.byte_level_tokens[ord(" ")] == "\u0120"
    vocabulary = bpe.encoder.get_vocab()
    assert vocabulary == {token: number for number, token in enumerate(bpe.byte_level_tokens)}
    assert bpe.token_bytes.tolist() == list(map(len, bpe.tokens))


def test_the_state_of_bpe_is_its_merges_and_restores_it(bpe):
    state = json.loads(json.dumps(bpe.get_state()))
    assert state == {"token_kind": "bpe", "merges": list(map(list, bpe.merges))}
    restored = restore_tokenizer(state)
    assert (restored.tokens, restored.merges) == (bpe.tokens, bpe.merges)
    assert restored.encode(LINES).tolist() == bpe.encode(LINES).tolist()
    assert restored.encoder.to_str() == bpe.encoder.to_str()


def test_frequent_pairs_are_merged_first_and_words_are_never_joined():
    tokenizer = BPETokenizer.train(["low lower lowest " * 20], 262)
    assert b"low" in tokenizer.tokens or b" low" in tokenizer.tokens
    assert not any(b" " in token[1:] for token in tokenizer.tokens)


def test_a_run_of_one_character_makes_no_token_twice_and_none_that_is_too_long():
    tokenizer = BPETokenizer.train(
        [f"{'a' * number} {'-' * number}\n" for number in range(999)], 999
    )
    assert len(set(tokenizer.tokens)) == len(tokenizer.tokens)
    assert max(map(len, tokenizer.tokens)) <= MAX_TOKEN_BYTES
    text = "a" * 1000
    assert tokenizer.encode(text).tolist() == tokenizer.encoder.encode(text).ids


def test_training_on_chunks_that_end_with_words_is_training_on_the_whole(bpe, monkeypatch):
    text = LINES + " ".join(LANGUAGES.values())
    expected = BPETokenizer.train([text] * 2, 400).merges
    monkeypatch.setattr("tokenizer._CHUNK", 7)
    monkeypatch.setattr("tokenizer._LARGE_CHUNK", 11)
    tokenizer = BPETokenizer.train([text] * 2, 400)
    assert tokenizer.merges == expected
    assert tokenizer.encode(text).tolist() == tokenizer.encoder.encode(text).ids


TRAIN_IN_ANOTHER_PROCESS = """
import json, sys
from tokenizer import BPETokenizer
texts = json.load(sys.stdin)
tokenizer = BPETokenizer.train(texts, 700)
print(json.dumps([tokenizer.merges, tokenizer.encode("".join(texts)).tolist()]))
"""


def test_bpe_is_the_same_for_any_number_of_threads_and_hash_seed():
    texts = [LINES * 40, *LANGUAGES.values()] * 3
    found = []
    for threads, seed in (("1", "1"), ("2", "2"), ("5", "3")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TRAIN_IN_ANOTHER_PROCESS]
        done = subprocess.run(
            command, input=json.dumps(texts), env=env, cwd=CHECKOUT, capture_output=True, text=True
        )
        found.append(done.stdout)
    assert found[0] and len(set(found)) == 1, done.stderr
    tokenizer = BPETokenizer.train(texts, 700)
    assert json.loads(found[0]) == [
        list(map(list, tokenizer.merges)),
        tokenizer.encode("".join(texts)).tolist(),
    ]


def test_bpe_learns_as_many_tokens_as_were_asked_for_or_names_those_there_are():
    assert create_tokenizer(LINES, "bpe", 270).vocab_size == 270
    available = create_tokenizer(LINES, "bpe").vocab_size  # null: all of them
    assert 270 < available < DEFAULT_VOCAB_SIZE
    with pytest.raises(UserError, match=rf"vocab_size 5000.* {available} tokens"):
        create_tokenizer(LINES, "bpe", 5000)
    for text in ("", "abc"):
        with pytest.raises(UserError, match="too short"):
            create_tokenizer(text, "bpe")


FORGED_MERGES = {
    "none": None,
    "empty": [],
    "not a list": {"0": [97, 98]},
    "not pairs": [[97, 98, 99]],
    "text": ["ab"],
    "strings": [["a", "b"]],
    "booleans": [[True, False]],
    "fractions": [[97.0, 98.0]],
    "a negative id": [[-1, 97]],
    "an id that does not exist yet": [[97, 98], [257, 97]],
    "a huge id": [[2**70, 97]],
    "a token twice": [[97, 98], [97, 98]],
    "a token twice by other parts": [[97, 98], [98, 99], [256, 99], [97, 257]],
    "tokens that double in length": [[97, 97], *([number, number] for number in range(256, 300))],
    "too many": [[97, 98]] * 65_281,
}


@pytest.mark.parametrize("merges", FORGED_MERGES.values(), ids=FORGED_MERGES.keys())
def test_forged_merges_are_refused_with_one_line(merges):
    with pytest.raises(UserError) as caught:
        restore_tokenizer({"token_kind": "bpe", "merges": merges})
    assert "merge" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_bpe_without_tokenizers_is_an_error_that_names_the_extra(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: create_tokenizer(LINES, "bpe"), lambda: BPETokenizer(bpe.merges)):
        with pytest.raises(UserError, match=r"needs tokenizers.*pip install.*\[bpe\]"):
            call()
