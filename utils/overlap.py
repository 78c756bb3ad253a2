"""The longest stretch of a generated text that stands verbatim in the training text."""

from collections.abc import Iterator

import numpy as np

CHUNK = 1 << 20  # tokens searched at once
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # an odd number: multiplication by it mixes 64 bits
TABLE_BITS = 20


def find_longest_overlap(sample: np.ndarray, tokens: np.ndarray, min_length: int) -> slice:
    """Return the longest part of `sample`, `(S,)`, that also stands in `tokens`, `(N,)`.

    Both are token ids; `tokens` may be memory-mapped, and is read once, chunk by chunk. The part is
    empty if no `min_length` tokens of the sample stand there.
    """
    sample = np.asarray(sample)
    longest = slice(0, 0)
    for seeds in _find_seeds(sample, tokens, min_length):
        (places, starts), length = seeds, min_length
        while places.size:
            if length > longest.stop - longest.start:
                longest = slice(int(starts[0]), int(starts[0]) + length)
            goes_on = (places + length < tokens.size) & (starts + length < sample.size)
            places, starts = places[goes_on], starts[goes_on]
            goes_on = tokens[places + length] == sample[starts + length]
            places, starts = places[goes_on], starts[goes_on]
            length += 1
    return longest


def _find_seeds(
    sample: np.ndarray, tokens: np.ndarray, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of positions in `tokens` and `sample` at which the same `length` tokens begin."""
    wanted = _hash_windows(sample, length)
    order = np.argsort(wanted, kind="stable")
    wanted = wanted[order]
    # Most positions fail this test, which is faster than a search.
    shift = np.uint64(64 - TABLE_BITS)
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    table[wanted >> shift] = True
    for first in range(0, tokens.size - length + 1, CHUNK):
        hashes = _hash_windows(tokens[first : first + CHUNK + length - 1], length)
        places = np.flatnonzero(table[hashes >> shift])
        low = np.searchsorted(wanted, hashes[places], "left")
        counts = np.searchsorted(wanted, hashes[places], "right") - low
        # One pair for each place and each of its `counts` positions in the sample.
        nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        starts = order[np.repeat(low, counts) + nth]
        places = np.repeat(places, counts) + first
        is_same = np.ones(places.size, dtype=bool)  # two windows may have the same hash
        for i in range(length):
            is_same &= tokens[places + i] == sample[starts + i]
        yield places[is_same], starts[is_same]


def _hash_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of each window of `length` tokens: uint64, `(N - length + 1,)`."""
    count = max(0, tokens.size - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(length):
        hashes = (hashes + tokens[i : i + count].astype(np.uint64) + np.uint64(1)) * FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes
