"""data.py: splits and batches.

python -m pytest tests/test_data.py
"""

import math

import numpy as np
import pytest
import torch

from data import (
    get_batch,
    iter_evaluation_batches,
    load_dataset,
    split_micro_batches,
)
from parameters import ModelConfig
from tokenizer import CharTokenizer
from utils.errors import UserError

TOKENS = np.arange(200, dtype=np.uint8)
DRAW = ModelConfig(seed=1, batch_size=8, block_size=10, window_order="random")


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


# Reading --------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    path = write(tmp_path / "dos.txt", b"\xef\xbb\xbf" + b"one\r\ntwo\r\n" * 20)
    dataset = load_dataset(ModelConfig(data=path, block_size=4))
    assert "\ufeff" not in dataset.tokenizer.chars
    assert "\r" in dataset.tokenizer.chars


def test_splits_are_consecutive_and_cover_the_text(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(1000))
    path = write(tmp_path / "t.txt", text)
    dataset = load_dataset(ModelConfig(data=path, block_size=4, train_split=0.7, test_split=0.1))
    assert {s: t.size for s, t in dataset.splits.items()} == {"train": 700, "val": 200, "test": 100}
    assert "".join(map(dataset.tokenizer.decode, dataset.splits.values())) == text


def test_there_is_no_test_split_by_default(text_file):
    assert list(load_dataset(ModelConfig(data=str(text_file), block_size=4)).splits) == [
        "train",
        "val",
    ]


def test_input_txt_is_the_default_text():
    with open("input.txt", "w", encoding="utf-8") as file:
        file.write("hello " * 100)
    dataset = load_dataset(ModelConfig(block_size=4))
    assert dataset.name == "input.txt"
    assert dataset.tokenizer.chars == sorted(set("hello "))


def test_a_split_needs_one_character_more_than_block_size(tmp_path):
    config = {"block_size": 8, "train_split": 0.5}
    enough = write(tmp_path / "enough.txt", "ab" * 9)
    dataset = load_dataset(ModelConfig(data=enough, **config))
    draw = ModelConfig(seed=0, batch_size=2, block_size=8)
    inputs, targets = get_batch(dataset.splits["train"], 0, draw)
    assert inputs.shape == targets.shape == (2, 8)
    short = write(tmp_path / "short.txt", "ab" * 8)
    with pytest.raises(
        UserError, match=r"train split.* 8 of 16.*block_size 8 needs 9.*change train_split"
    ):
        load_dataset(ModelConfig(data=short, **config))


def test_a_test_split_that_is_too_short_is_an_error_that_names_it(tmp_path):
    path = write(tmp_path / "t.txt", "ab" * 500)
    with pytest.raises(UserError, match=r"test split.* 5 of 1000.*change test_split"):
        load_dataset(ModelConfig(data=path, block_size=8, test_split=0.005))


def test_a_text_that_is_not_utf8_is_an_error_with_the_line(tmp_path):
    path = write(tmp_path / "latin.txt", "fine\nfine\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: .*0xe9 in line 3\).*iconv"):
        load_dataset(ModelConfig(data=path))


def test_a_text_of_only_a_byte_order_mark_is_empty(tmp_path):
    with pytest.raises(UserError, match="empty"):
        load_dataset(ModelConfig(data=write(tmp_path / "bom.txt", b"\xef\xbb\xbf")))


def test_bytes_per_token_counts_utf8(tmp_path):
    path = write(tmp_path / "t.txt", "aé" * 100)
    dataset = load_dataset(ModelConfig(data=path, block_size=4))
    assert dataset.bytes_per_token == {"train": 1.5, "val": 1.5}


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bpe"])
def test_a_memory_mapped_text_is_the_same_dataset_as_one_in_memory(
    tmp_path, gpt2_vocabulary, tokenizer
):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        write(folder / name, f"{name}: Être, ou ne pas être. 漢字\n" * 30)
    settings = {"data": str(folder), "block_size": 8, "test_split": 0.2, "tokenizer": tokenizer}
    for split_by in ("position", "file"):
        config = ModelConfig(**settings, split_by=split_by, train_split=0.4)
        one, other = (
            load_dataset(config.model_copy(update={"token_store": token_store}))
            for token_store in ("off", "on")
        )
        assert one.bytes_per_token == other.bytes_per_token
        assert (one.sha256, one.num_tokens) == (other.sha256, other.num_tokens)
        assert one.tokenizer.get_state() == other.tokenizer.get_state()
        assert list(one.splits) == list(other.splits) == ["train", "val", "test"]
        for split in one.splits:
            np.testing.assert_array_equal(one.splits[split], other.splits[split])
        assert not other.splits["train"].flags.writeable
    assert one.tokenizer.decode(one.splits["val"]).startswith("b.txt: Être")
    assert one.tokenizer.decode(one.splits["test"]).startswith("c.txt: Être")


