"""Speed of encoding and decoding by characters, on one core."""

import time

from corpus import load_sample_corpus
from tokenizer import create_tokenizer

REPEATS = 5


def run(data: str | None) -> None:
    text = load_sample_corpus() * 5
    megabytes = len(text.encode("utf-8")) / 1e6
    tokenizer = create_tokenizer(text)
    ids = tokenizer.encode(text)
    for name, work in (
        ("create_tokenizer", lambda: create_tokenizer(text)),
        ("encode", lambda: tokenizer.encode(text)),
        ("decode", lambda: tokenizer.decode(ids)),
    ):
        best = min(_measure_seconds(work) for _ in range(REPEATS))
        print(f"  {name:<18} {megabytes / best:6.0f} MB/s of {megabytes:.0f} MB")


def _measure_seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
