"""Exports: the same model in Transformers, ONNX Runtime and llama.cpp, with its card and record.

python -m pytest tests/test_export.py
"""

import errno
import importlib.util
import json
import math
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from helpers import CHECKOUT, LINES, save_random_model
from safetensors.torch import load_file, save_file

import export
import import_model
import inspect_model
from bundle import read_bundle
from exporters import card, huggingface
from exporters.bpe import list_bpe
from exporters.card import format_cell
from exporters.huggingface import from_transformers, open_export
from exporters.source import load_source
from exporters.verify import compare_with_source
from tokenizer import CharTokenizer, GPT2Tokenizer, create_tokenizer
from trainer import train
from utils.output import run_command

SHAPE = {"n_embd": 64, "n_head": 2, "n_layer": 2, "block_size": 256}  # 200 tokens fit
TEXT = "\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FAMILY = "👨‍👩‍👧"  # three emoji and two zero-width joiners
VOCABULARIES = {
    "english": TEXT,
    "controls": "\0\t\r\n ab",
    "no space": "abc",
    "SentencePiece's space": "▁ ab",
    "emoji": FAMILY + "a ",
    "combining marks": "e\u0301\u0308 n\u0303",
    "words of markup": "</s>unkp|",
    "one character": "a",
    "20,000 characters": "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))),
}
VARIANTS = {
    "modern": {"architecture": "modern"},
    "modern, tied": {"architecture": "modern", "tie_weights": True},
    "modern, gelu": {"architecture": "modern", "activation": "gelu_tanh", "rope_theta": 5e4},
    "gpt2": {"architecture": "gpt2"},
    "gpt2, biases": {"architecture": "gpt2", "bias": True},
    "gpt2, untied": {"architecture": "gpt2", "tie_weights": False, "activation": "silu"},
    "gpt2, untied, biases": {"architecture": "gpt2", "tie_weights": False, "bias": True},
    "speedrun": {"architecture": "speedrun", "ngram_rows": 500},
}
for_each_variant = pytest.mark.parametrize("variant", VARIANTS)
for_each_variant_of_transformers = pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name != "speedrun"]
)
for_each_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """Generate short samples for the cards."""
    monkeypatch.setattr(card, "SAMPLE_TOKENS", 30)


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a random model as a bundle; keywords are settings."""

    def save(text: str = TEXT, **settings) -> Path:
        tokenizer = CharTokenizer(sorted(set(text)))
        save_random_model(tmp_path / "model", tokenizer, **{**SHAPE, **settings})
        return tmp_path / "model"

    return save


def run_export(*words: object) -> Path:
    """Export to the directory `out`, and return it."""
    assert run_command(export.main, [*map(str, words), "--out=out"]) == 0
    return Path("out").resolve()


def fail(main, *words: object, status: int = 2) -> None:
    assert run_command(main, list(map(str, words))) == status


# Transformers -----------------------------------------------------------------------------------


@for_each_variant_of_transformers
def test_transformers_computes_the_same_logits_and_greedy_text(save, variant):
    bundle = save(**VARIANTS[variant])
    directory = run_export(bundle, "--format=hf")
    found = compare_with_source(load_source(bundle), open_export(directory))
    assert found.difference <= 1e-4
    assert (found.agreeing, found.generated, found.is_text_same) == (200, 200, True)


@for_each_variant_of_transformers
def test_the_weights_come_back_bit_for_bit(save, variant):
    bundle = save(**VARIANTS[variant])
    tensors = load_file(run_export(bundle, "--format=hf") / "model.safetensors")
    before = load_file(bundle / "model.safetensors")
    after = from_transformers(tensors, read_bundle(bundle).config)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@for_each_variant_of_transformers
def test_transformers_saves_the_same_bytes_again(save, variant):
    directory = run_export(save(**VARIANTS[variant]), "--format=hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained("again")
    name = "model.safetensors"
    assert Path("again", name).read_bytes() == (directory / name).read_bytes()


@for_each_vocabulary
def test_a_text_of_any_vocabulary_has_the_same_ids_in_transformers(save, name):
    text = VOCABULARIES[name]
    bundle = save(text, n_embd=8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_export(bundle, "--format=hf"))
    many = text + text[::-1] + text[0] * 3
    ids = tokenizer(many, verbose=False).input_ids
    assert ids == load_source(bundle).tokenizer.encode(many).tolist()
    assert tokenizer.decode(ids) == many
    assert tokenizer.decode(ids, skip_special_tokens=True) == many


@for_each_vocabulary
def test_a_text_of_any_vocabulary_has_the_same_ids_without_transformers(name):
    text = VOCABULARIES[name]
    ours = CharTokenizer(sorted(set(text)))
    theirs = tokenizers.Tokenizer.from_str(huggingface.create_tokenizer(ours).to_str())
    ids = theirs.encode(text + text[::-1]).ids
    assert ids == ours.encode(text + text[::-1]).tolist()
    assert theirs.decode(ids) == text + text[::-1]


def test_transformers_leaves_out_characters_that_the_vocabulary_lacks(save):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_export(save("abc"), "--format=hf"))
    assert tokenizer("aZb\nc").input_ids == tokenizer("abc").input_ids


def test_a_pipeline_generates_and_a_batch_padded_on_the_left_is_that_of_single_prompts(save):
    directory = run_export(save(), "--format=hf")
    generator = transformers.pipeline("text-generation", model=str(directory))
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    prompts = ["To be", "or not to be, that is"]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**batch, **options))
    padding = len(prompts[1]) - len(prompts[0])
    assert [texts[0][padding:], texts[1]] == alone


def test_a_streamer_prints_the_text_that_is_generated(save, capsys):
    directory = run_export(save(), "--format=hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("To be", return_tensors="pt").input_ids
    capsys.readouterr()
    streamer = transformers.TextStreamer(tokenizer)
    generated = model.generate(ids, do_sample=False, max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(generated[0]).strip("\n")


def test_a_modern_model_sees_its_context_only_when_the_text_is_longer(save):
    bundle = save()
    model = transformers.AutoModelForCausalLM.from_pretrained(run_export(bundle, "--format=hf"))
    ids = torch.randint(0, len(TEXT), (1, 3 * SHAPE["block_size"]))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % len(TEXT)
    with torch.no_grad():
        one, two = model(ids).logits[0, -1], model(other).logits[0, -1]
    assert torch.equal(one, two)


@pytest.mark.slow
def test_gpt2s_vocabulary_is_exported_with_its_merges_and_padding_is_never_generated(
    gpt2_vocabulary, tmp_path
):
    tokenizer = GPT2Tokenizer()
    save_random_model(tmp_path / "model", tokenizer, **{**SHAPE, "n_embd": 8, "n_layer": 1})
    directory = run_export(tmp_path / "model", "--format=hf")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Hello, world!\n\n  don't 1234567 über 日本 👨‍👩‍👧 <|endoftext|> \t x"
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text
    padding = json.loads((directory / "generation_config.json").read_bytes())["suppress_tokens"]
    assert padding == list(range(50_257, 50_304))
    found = compare_with_source(load_source(tmp_path / "model"), open_export(directory))
    assert (found.difference <= 1e-4, found.agreeing) == (True, found.generated)


def test_a_bpe_of_one_s_own_is_exported_with_its_merges(tmp_path):
    tokenizer = create_tokenizer(LINES * 3 + FAMILY * 3, "bpe", 300)
    save_random_model(tmp_path / "model", tokenizer, **SHAPE)
    directory = run_export(tmp_path / "model", "--format=hf")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = f"To be, or not\n\n  don't {FAMILY} über 日本 \0\t\r x"
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text
    found = compare_with_source(load_source(tmp_path / "model"), open_export(directory))
    assert (found.difference <= 1e-4, found.agreeing) == (True, found.generated)


def test_the_merges_of_gpt2_are_its_50_000(gpt2_vocabulary):
    tokens, merges = list_bpe(GPT2Tokenizer())
    assert (len(tokens), len(merges), merges[0]) == (50_257, 50_000, ("Ġ", "t"))
    assert len(set(tokens)) == 50_257


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.05), ("bf16", 0.5)])
def test_half_precision_halves_the_file_and_stays_close(save, dtype, limit):
    bundle = save()
    directory = run_export(bundle, "--format=hf", f"--dtype={dtype}")
    sizes = [(place / "model.safetensors").stat().st_size for place in (bundle, directory)]
    assert sizes[1] < 0.55 * sizes[0]
    assert compare_with_source(load_source(bundle), open_export(directory)).difference < limit


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_n_gram_embeddings_are_refused_by_formats_that_lack_them(save, format, capsys):
    bundle = save(**VARIANTS["speedrun"])
    fail(export.main, bundle, f"--format={format}", "--out=out")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for fact in (str(bundle), "n-gram", "modern", "onnx", "html"):
        assert fact in error
    assert not any(Path().iterdir())


def test_a_weight_that_overflows_in_half_precision_is_an_error(save, tmp_path, capsys):
    bundle = save()
    save_random_model(bundle, CharTokenizer(sorted(set(TEXT))), std=1e6, **SHAPE)
    fail(export.main, bundle, "--format=hf", "--dtype=fp16", "--out=out")
    assert "bf16" in capsys.readouterr().err
    assert not Path("out").exists()


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny, quiet, tmp_path) -> Path:
    """The directory of a run on a text in a directory of a user's name."""
    text = tmp_path / "home" / "alighieri" / "comedy.txt"
    text.parent.mkdir(parents=True)
    text.write_text(LINES * 30, encoding="utf-8")
    return train(tiny(data=str(text), run_tag="comedy"), output=quiet).run_dir