@pytest.mark.parametrize("setting", ["runs_dir", "checkpoints_dir", "cache_dir"])
def test_a_text_with_a_directory_that_is_written_inside_is_an_error(tmp_path, setting):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.txt", "A text of some length.")
    config = ModelConfig(data=str(folder), block_size=1, cache_dir=str(folder / ".cache"))
    load_dataset(config)
    with pytest.raises(UserError, match=f"{setting} .*written"):
        load_dataset(config.model_copy(update={setting: str(folder / "written")}))


def test_unknown_characters_of_a_memory_mapped_text_are_dropped_or_added(tmp_path):
    path = write(tmp_path / "t.txt", "abcab" * 20 + "é" + "abc" * 20)
    config = ModelConfig(data=path, block_size=4, token_store="on")
    parent = CharTokenizer(["c", "b", "a"])
    with pytest.raises(UserError, match=r"'é' \(once\).*--on-new-chars"):
        load_dataset(config, tokenizer=parent)
    dropped = load_dataset(config.model_copy(update={"on_new_chars": "drop"}), tokenizer=parent)
    assert (dropped.left_out, dropped.num_tokens) == ({"é": 1}, 160)
    extend = config.model_copy(update={"on_new_chars": "extend"})
    learned = load_dataset(extend, tokenizer=parent, may_extend=True)
    assert learned.tokenizer.chars == ["c", "b", "a", "é"]
    assert learned.num_tokens == 161


# Batches --------------------------------------------------------------------------------------


