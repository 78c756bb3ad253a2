"""The longest verbatim overlap of a sample with the training text (utils/overlap.py)."""

import numpy as np
import pytest

from utils import overlap
from utils.overlap import find_longest_overlap


def to_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def find_by_force(sample: str, text: str, min_length: int) -> int:
    """Return the length of the longest common substring, or 0 if it is below `min_length`."""
    length = 0
    for start in range(len(sample)):
        while sample[start : start + length + 1] in text and start + length < len(sample):
            length += 1
    return length if length >= min_length else 0


@pytest.mark.parametrize("chunk", [1, 3, 16, 1 << 20])
@pytest.mark.parametrize("min_length", [1, 2, 5])
def test_the_longest_overlap_is_that_of_a_search_by_force(monkeypatch, chunk, min_length):
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    random = np.random.default_rng(chunk * min_length)
    for _ in range(10):
        text, sample = ("".join(random.choice(list("abc"), n)) for n in (60, 25))
        found = find_longest_overlap(to_ids(sample), to_ids(text), min_length)
        assert found.stop - found.start == find_by_force(sample, text, min_length)
        assert sample[found] in text


@pytest.mark.parametrize(
    ("sample", "text"),
    [("", "abc"), ("abc", ""), ("ab", "abcd"), ("xyz" * 9, "abc" * 9), ("abcd", "abce")],
)
def test_without_an_overlap_of_the_minimum_length_the_part_is_empty(sample, text):
    assert find_longest_overlap(to_ids(sample), to_ids(text), 4) == slice(0, 0)


def test_repetitive_text_is_searched_in_time_and_memory_that_depend_on_its_length_only():
    found = find_longest_overlap(to_ids("ab" * 200), to_ids("ba" * 200_000), 8)
    assert found == slice(0, 400)
    assert find_longest_overlap(to_ids("-" * 400), to_ids("-" * 399 + "~"), 8).stop == 399


def test_an_overlap_may_be_the_whole_sample_at_the_end_of_the_text():
    assert find_longest_overlap(to_ids("the end"), to_ids("this is the end"), 3) == slice(0, 7)
    ids = np.array([50_000, 7, 7, 9], dtype=np.uint16)
    assert find_longest_overlap(ids[1:].astype(np.int64), ids, 2) == slice(0, 3)
