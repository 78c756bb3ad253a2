"""Hashes of the training text, with which the page finds stretches that a model has memorized.

The text is a sequence of UTF-16 code units, as in JavaScript. Every `stride`-th stretch of `LENGTH`
units is hashed, so that a copied stretch of `LENGTH + stride - 1` units or more has one of them.
"""

import base64
from typing import Any

import numpy as np

LENGTH = 16  # code units of a stretch
MAX_BYTES = 384 << 10  # of the compressed hashes
FACTOR = np.uint32(0x01000193)


def create_memorization(text: str) -> dict[str, Any]:
    """Return the hashes of a text, for as many of its stretches as fit into `MAX_BYTES`."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype="<u2")
    low, high = 1, max(1, -(-5 * units.size // MAX_BYTES))  # a difference has at most 5 bytes
    while low < high:
        middle = (low + high) // 2
        is_small = len(compress(hash_stretches(units, middle))) <= MAX_BYTES
        low, high = (low, middle) if is_small else (middle + 1, high)
    hashes = hash_stretches(units, low)
    return {
        "length": LENGTH,
        "stride": low,
        "characters": units.size,
        "guaranteed_length": LENGTH + low - 1,
        "count": hashes.size,
        "hashes": base64.b64encode(compress(hashes)).decode("ascii"),
    }


def hash_stretches(units: np.ndarray, stride: int) -> np.ndarray:
    """Return the distinct hashes of the stretches at 0, `stride`, 2 `stride` …, sorted, uint32.

    `units` is `(N,)`. The hash is a polynomial of the units, mixed by MurmurHash3's `fmix32`.
    """
    starts = max(0, units.size - LENGTH + 1)
    hashes = np.zeros(len(range(0, starts, stride)), dtype=np.uint32)
    for offset in range(LENGTH):
        hashes *= FACTOR
        hashes += units[offset : offset + starts : stride]
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)
    return np.unique(hashes)


def compress(hashes: np.ndarray) -> bytes:
    """Return the differences of sorted hashes, each as an unsigned LEB128, beginning from 0."""
    differences = np.diff(hashes, prepend=np.uint32(0))[:, None]  # (n, 1)
    shifts = np.arange(0, 35, 7, dtype=np.uint64)
    groups = differences.astype(np.uint64) >> shifts  # (n, 5): the bits from each byte on
    is_last = groups < 128
    content = (groups & np.uint64(127)) | np.where(is_last, 0, 128).astype(np.uint64)
    is_used = (groups > 0) | (shifts == 0)
    return content[is_used].astype(np.uint8).tobytes()
