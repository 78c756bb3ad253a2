"""The tokens and merges of a byte-level BPE, in the notation of GPT-2's files."""

from collections.abc import Mapping

from tokenizer import BPETokenizer, GPT2Tokenizer, list_byte_level_alphabet


def list_bpe(
    tokenizer: GPT2Tokenizer | BPETokenizer,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the tokens in the order of their ids, and the merges in the order of their ranks.

    A printable character stands for each byte, as in GPT-2's `vocab.json` and `merges.txt`.
    """
    if isinstance(tokenizer, BPETokenizer):
        names = tokenizer.byte_level_tokens
        return names, [(names[first], names[second]) for first, second in tokenizer.merges]
    alphabet, tokens = list_byte_level_alphabet(), tokenizer.tokens
    # tiktoken has no merges: their order is that of the tokens.
    ranks = {token: number for number, token in enumerate(tokens)}
    merges = filter(None, (find_merge(token, ranks) for token in tokens if len(token) > 1))

    def write(token: bytes) -> str:
        return "".join(map(alphabet.__getitem__, token))

    return list(map(write, tokens)), [(write(first), write(second)) for first, second in merges]


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