def read_all(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.iterdir()))


@pytest.mark.parametrize("format", ["hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_no_file_has_a_path_of_the_machine_or_the_name_of_a_user(trained, format, tmp_path):
    content = read_all(run_export(trained, f"--format={format}"))
    for secret in (str(tmp_path), "alighieri", str(CHECKOUT), str(Path.home()), sys.prefix):
        assert secret.encode() not in content
    assert b"comedy.txt" in content


def test_the_card_has_what_is_known_of_the_training(trained):
    directory = run_export(trained, "--format=hf")
    text = (directory / "README.md").read_text(encoding="utf-8")
    state = read_bundle(trained / "artifacts" / "export").state
    record = json.loads((trained / "meta" / "full_config.json").read_bytes())
    facts = [
        "comedy.txt, 5,",
        record["run"]["data"]["sha256"],
        f"{state.val_loss:.4f} nats per character",
        f"{record['run']['parameters']:,} parameters",
        f"{state.step} of 6, batch 4 x 16 characters",
        torch.__version__,
        state.files["model.safetensors"],
        "AutoModelForCausalLM",
        "loss.svg",
    ]
    for fact in facts:
        assert fact in text, fact
    curve = (directory / "loss.svg").read_text(encoding="utf-8")
    assert curve.lstrip().startswith("<svg") and "polyline" in curve


def test_the_card_quotes_the_longest_stretch_that_stands_in_the_training_text(
    tiny, quiet, tmp_path
):
    path = tmp_path / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz\n" * 300, encoding="utf-8")
    settings = {"data": str(path), "max_iters": 60, "learning_rate": 3e-2}
    run = train(tiny(**settings), output=quiet).run_dir
    text = (run_export(run, "--format=hf") / "README.md").read_text(encoding="utf-8")
    (length, quoted) = re.search(r"verbatim .* has (\d+) characters: \"(.*)\"", text).groups()
    stretch = json.loads(f'"{quoted}"'.replace("\\\\", "\\"))
    assert len(stretch) == int(length) >= 4
    assert stretch in path.read_text(encoding="utf-8")
    path.write_text("another text " * 600, encoding="utf-8")
    run_command(export.main, [str(run), "--format=hf", "--out=again"])
    assert "another sample" in Path("again", "README.md").read_text(encoding="utf-8")


def test_a_bundle_without_its_run_has_a_card_that_says_what_is_not_known(save):
    text = (run_export(save(), "--format=hf") / "README.md").read_text(encoding="utf-8")
    assert "was not compared" in text and "loss.svg" not in text


def test_markup_in_a_stranger_s_record_is_text_in_the_card(save, tmp_path):
    save(data="/home/x/<script>[a](b)|`c`.txt")
    text = (run_export(tmp_path / "model", "--format=hf") / "README.md").read_text(encoding="utf-8")
    assert r"\<script\>\[a\](b)\|\`c\`.txt" in text and "<script>" not in text
    assert format_cell("a\nb") == r"a\\nb"


def test_the_card_of_an_imported_model_names_its_origin_and_no_training(save, tmp_path):
    origin = run_export(save(), "--format=hf")
    assert run_command(import_model.main, [str(origin), f"--out={tmp_path / 'imported'}"]) == 0
    assert run_command(export.main, [str(tmp_path / "imported"), "--format=hf", "--out=again"]) == 0
    text = Path("again", "README.md").read_text(encoding="utf-8")
    assert "imported:Qwen3 out" in text and "Shakespeare" not in text and "Seed" not in text


def test_exporting_twice_gives_the_same_bytes(save):
    bundle = save()
    one = run_export(bundle, "--format=hf")
    assert run_command(export.main, [str(bundle), "--format=hf", "--out=again"]) == 0
    names = [path.name for path in one.iterdir()]
    for name in names:
        assert (one / name).read_bytes() == Path("again", name).read_bytes(), name


def test_the_default_directory_is_named_for_the_model_and_the_format(trained):
    assert (
        run_command(export.main, [trained.name, "--format=hf", f"--runs-dir={trained.parent}"]) == 0
    )
    assert Path("exports", f"{trained.name}-hf", "config.json").exists()


def test_an_export_is_replaced_only_with_overwrite_and_nothing_else_ever(save, capsys):
    bundle = save()
    directory = run_export(bundle, "--format=hf")
    (directory / "README.md").write_text("mine", encoding="utf-8")
    fail(export.main, bundle, "--format=hf", "--out=out")
    assert "--overwrite" in capsys.readouterr().err
    assert (directory / "README.md").read_text(encoding="utf-8") == "mine"
    assert run_command(export.main, [str(bundle), "--format=hf", "--out=out", "--overwrite"]) == 0
    assert (directory / "README.md").read_text(encoding="utf-8") != "mine"
    Path("notes").mkdir()
    Path("notes", "diary.txt").write_text("dear diary", encoding="utf-8")
    fail(export.main, bundle, "--format=hf", "--out=notes", "--overwrite")
    assert [path.name for path in Path("notes").iterdir()] == ["diary.txt"]
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    fail(export.main, bundle, "--format=hf", "--out=out", "--overwrite")
    assert "notes.txt" in capsys.readouterr().err
    Path("link").symlink_to(directory)
    fail(export.main, bundle, "--format=hf", "--out=link", "--overwrite")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["link", "notes", "out"]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ([], "--format"),
        (["--format=pytorch"], "hf, onnx, gguf"),
        (["--format=hf", "--dtype=q8_0"], "fp32, fp16, bf16"),
        (["--format=onnx", "--dtype=fp16"], "fp32"),
        (["--format=hf", "--out=model/config.json"], "config.json"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(save, words, fact, capsys):
    bundle = save()
    os.chdir(bundle.parent)
    before = sorted(bundle.parent.rglob("*"))
    fail(export.main, "model", *words)
    error = capsys.readouterr().err.strip()
    assert fact in error.splitlines()[-1]
    assert sorted(bundle.parent.rglob("*")) == before


def test_a_missing_library_is_named_with_its_extra(save, monkeypatch, capsys):
    bundle = save()
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    fail(export.main, bundle, "--format=onnx", "--out=out")
    error = capsys.readouterr().err
    assert "onnxscript" in error and "[export]" in error


def test_a_damaged_bundle_is_named_and_nothing_is_written(save, capsys):
    bundle = save()
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    fail(export.main, bundle, "--format=hf", "--out=out")
    assert "model.safetensors" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_the_older_export_or_nothing(save, overwrite, monkeypatch, capsys):
    bundle = save()
    if overwrite:
        before = read_all(run_export(bundle, "--format=hf"))

    def fill_disk(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(huggingface, "write_durable", fill_disk)
    fail(export.main, bundle, "--format=hf", "--out=out", "--overwrite", status=1)
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in Path.cwd().iterdir()) == (["out"] if overwrite else [])
    if overwrite:
        assert read_all(Path("out")) == before


def test_ctrl_c_at_the_last_moment_leaves_the_older_export(save, monkeypatch):
    bundle = save()
    before = read_all(run_export(bundle, "--format=hf"))
    rename = Path.rename

    def interrupt(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    fail(export.main, bundle, "--format=hf", "--out=out", "--overwrite", status=130)
    assert read_all(Path("out")) == before
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(save, monkeypatch, capsys):
    write = huggingface.write

    def write_slowly(*arguments):
        write(*arguments)
        Path("out").mkdir()
        Path("out", "diary.txt").write_text("dear diary", encoding="utf-8")

    monkeypatch.setattr(huggingface, "write", write_slowly)
    fail(export.main, save(), "--format=hf", "--out=out")
    assert [path.name for path in Path.cwd().rglob("*")] == ["out", "diary.txt"]


def test_verify_prints_a_line_with_the_library_and_the_figures(save, capsys):
    assert run_command(export.main, [str(save()), "--format=hf", "--out=out", "--verify"]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "logits" in each]
    assert transformers.__version__ in line


def test_verify_without_its_library_names_the_extra_before_any_work(save, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    fail(export.main, save(), "--format=hf", "--out=out", "--verify")
    error = capsys.readouterr().err
    assert "transformers" in error and "[export]" in error
    assert not Path("out").exists()


def test_a_program_that_cannot_load_the_export_is_one_line(save, monkeypatch, capsys):
    def refuse(directory):
        raise LookupError("no such architecture")

    monkeypatch.setattr(huggingface, "open_export", refuse)
    fail(export.main, save(), "--format=hf", "--out=out", "--verify", status=1)
    assert "no such architecture" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("dtype", "change"), [("fp32", 0.0), ("fp32", math.nan), ("fp16", 0.0), ("bf16", 0.0)]
)
def test_a_changed_weight_is_more_than_the_rounding_of_any_dtype(save, dtype, change):
    bundle = save()
    directory = run_export(bundle, "--format=hf", f"--dtype={dtype}")
    source = load_source(bundle)
    assert compare_with_source(source, open_export(directory)).is_equal(dtype)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = change
    save_file(tensors, path, metadata={"format": "pt"})
    assert not compare_with_source(source, open_export(directory)).is_equal(dtype)


# Whether an export still is what a model gave ----------------------------------------------------


def test_an_export_is_the_model_s_until_a_file_or_a_weight_changes(save, capsys):
    bundle = save()
    directory = run_export(bundle, "--format=hf")
    verify = [str(bundle), f"--verify={directory}"]
    assert run_command(inspect_model.main, verify) == 0
    assert str(bundle) in capsys.readouterr().out
    (directory / "README.md").write_text("changed", encoding="utf-8")
    assert run_command(inspect_model.main, verify) == 1
    assert "README.md" in capsys.readouterr().out
    (directory / "export.json").unlink()  # a directory of Transformers, without a record
    assert run_command(inspect_model.main, verify) == 0
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    capsys.readouterr()
    assert run_command(inspect_model.main, verify) == 1
    assert "differs" in capsys.readouterr().out
    weights.write_bytes(b"nothing")
    assert run_command(inspect_model.main, verify) == 2
    capsys.readouterr()
    assert run_command(inspect_model.main, [str(bundle), "--verify=exports/typo"]) == 2
    assert "exports/typo: no such export" in capsys.readouterr().err


def test_an_export_of_another_model_is_not_the_model_s(save, tmp_path, capsys):
    directory = run_export(save(), "--format=hf")
    save_random_model(tmp_path / "other", CharTokenizer(sorted(set(TEXT))), std=0.1, **SHAPE)
    assert run_command(inspect_model.main, [str(tmp_path / "other"), f"--verify={directory}"]) == 1
    assert "other weights" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--last"], []])
def test_the_step_of_a_run_that_was_exported_is_found(trained, words):
    directory = run_export(trained, "--format=hf", *words)
    assert run_command(inspect_model.main, [str(trained), f"--verify={directory}"]) == 0


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_a_gguf_is_verified_in_its_directory_and_alone(save, dtype, tmp_path, capsys):
    bundle = save()
    directory = run_export(bundle, "--format=gguf", f"--dtype={dtype}")
    (file,) = directory.glob("*.gguf")
    alone = file.rename(tmp_path / "alone.gguf")
    assert run_command(inspect_model.main, [str(bundle), f"--verify={alone}"]) == 0
    alone.rename(file)
    assert run_command(inspect_model.main, [str(bundle), f"--verify={directory}"]) == 0
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    fail(inspect_model.main, bundle, f"--verify={file}", status=1)
    fail(inspect_model.main, bundle, f"--verify={directory}", status=1)
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_no_file_of_transformers_or_llama_cpp_is_verified_as_a_model_with_n_grams(
    save, format, tmp_path, capsys
):
    directory = run_export(save(), f"--format={format}")
    (directory / "export.json").unlink()
    place = directory if format == "hf" else next(directory.glob("*.gguf"))
    save_random_model(
        tmp_path / "other", CharTokenizer(sorted(set(TEXT))), **SHAPE, **VARIANTS["speedrun"]
    )
    fail(inspect_model.main, tmp_path / "other", f"--verify={place}")
    assert "n-gram" in capsys.readouterr().err


def test_a_gguf_that_claims_an_endless_array_is_refused(save, tmp_path):
    claim = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)  # magic, version, no tensor, one field
    claim += struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 2**60)  # its name, an array of bytes
    (tmp_path / "forged.gguf").write_bytes(claim)
    fail(inspect_model.main, save(), f"--verify={tmp_path / 'forged.gguf'}")


def test_a_file_far_larger_than_the_model_is_not_read(save, tmp_path, capsys):
    directory = run_export(save(), "--format=hf")
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(1 << 40)  # a sparse file of a terabyte
    (directory / "export.json").unlink()
    fail(inspect_model.main, tmp_path / "model", f"--verify={directory}", status=1)
    assert "too large" in capsys.readouterr().out


def test_the_model_of_an_export_is_found_by_its_run(trained, capsys):
    directory = run_export(trained, "--format=hf")
    words = [f"--verify={directory}", f"--runs-dir={trained.parent}"]
    assert run_command(inspect_model.main, words) == 0
    assert trained.name in capsys.readouterr().out
    fail(inspect_model.main, "--verify=nowhere")