def test_targets_are_inputs_shifted_by_one():
    inputs, targets = get_batch(TOKENS, 0, DRAW)
    assert inputs.shape == targets.shape == (8, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_batch_is_a_function_of_seed_and_step():
    first = get_batch(TOKENS, 3, DRAW)[0]
    torch.manual_seed(0)
    np.random.seed(0)
    get_batch(TOKENS, 4, DRAW)
    assert torch.equal(first, get_batch(TOKENS, 3, DRAW)[0])
    assert not torch.equal(first, get_batch(TOKENS, 4, DRAW)[0])
    assert not torch.equal(first, get_batch(TOKENS, 3, DRAW.model_copy(update={"seed": 2}))[0])


def test_batches_are_the_same_in_every_release():
    starts = get_batch(TOKENS, 5, DRAW)[0][:, 0].tolist()
    assert starts == [73, 27, 73, 17, 188, 29, 20, 99]


def test_rows_of_a_batch_do_not_depend_on_the_selection():
    whole = get_batch(TOKENS, 3, DRAW)[0]
    parts = [get_batch(TOKENS, 3, DRAW, rows=slice(i, i + 3))[0] for i in (0, 3, 6)]
    assert torch.equal(whole, torch.cat(parts))


def test_every_window_is_drawn_including_the_last():
    tokens = np.arange(14, dtype=np.uint8)
    starts = {int(start) for i in range(50) for start in get_batch(tokens, i, DRAW)[0][:, 0]}
    assert starts == {0, 1, 2, 3}


def test_windows_are_drawn_uniformly():
    config = DRAW.model_copy(update={"batch_size": 19_000})
    starts = get_batch(TOKENS, 0, config)[0][:, 0]
    counts = torch.bincount(starts, minlength=190).float()
    chi_squared = ((counts - 100) ** 2 / 100).sum().item()
    assert chi_squared < 190 + 5 * math.sqrt(2 * 190)


@pytest.mark.parametrize("order", ["random", "shuffled", "shifted"])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_batches_are_drawn_for_any_valid_seed(seed, order):
    draw = DRAW.model_copy(update={"seed": seed, "window_order": order})
    assert get_batch(TOKENS, 2**40, draw)[0].shape == (8, 10)


SHUFFLED = DRAW.model_copy(update={"window_order": "shuffled"})


@pytest.mark.parametrize("size", [11, 21, 200, 1024, 8193])
@pytest.mark.parametrize("batch_size", [1, 8, 50])
def test_shuffled_windows_come_once_in_an_epoch_for_any_batch_size(size, batch_size):
    tokens = np.arange(size, dtype=np.uint16)
    count, draw = (size - 1) // 10, SHUFFLED.model_copy(update={"batch_size": batch_size})
    steps = -(-3 * count // batch_size)
    starts = [int(s) for i in range(steps) for s in get_batch(tokens, i, draw)[0][:, 0]]
    passes = [starts[i * count : (i + 1) * count] for i in range(3)]
    for one in passes:
        assert sorted(one) == list(range(0, count * 10, 10))
    if count > 10:
        assert len({tuple(one) for one in passes}) == 3
        other = draw.model_copy(update={"seed": 2})
        assert (
            starts[:count]
            != [int(s) for i in range(steps) for s in get_batch(tokens, i, other)[0][:, 0]][:count]
        )


SHIFTED = DRAW.model_copy(update={"window_order": "shifted"})


def get_passes(tokens, draw, count, number):
    """Return where the windows of each of the first passes begin."""
    steps = range(-(-number * count // draw.batch_size))
    starts = [int(s) for i in steps for s in get_batch(tokens, i, draw)[0][:, 0]]
    return [starts[i * count : (i + 1) * count] for i in range(number)]


@pytest.mark.parametrize("size", [11, 15, 21, 29, 30, 31, 200, 1024, 8193])
@pytest.mark.parametrize("batch_size", [1, 8, 50])
def test_shifted_windows_are_adjacent_and_come_once_in_an_epoch(size, batch_size):
    tokens = np.arange(size, dtype=np.uint16)
    draw = SHIFTED.model_copy(update={"batch_size": batch_size})
    count = max(1, size // 10 - 1)  # whatever the offset below 10 is
    passes = get_passes(tokens, draw, count, 80)
    firsts = [min(one) for one in passes]
    for one, first in zip(passes, firsts, strict=True):
        assert sorted(one) == list(range(first, first + count * 10, 10))
    assert {first % 10 for first in firsts} == set(range(min(10, size - 10 * count)))
    inputs = {first + i for first in firsts for i in range(count * 10)}
    assert inputs == set(range(size - 1))  # the last is a target only


def test_successive_epochs_of_shifted_windows_are_cut_at_other_places():
    tokens = np.arange(8193, dtype=np.uint16)
    for seed in range(20):
        draw = SHIFTED.model_copy(update={"seed": seed, "block_size": 256})
        offsets = sorted(min(one) for one in get_passes(tokens, draw, 31, 8))
        gaps = np.diff([*offsets, offsets[0] + 256])
        assert 20 <= min(gaps) <= max(gaps) <= 40  # of a mean of 32
    other = SHIFTED.model_copy(update={"seed": 2})
    assert get_passes(tokens, SHIFTED, 818, 1) != get_passes(tokens, other, 818, 1)


def test_shuffled_batches_are_the_same_in_every_release_and_for_any_selection_of_rows():
    whole = get_batch(TOKENS, 5, SHUFFLED)
    assert whole[0][:, 0].tolist() == [100, 80, 40, 20, 110, 70, 50, 90]
    assert torch.equal(whole[1], whole[0] + 1)
    parts = [get_batch(TOKENS, 5, SHUFFLED, rows=slice(i, i + 3))[0] for i in (0, 3, 6)]
    assert torch.equal(whole[0], torch.cat(parts))


def test_shifted_batches_are_the_same_in_every_release_and_for_any_selection_of_rows():
    whole = get_batch(TOKENS, 5, SHIFTED)
    assert whole[0][:, 0].tolist() == [108, 88, 48, 28, 118, 78, 58, 98]
    assert torch.equal(whole[1], whole[0] + 1)
    parts = [get_batch(TOKENS, 5, SHIFTED, rows=slice(i, i + 3))[0] for i in (0, 3, 6)]
    assert torch.equal(whole[0], torch.cat(parts))


def test_shuffled_windows_are_in_a_uniformly_random_order():
    """Each window is as likely as any other to be the first of an epoch, or to follow another."""
    tokens = np.arange(101, dtype=np.uint8)
    draw = SHUFFLED.model_copy(update={"batch_size": 10})
    passes = [get_batch(tokens, i, draw)[0][:, 0].numpy() // 10 for i in range(1000)]
    firsts = np.bincount([one[0] for one in passes], minlength=10)
    assert ((firsts - 100) ** 2 / 100).sum() < 9 + 5 * math.sqrt(18)
    steps = np.bincount([(one[1] - one[0]) % 10 for one in passes], minlength=10)[1:]
    assert ((steps - 1000 / 9) ** 2 / (1000 / 9)).sum() < 8 + 5 * math.sqrt(16)


def test_the_memory_for_shuffling_does_not_depend_on_the_length_of_the_text():
    class Endless:
        size, dtype = 10**15, np.dtype(np.uint8)

        def __getitem__(self, index):
            assert 0 <= index.min() <= index.max() < self.size
            return np.zeros(index.shape, self.dtype)

    for draw in (SHUFFLED, SHIFTED):
        assert get_batch(Endless(), 10**9, draw)[0].shape == (8, 10)
    config = ModelConfig(batch_size=4, block_size=10, eval_iters=0)
    assert next(iter_evaluation_batches(Endless(), config))[0].shape == (4, 10)
    assert len(list(iter_evaluation_batches(Endless(), config, max_windows=9))) == 3


@pytest.mark.parametrize(
    ("batch", "micro", "expected"),
    [(6, None, [6]), (6, 6, [6]), (6, 9, [6]), (6, 4, [4, 2]), (6, 1, [1] * 6)],
)
def test_micro_batches_divide_a_batch(batch, micro, expected):
    config = ModelConfig(batch_size=batch, micro_batch_size=micro)
    rows = split_micro_batches(config, slice(0, config.batch_size))
    assert [s.stop - s.start for s in rows] == expected
    assert [i for s in rows for i in range(s.start, s.stop)] == list(range(batch))


def evaluation(config):
    return list(iter_evaluation_batches(TOKENS, config))


def test_evaluation_batches_do_not_depend_on_the_seed_and_differ_from_training_batches():
    config = ModelConfig(batch_size=4, block_size=10, eval_iters=3, seed=1)
    batches = evaluation(config)
    again = evaluation(config.model_copy(update={"seed": 2}))
    assert len(batches) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    training = get_batch(TOKENS, 0, ModelConfig(seed=0, batch_size=4, block_size=10))[0]
    assert not torch.equal(batches[0][0], training)


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("block_size", [10, 199, 7])
def test_an_evaluation_of_the_whole_split_has_every_target_once(micro, block_size):
    config = ModelConfig(batch_size=4, micro_batch_size=micro, block_size=block_size, eval_iters=0)
    batches = evaluation(config)
    inputs = torch.cat([x.flatten() for x, _ in batches])
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets.tolist() == list(range(1, 200))
    assert inputs.tolist() == list(range(199))
    assert max(x.size(0) for x, _ in batches) <= (micro or 4)


def test_a_limited_number_of_evaluation_windows_is_spread_evenly_over_the_split():
    config = ModelConfig(batch_size=4, block_size=10, eval_iters=0)
    batches = list(iter_evaluation_batches(TOKENS, config, min_rows=3, max_windows=5))
    starts = [int(row[0]) for inputs, _ in batches for row in inputs]
    assert starts == [0, 30, 70, 110, 150]  # of 19 windows
    assert [inputs.shape for inputs, _ in batches] == [(4, 10), (1, 10)]


@pytest.mark.parametrize("eval_iters", [0, 5])
def test_evaluation_windows_do_not_depend_on_the_number_of_rows(eval_iters):
    config = ModelConfig(batch_size=4, block_size=10, eval_iters=eval_iters)
    few, many = (list(iter_evaluation_batches(TOKENS, config, min_rows=n)) for n in (1, 1000))
    assert len(few) > len(many)
    for part in (0, 1):
        one, other = (torch.cat([batch[part].flatten() for batch in b]) for b in (few, many))
        assert torch.equal(one, other)
