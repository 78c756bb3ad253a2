"""evaluate.py: the losses of a text, the score, the surprise view.

python -m pytest tests/test_evaluate.py
"""

import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BUNDLE_CONFIG, CHECKOUT, save_bundle
from rich.console import Console

import evaluate
from bundle import TRAINING_SETTINGS, read_state
from corpus import EncodedCorpus
from data import load_dataset
from evaluate import (
    HEAT,
    Piece,
    compute_score,
    compute_token_losses,
    count_first_tokens,
    draw_surprise,
    find_window_starts,
    format_surprise_table,
    get_heat_style,
    print_surprise,
    split_pieces,
)
from model import LanguageModel
from tokenizer import CharTokenizer, create_tokenizer
from trainer import estimate_loss, train
from utils.errors import UserError
from utils.output import Output
from utils.tables import align_columns

KEYS = (
    "model step data split tokens characters bytes loss perplexity bits_per_character "
    "bits_per_byte stride block_size quantize seconds"
).split()


def make_random_model(config, vocab_size: int) -> LanguageModel:
    """Create an untrained model whose predictions depend on all tokens and their positions."""
    torch.manual_seed(1)
    model = LanguageModel(config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def random_ids(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(vocab_size, size=count).astype(np.uint8)


@torch.no_grad()
def predict_one_by_one(model: LanguageModel, ids: np.ndarray, stride: int) -> list[float]:
    """Compute `compute_token_losses` plainly: one forward pass for each token."""
    T, losses = model.block_size, []
    for target in range(1, len(ids)):
        start = 0
        while start + T < target:  # the first window that has the token as a target
            start += stride
        seen = torch.from_numpy(ids[start:target].astype(np.int64))[None]
        logits = model.eval()(seen)[0][0, -1]
        losses.append(-torch.log_softmax(logits, dim=0)[int(ids[target])].item())
    return losses


@pytest.fixture
def saved(tmp_path):
    """Save a model of the characters a, b and c, with T = 4; keywords change its record."""

    def save(**training) -> str:
        settings = {name: getattr(BUNDLE_CONFIG, name) for name in TRAINING_SETTINGS}
        facts = {"data_sha256": "0" * 64, "start_step": 0}
        save_bundle(tmp_path / "saved", training_config={**settings, **facts, **training})
        return str(tmp_path / "saved")

    return save


@pytest.fixture
def abc_file(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("abcabbcca" * 10, encoding="utf-8")
    return path


@pytest.fixture
def results(capsys):
    """Evaluate, and return the object that --json prints."""

    def run(*flags) -> dict:
        assert evaluate.main([*map(str, flags), "--json", "--device=cpu"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


# ----------------------------------------------------------------------------------------------
# Losses and score


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [2, 4, 5, 6, 8, 9, 14])
def test_the_losses_are_those_of_one_forward_pass_for_each_token(tiny, architecture, stride, count):
    model = make_random_model(tiny(architecture=architecture, block_size=4), 7)
    ids = random_ids(count, 7)
    losses = compute_token_losses(model, ids, stride)
    assert losses.dtype == np.float32
    assert losses.shape == (count - 1,)
    np.testing.assert_allclose(losses, predict_one_by_one(model, ids, stride), atol=1e-4)


def test_the_number_of_windows_in_a_batch_affects_rounding_only(tiny, monkeypatch):
    model, ids = make_random_model(tiny(), 7), random_ids(500, 7)
    many = compute_token_losses(model, ids, 5)
    monkeypatch.setattr("utils.evaluation.MAX_ELEMENTS_CPU", 1)
    np.testing.assert_allclose(compute_token_losses(model, ids, 5), many, atol=1e-4)


def test_the_windows_predict_each_token_once_and_none_predicts_nothing():
    for T in (1, 2, 5):
        for stride in range(1, T + 1):
            for tokens in range(2, 20):
                predicted = np.zeros(tokens, dtype=int)
                for start in find_window_starts(tokens, T, stride):
                    known = T - stride if start else 0
                    part = predicted[start + 1 + known : start + 1 + T]
                    assert part.size
                    part += 1
                assert predicted.tolist() == [0, *[1] * (tokens - 1)]


@pytest.mark.parametrize("extra", [0, 1, 7])
def test_with_a_stride_of_block_size_the_loss_is_that_of_trainings_evaluation(
    tiny, text_file, extra
):
    config = tiny(eval_iters=0, train_split=0.5)
    text = text_file.read_text(encoding="utf-8")
    half = 16 * 50 + 1 + extra  # 50 windows, and a tail
    text_file.write_text(text[: 2 * half], encoding="utf-8")
    dataset = load_dataset(config)
    assert dataset.splits["val"].size == half
    model = make_random_model(config, dataset.tokenizer.vocab_size)
    losses = compute_token_losses(model, dataset.splits["val"], 16)
    expected = estimate_loss(model, dataset, config)["val"]
    assert losses.mean(dtype=np.float64) == pytest.approx(expected, rel=1e-5)


def test_per_token_losses_average_to_the_mean_loss(tiny):
    model, ids = make_random_model(tiny(block_size=8), 7), random_ids(3 * 8 + 1, 7)
    windows = torch.from_numpy(ids.astype(np.int64))
    _, mean = model(windows[:-1].view(3, 8), windows[1:].view(3, 8))
    losses = compute_token_losses(model, ids, stride=8)
    assert losses.shape == (24,)
    assert losses.mean() == pytest.approx(mean.item(), rel=1e-5)


def test_dropout_is_off_and_the_models_mode_is_restored(tiny):
    model, ids = make_random_model(tiny(dropout=0.5), 7), random_ids(60, 7)
    model.train()
    losses = compute_token_losses(model, ids, 16)
    assert model.training
    np.testing.assert_array_equal(losses, compute_token_losses(model.eval(), ids, 16))
    assert not model.training


def test_the_splits_are_those_of_training(tiny):
    config = tiny(train_split=0.61, test_split=0.17)
    splits = load_dataset(config).splits
    ids = np.concatenate(list(splits.values()))
    ranges = EncodedCorpus(ids, create_tokenizer("ab"), [ids.size]).split(config)
    for split, expected in splits.items():
        np.testing.assert_array_equal(ids[slice(*ranges[split])], expected)


def test_bits_are_per_character_and_per_byte_of_the_predicted_text():
    tokenizer = CharTokenizer(["a", "é", "漢"])
    ids = tokenizer.encode("漢aéé漢")  # after the first: 1 + 2 + 2 + 3 bytes
    losses = np.array([1, 2, 3, 4], dtype=np.float32) * math.log(2)
    score = compute_score(losses, ids, tokenizer)
    assert (score.tokens, score.characters, score.bytes) == (4, 4, 8)
    assert score.bits_per_character == pytest.approx(10 / 4)
    assert score.bits_per_byte == pytest.approx(10 / 8)
    assert score.loss == pytest.approx(10 / 4 * math.log(2))
    assert score.perplexity == pytest.approx(2 ** (10 / 4))


def test_a_sum_of_many_losses_is_exact():
    losses = np.full(3_000_000, 0.1, dtype=np.float32)
    tokenizer = CharTokenizer(["a"])
    score = compute_score(losses, np.zeros(losses.size + 1, dtype=np.uint8), tokenizer)
    assert score.loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_a_perplexity_beyond_the_largest_float_is_infinite():
    losses = np.full(3, 1000, dtype=np.float32)
    score = compute_score(losses, np.zeros(4, dtype=np.uint8), CharTokenizer(["a"]))
    assert (score.loss, score.perplexity) == (1000, math.inf)


def test_bpe_tokens_count_by_their_characters(gpt2_vocabulary):
    tokenizer = create_tokenizer("", "gpt2")
    ids = tokenizer.encode("once naïve 🙂")
    score = compute_score(np.ones(ids.size - 1, dtype=np.float32), ids, tokenizer)
    assert score.tokens == ids.size - 1
    assert score.characters == len(" naïve 🙂")
    assert score.bytes == len(" naïve 🙂".encode())


# ----------------------------------------------------------------------------------------------
# The command


def test_the_default_is_the_newest_runs_val_split_with_the_loss_of_training(
    tiny, quiet, capsys, text_file
):
    run = train(tiny(eval_iters=0), output=quiet)
    assert evaluate.main(["--json", "--device=cpu"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    result = json.loads(out)
    assert list(result) == KEYS
    state = read_state(run.export_dir)
    assert result["loss"] == pytest.approx(state.val_loss, rel=1e-5)
    assert result["model"] == str(run.export_dir)
    assert (result["step"], result["split"], result["data"]) == (state.step, "val", str(text_file))
    assert result["tokens"] == load_dataset(tiny()).splits["val"].size - 1
    assert (result["stride"], result["block_size"]) == (16, 16)


def test_json_is_alone_on_stdout_even_if_colours_are_forced(saved, abc_file, folio):
    flags = [saved(), "--data", abc_file, "--json", "--device=cpu"]
    done = folio("evaluate.py", *flags, env={"FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{\n")
    assert done.stdout.endswith("}\n")
    assert list(json.loads(done.stdout)) == KEYS


def test_a_users_mistake_exits_2_without_a_traceback(saved, folio):
    done = folio("evaluate.py", saved(), "--data", "nowhere.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere.txt")
    assert done.stderr.count("\n") == 1


def test_a_model_trained_on_the_sample_corpus_is_evaluated_on_it(
    tiny, quiet, capsys, text_file, monkeypatch
):
    text = text_file.read_text(encoding="utf-8")
    monkeypatch.setattr("corpus.load_sample_corpus", lambda **options: text)
    run = train(tiny(data=None, eval_iters=0), output=quiet)
    Path("input.txt").write_text("another", encoding="utf-8")
    assert evaluate.main(["--json", "--device=cpu"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert json.loads(out)["data"] == "Shakespeare's plays"
    assert json.loads(out)["loss"] == pytest.approx(read_state(run.export_dir).val_loss, rel=1e-5)


@pytest.mark.parametrize("token_store", ["on", "off"])
def test_a_model_of_several_files_is_evaluated_on_the_files_of_its_val_split(
    tiny, quiet, capsys, tmp_path, token_store
):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abcde":
        (folder / f"{name}.txt").write_text(f"{name}: To be, or not to be.\n" * 40)
    settings = {"data": str(folder), "split_by": "file", "eval_iters": 0, "token_store": "on"}
    run = train(tiny(**settings), output=quiet)
    flags = ["--json", "--device=cpu", f"--token-store={token_store}"]
    assert evaluate.main(flags) == 0
    out, error = capsys.readouterr()
    assert error == ""
    result = json.loads(out)
    assert (result["tokens"], result["data"]) == (24 * 40 - 1, str(folder))
    assert result["loss"] == pytest.approx(read_state(run.export_dir).val_loss, rel=1e-5)
    with gzip.open(tmp_path / "e.gz", "wb") as packed:
        packed.write((folder / "e.txt").read_bytes())
    assert evaluate.main([*flags, "--data", str(tmp_path / "e.gz")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["loss"], again["bits_per_byte"]) == (result["loss"], result["bits_per_byte"])


def test_unknown_characters_of_a_token_store_are_an_error_or_skipped(saved, results):
    Path("accents").write_text("abcéaü" * 9, encoding="utf-8")
    flags = [saved(), "--data", "accents", "--token-store", "on"]
    with pytest.raises(UserError, match=r"accents: .*'é' 'ü'.*--on-unknown skip"):
        evaluate.main(flags)
    skipped = results(*flags, "--on-unknown", "skip")
    assert skipped["tokens"] == 4 * 9 - 1
    assert skipped == {**results(*flags[:3], "--on-unknown=skip"), "seconds": skipped["seconds"]}


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_a_bpe_model_has_the_loss_of_its_training(tiny, quiet, results, gpt2_vocabulary, tokenizer):
    changes = {"tokenizer": tokenizer, "max_iters": 1, "eval_iters": 0, "batch_size": 1}
    run = train(tiny(**changes, n_embd=4, n_head=1, n_layer=1, sample_interval=0), output=quiet)
    result = results()
    assert result["loss"] == pytest.approx(read_state(run.export_dir).val_loss, rel=1e-5)
    assert result["bits_per_byte"] < result["loss"] / math.log(2) / 2  # two bytes a token, or more
    assert result["characters"] == result["bytes"] > 2 * result["tokens"]


def test_a_model_may_be_named_in_four_ways(saved, abc_file, results, tmp_path):
    model = saved()
    (tmp_path / "cwd" / "checkpoints").mkdir()
    (tmp_path / "saved").rename(tmp_path / "cwd" / "checkpoints" / "small")
    ways = (
        ["--run", "checkpoints/small"],
        ["small"],
        ["--model-name", "small"],
        ["--model-name=small", "--checkpoints-dir", str(tmp_path / "cwd" / "checkpoints")],
    )
    found = [results(*way, "--data", abc_file) for way in ways]
    assert len({result["loss"] for result in found}) == 1
    assert model != found[0]["model"]


def test_a_given_text_is_evaluated_as_a_whole_or_by_a_split(saved, abc_file, results):
    model = saved(test_split=0.2, train_split=0.6)
    count = len(abc_file.read_text(encoding="utf-8"))
    whole = results(model, "--data", abc_file)
    assert (whole["split"], whole["tokens"]) == (None, count - 1)
    parts = [
        results(model, "--data", abc_file, "--split", split)["tokens"] + 1
        for split in ("train", "val", "test")
    ]
    assert sum(parts) == count
    assert all(part < count for part in parts)


def test_each_stride_has_another_loss_and_the_default_is_block_size(saved, abc_file, results):
    model = saved()
    losses = [results(model, "--data", abc_file, "--stride", n)["loss"] for n in (1, 2, 4)]
    assert len(set(losses)) == 3
    default = results(model, "--data", abc_file)
    assert (default["loss"], default["stride"]) == (losses[2], 4)


@pytest.mark.parametrize("text", ["ab", "abc", "abca", "abcab"])
def test_a_text_shorter_than_a_window_is_evaluated(saved, abc_file, results, text):
    abc_file.write_text(text, encoding="utf-8")
    assert results(saved(), "--data", abc_file)["tokens"] == len(text) - 1


def test_on_unknown_skip_leaves_out_unknown_characters_with_a_note(
    saved, abc_file, capsys, results
):
    model = saved()
    expected = results(model, "--data", abc_file)
    dirty = abc_file.read_text(encoding="utf-8").replace("ab", "aéb")
    abc_file.write_text("\ufeff" + dirty, encoding="utf-8")
    flags = [model, f"--data={abc_file}", "--on-unknown=skip", "--json", "--device=cpu"]
    assert evaluate.main(flags) == 0
    out, error = capsys.readouterr()
    assert error.startswith(f"{abc_file}: left out {dirty.count('é')} characters")
    assert error.count("\n") == 1
    result = json.loads(out)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}


def test_characters_dropped_in_training_are_dropped_in_evaluation(saved, abc_file, capsys):
    abc_file.write_text("abcxabc" * 20, encoding="utf-8")
    model = saved(data=str(abc_file), on_new_chars="drop")
    assert evaluate.main([model, "--split=train", "--json", "--device=cpu"]) == 0
    out, error = capsys.readouterr()
    assert "left out 20 characters" in error
    assert json.loads(out)["tokens"] == 107  # 120 * 0.9, without the first


def test_a_text_changed_since_training_is_evaluated_with_a_warning(saved, abc_file, capsys):
    assert evaluate.main([saved(data=str(abc_file)), "--device=cpu"]) == 0
    out, error = capsys.readouterr()
    assert error.startswith(f"warning: {abc_file} has changed")
    assert error.count("\n") == 1
    assert "its val split" in out


def test_the_score_is_printed_as_aligned_rows_of_key_and_value(saved, abc_file, capsys, results):
    model = saved()
    result = results(model, "--data", abc_file)
    assert evaluate.main([model, f"--data={abc_file}", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model               {model}, step 7"
    assert lines[1] == f"text                {abc_file}"
    assert lines[2].startswith("predicted           89 characters; 23 windows of 4, stride 4, ")
    assert lines[3].startswith(f"loss                {result['loss']:.4f} nats per character")
    assert "whole text" in lines[3]
    assert lines[4] == f"perplexity          {result['perplexity']:.4f}"
    assert lines[5] == f"bits per character  {result['bits_per_character']:.4f}"
    assert lines[6] == f"bits per byte       {result['bits_per_byte']:.4f}"
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "dev"], "train, val or test"),
        (["--split", "test"], "--split test"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "void"], "void: "),
        (["--data", "binary"], "binary: not UTF-8"),
        (["--data", "empty"], "empty: "),
        (["--data", "mark"], "mark: "),
        (["--data", "one"], "one: it has 1 character"),
        (["--data", "few", "--split", "val"], "few: its val split has 1 character"),
        (["--data", "accents"], "'é' 'ü'"),
        (["--data", "few", "--stride", "5"], "block_size 4"),
        (["--data", "few", "--stride", "0"], "--stride"),
        (["--data", "few", "--show", "-1"], "--show"),
        (["--data", "few", "--show", "9", "--json"], "--show"),
        (["--data", "few", "--model-name", "x"], "--model-name"),
        (["--data", "few", "--device", "cuda:9"], "--device cuda:9"),
        ([], "gone.txt"),
        (["--dta", "few"], "--data?"),
    ],
)
def test_a_users_mistake_is_a_one_line_error(saved, tmp_path, flags, words):
    files = {"empty": b"", "mark": b"\xef\xbb\xbf", "one": b"a", "few": b"abc" * 3}
    files |= {"binary": b"ab\n\xff\xfe", "accents": "abcéaü".encode()}
    for name, content in files.items():
        (tmp_path / "cwd" / name).write_bytes(content)
    (tmp_path / "cwd" / "void").mkdir()
    with pytest.raises(UserError) as caught:
        evaluate.main([saved(data=str(tmp_path / "gone.txt")), *flags])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_with_a_named_model_and_no_model_at_all_are_errors(tmp_path):
    with pytest.raises(UserError, match="--run and --model-name"):
        evaluate.main(["--run=x", "--model-name=y"])
    with pytest.raises(UserError, match="runs"):
        evaluate.main([])


def test_mistakes_are_reported_without_importing_torch(saved, abc_file):
    abc_file.write_text("xyz", encoding="utf-8")
    code = (
        "import sys, evaluate\n"
        "for flags in (['--stride=9'], ['--data=no'], ['--split=test'], ['--data', sys.argv[2]]):\n"
        "    try:\n"
        "        evaluate.main([sys.argv[1], *flags])\n"
        "    except evaluate.UserError:\n"
        "        continue\n"
        "    sys.exit('no error')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, saved(), str(abc_file)]
    assert subprocess.run(command, cwd=CHECKOUT).returncode == 0


# ----------------------------------------------------------------------------------------------
# Surprise


def open_terminal(**environment) -> tuple[Output, io.StringIO]:
    stream = io.StringIO()
    output = Output(stream=stream)
    output.console = Console(
        file=stream,
        force_terminal=True,
        color_system="truecolor",
        width=20,
        markup=False,
        _environ=environment,
    )
    return output, stream


SHOWN = [Piece("a", math.nan), Piece("\n", 8.0), Piece("[b]", 0.0), Piece("c", 4.0)]


def test_on_a_terminal_each_piece_is_on_the_colour_of_its_bits():
    output, stream = open_terminal()
    print_surprise(output, SHOWN, "character")
    calm, hot = (";".join(map(str, HEAT[index])) for index in (0, -1))
    drawn = stream.getvalue()
    assert f"\na\x1b[38;2;0;0;0;48;2;{hot}m↵\x1b[0m\n" in drawn
    assert f"\x1b[38;2;0;0;0;48;2;{calm}m[b]\x1b[0m" in drawn
    assert "surprise: 0 bits " in drawn
    assert drawn.endswith(" 8 bits and more\n")


def test_long_lines_are_not_wrapped():
    output, stream = open_terminal()
    print_surprise(output, [Piece("word ", 1.0)] * 30, "token")
    assert stream.getvalue().split("\n")[1].count("word ") == 30


def open_file() -> tuple[Output, io.StringIO]:
    stream = io.StringIO()
    return Output(stream=stream), stream


def test_without_colours_the_positions_with_the_highest_bits_are_listed():
    for output, stream in (open_terminal(NO_COLOR="1"), open_file()):
        print_surprise(output, SHOWN, "character")
        assert "\x1b" not in stream.getvalue()
        assert [line.split() for line in stream.getvalue().splitlines()[2:]] == [
            ["bits", "at", "text", "before", "character", "text", "after"],
            ["8.0", "2", "a", "↵", "[b]c"],
            ["4.0", "6", "a↵[b]", "c"],
            ["0.0", "3", "a↵", "[b]", "c"],
        ]


def test_the_table_has_the_ten_highest_in_descending_order():
    costs = np.random.default_rng(0).permutation(40) / 4
    shown = [Piece("x", cost) for cost in costs]
    rows = [line.split() for line in format_surprise_table(shown, "character").splitlines()[2:]]
    assert [float(row[0]) for row in rows] == [
        float(f"{cost:.1f}") for cost in sorted(costs)[:-11:-1]
    ]
    assert int(rows[0][1]) == int(np.argmax(costs)) + 1


def test_each_half_bit_has_its_colour_up_to_8_bits():
    assert len({get_heat_style(bits / 2) for bits in range(17)}) == 17
    assert get_heat_style(8.0) == get_heat_style(30.0)
    assert get_heat_style(0.0) == get_heat_style(-1e-7)
    assert get_heat_style(math.nan) == ""


def test_every_colour_has_wcag_contrast_to_black_letters():
    for bits in range(9):
        channels = bytes.fromhex(get_heat_style(float(bits))[-6:])
        red, green, blue = (
            c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels
        )
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert (luminance + 0.05) / 0.05 >= 4.5  # WCAG's contrast for text


def test_control_characters_are_escaped():
    text = "\x1b]0;title\x07\x9b31m\u202e\x00\x7f"
    shown = [Piece(char, 1.0) for char in text]
    assert draw_surprise(shown).plain.startswith("\\x1b]0;title\\x07\\x9b31m\\u202e\\x00\\x7f\n")
    assert format_surprise_table(shown, "character").replace("\n", "").isprintable()


@pytest.mark.parametrize(("text", "shown"), [("a\rb", "a↵\nb"), ("a\r\nb", "a\\r↵\nb")])
def test_a_cr_is_shown_as_a_line_end_and_before_one_by_its_name(text, shown):
    assert draw_surprise([Piece(char, 1.0) for char in text]).plain.startswith(shown + "\n\n")


def test_pieces_are_characters_with_their_bits():
    tokenizer = CharTokenizer(["a", "b", "\ufffd"])
    ids = tokenizer.encode("ab\ufffdba")
    losses = np.array([1, 2, 3, 4]) * math.log(2)
    found = split_pieces(ids, losses, tokenizer)
    assert [piece.text for piece in found] == ["a", "b", "\ufffd", "b", "a"]
    assert math.isnan(found[0].bits)
    assert [piece.bits for piece in found[1:]] == pytest.approx([1, 2, 3, 4])
    counts = [count_first_tokens(ids, tokenizer, characters) for characters in (1, 2, 4, 99)]
    assert counts == [2, 2, 4, 5]


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_character_of_several_bpe_tokens_is_one_piece_with_the_sum_of_their_bits(
    gpt2_vocabulary, kind
):
    tokenizer = create_tokenizer("Hello world! " * 9, kind)
    text = "Hello world 漢🙂!"
    ids = tokenizer.encode(text)
    found = split_pieces(ids, np.full(ids.size - 1, math.log(2)), tokenizer)
    assert "".join(piece.text for piece in found) == text
    assert found[1].text == " world"
    assert all(piece.text for piece in found)
    assert len(found) < ids.size
    assert sum(piece.bits for piece in found[1:]) == pytest.approx(ids.size - 1)
    assert tokenizer.decode(ids[: count_first_tokens(ids, tokenizer, 13)]) == "Hello world 漢"


def test_show_prints_the_table_after_the_score(saved, abc_file, capsys):
    assert evaluate.main([saved(), f"--data={abc_file}", "--show=40", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[7] == ""
    assert "first 40 characters" in lines[8]
    assert len(lines) == 20


def test_show_evaluates_only_what_it_shows(saved, abc_file, capsys, monkeypatch):
    read, compute = [], evaluate.compute_token_losses

    def compute_and_note(model, tokens, *arguments):
        read.append(tokens.size)
        return compute(model, tokens, *arguments)

    monkeypatch.setattr(evaluate, "compute_token_losses", compute_and_note)
    assert evaluate.main([saved(), f"--data={abc_file}", "--show=40", "--device=cpu"]) == 0
    assert read == [40]
    assert "first 40 characters" in capsys.readouterr().out.splitlines()[3]


def test_a_table_with_wide_characters_is_aligned():
    before, after = align_columns([("日本", "a"), ("x", "b")]).splitlines()
    assert (before, after) == ("日本  a", "x     b")
