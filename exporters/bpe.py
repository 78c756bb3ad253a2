"""The tokens and merges of a byte-level BPE, in the notation of GPT-2's files."""

from collections.abc import Mapping

from tokenizer import Tokenizer

# GPT-2's files write each byte as a printable character: these bytes as themselves, and the others
# as the characters from U+0100, in their order.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
LETTERS = {byte: 0x100 + n for n, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}


def list_bpe(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tokens in the order of their ids, and the merges in the order of their ranks."""
    tokens = tokenizer.list_token_bytes()
    ranks = {token: number for number, token in enumerate(tokens)}
    pairs = [find_merge(token, ranks) for token in tokens if len(token) > 1]
    merges = [(spell(first), spell(second)) for first, second in filter(None, pairs)]
    return [spell(token) for token in tokens], merges


def find_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens whose merge is `token`: BPE of its bytes with the tokens before it.

    None if these do not make it, as for a special token.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [(ranks.get(parts[i] + parts[i + 1]), i) for i in range(len(parts) - 1)]
        candidates = [each for each in merged if each[0] is not None and each[0] < ranks[token]]
        if not candidates:
            return None
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def spell(token: bytes) -> str:
    """Return a token with a printable character for each byte."""
    return token.decode("latin-1").translate(LETTERS)
