"""The longest stretch of a generated text that stands verbatim in the training text."""

import numpy as np

CHUNK = 1 << 20  # tokens searched at once
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(FACTOR, -1, 1 << 64)


def find_longest_overlap(sample: np.ndarray, tokens: np.ndarray, min_length: int) -> slice:
    """Return the longest part of `sample`, `(S,)`, that also stands in `tokens`, `(N,)`.

    Both are token ids; `tokens` may be memory-mapped, and is read once, chunk by chunk. The part is
    empty if no `min_length` tokens of the sample stand there.
    """
    wanted, longest = _Windows(np.asarray(sample)), slice(0, 0)
    for first in range(0, tokens.size, CHUNK):
        chunk = _Windows(np.asarray(tokens[first : first + CHUNK + sample.size]))
        low = max(min_length, longest.stop - longest.start + 1)
        high = min(sample.size, chunk.tokens.size)
        # Parts of a common part are common, too: find the length by bisection.
        length = low
        while low <= high:
            start = _find_common_window(wanted, chunk, length)
            if start is None:
                high = length - 1
            else:
                longest, low = slice(start, start + length), length + 1
            length = (low + high + 1) // 2
    return longest


class _Windows:
    """A rolling hash of each window of `tokens`, of any length."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        powers = np.full(tokens.size, FACTOR, dtype=np.uint64).cumprod(dtype=np.uint64)
        terms = (tokens.astype(np.uint64) + np.uint64(1)) * powers
        self._sums = np.concatenate(([np.uint64(0)], terms.cumsum(dtype=np.uint64)))
        self._inverses = np.full(tokens.size, INVERSE, dtype=np.uint64).cumprod(dtype=np.uint64)

    def hash(self, length: int) -> np.ndarray:
        """Return the hash of each window: uint64, `(N - length + 1,)`."""
        sums = self._sums[length:] - self._sums[:-length]
        return sums * self._inverses[: sums.size]  # the same at any position


def _find_common_window(sample: _Windows, chunk: _Windows, length: int) -> int | None:
    """Return where in the sample a window starts that is in the chunk, or None."""
    hashes, starts = np.unique(sample.hash(length), return_index=True)
    others = chunk.hash(length)
    # Most windows fail this test, which is faster than a search.
    table = np.zeros(1 << 16, dtype=bool)
    table[hashes >> np.uint64(48)] = True
    places = np.flatnonzero(table[others >> np.uint64(48)])
    places = places[np.isin(others[places], hashes)]
    for place in places[:100]:  # different windows hardly ever have the same hash
        start = int(starts[np.searchsorted(hashes, others[place])])
        window = sample.tokens[start : start + length]
        if np.array_equal(window, chunk.tokens[place : place + length]):
            return start
    return None
