"""GGUF: llama.cpp computes the same logits, generates the same text and has the same tokens.

python -m pytest tests/test_export_gguf.py
python -m pytest -m slow tests/test_export_gguf.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf as gguf_library
import numpy as np
import pytest
import torch
from helpers import CHECKOUT, LINES, save_random_model

import export
from bundle import WEIGHTS_FILE
from decode_torch import TorchEngine
from engine import SamplingParams
from exporters import gguf, llamacpp, verify
from exporters.source import load_source
from exporters.verify import is_same
from generate import generate_tokens
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer
from utils.errors import UserError
from utils.output import run_command

pytest.importorskip("xllamacpp")

TEXT = "\n !',-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHAPE = {"n_embd": 64, "n_head": 2, "n_layer": 2, "block_size": 256}
GPT2 = {"architecture": "gpt2", "activation": "gelu_tanh"}
VARIANTS = {
    "modern": {},
    "modern, tied": {"tie_weights": True, "rope_theta": 5e4},
    "modern, wide": {"n_embd": 72},  # no multiple of 32
    "gpt2": GPT2,
    "gpt2, biases": {**GPT2, "bias": True},
    "gpt2, untied": {**GPT2, "bias": True, "tie_weights": False},
    "gpt2, exact GELU": {"architecture": "gpt2", "activation": "gelu"},
}
FAMILY = "👨‍👩‍👧"  # three emoji and two zero-width joiners
VOCABULARIES = {
    "controls": "\0\t\r\n ab",
    "no space": "abc",
    "SentencePiece's space": "▁ ab",
    "emoji": FAMILY + "a ",
    "combining marks": "e\u0301\u0308 n\u0303",
    "escapes": "\\x0a'\"ntr",
    "special tokens": "</s>unkp|",
    "one character": "a",
    "20,000 characters": "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))),
}


@pytest.fixture
def convert(tmp_path):
    """Return a function that saves a random model and exports it; keywords are settings."""
    opened = []

    def convert(tokenizer=None, dtype="fp32", std=0.1, **settings):
        tokenizer = tokenizer or CharTokenizer(sorted(TEXT))
        save_random_model(tmp_path / "model", tokenizer, std=std, **{**SHAPE, **settings})
        source = load_source(tmp_path / "model")
        gguf.check(source, dtype)
        directory = tmp_path / f"export{len(opened)}"
        directory.mkdir()
        (path,) = gguf.write(source, directory, dtype, "model")
        opened.append(gguf.open_export(directory))
        return source, opened[-1], path

    yield convert
    for model in opened:
        model.close()


@torch.no_grad()
def measure(source, model) -> float:
    """Return the largest difference of the logits of 100 tokens."""
    tokens = source.tokenizer.num_tokens
    ids = np.random.default_rng(1).integers(tokens, size=100)
    ours = source.model(ids)[0][0, :, :tokens].numpy()
    theirs = model.compute_logits(ids)
    assert theirs.shape == ours.shape and theirs.dtype == np.float32
    return float(np.abs(ours - theirs).max())


def count_agreeing(source, model, n: int = 200) -> int:
    """Return how many tokens of greedy text are the same, from the first one on."""
    start = source.tokenizer.encode(source.tokenizer.default_prompt)
    params = SamplingParams(temperature=0)
    ours = generate_tokens(TorchEngine(source.model), start, n, params)[0, len(start) :]
    same = ours == model.generate(np.asarray(start), n)
    return n if same.all() else int(np.argmin(same))


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_has_the_same_logits_and_greedy_text(variant, convert):
    source, model, _ = convert(**VARIANTS[variant])
    # llama.cpp looks its approximation of GELU up in a table of float16.
    assert measure(source, model) < (1e-4 if "modern" in variant else 2e-3)
    assert count_agreeing(source, model) == 200


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.01), ("bf16", 0.1), ("q8_0", 0.2)])
@pytest.mark.parametrize("variant", ["modern", "modern, wide", "gpt2, biases"])
def test_smaller_types_round_the_logits(dtype, limit, variant, convert):
    source, model, path = convert(dtype=dtype, **VARIANTS[variant])
    assert 1e-5 < measure(source, model) < limit
    sizes = {"fp16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
    is_halved = dtype == "q8_0" and variant == "modern, wide"
    size = 2.0 if is_halved else sizes[dtype]
    matrices = sum(tensor.numel() for tensor in source.weights.values() if tensor.dim() > 1)
    assert path.name == f"model-{gguf.SUFFIXES[dtype]}.gguf"
    assert abs(path.stat().st_size / (size * matrices) - 1) < (0.6 if "gpt2" in variant else 0.35)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_text_of_any_vocabulary_has_the_same_ids_in_llama_cpp(name, convert):
    text = VOCABULARIES[name]
    source, model, _ = convert(CharTokenizer(sorted(set(text))), n_embd=8, n_layer=1)
    many = text + text[::-1] + text[0] * 3
    ids = model.encode(many)
    assert ids == source.tokenizer.encode(many).tolist()
    assert model.decode(ids) == many
    assert measure(source, model) < 1e-4


def test_a_character_that_the_vocabulary_lacks_ends_in_an_unknown_token_and_not_in_a_loop(convert):
    """Without a token for its first byte, llama.cpp's tokenizer never returns."""
    _, model, path = convert(CharTokenizer(sorted("aé👩 ")), n_embd=8, n_layer=1)
    code = (
        "import sys; from pathlib import Path; from exporters.llamacpp import LlamaModel\n"
        "model = LlamaModel(Path(sys.argv[1]))\n"
        "print([model.encode(text) for text in ('a~a', 'aêa', 'a👨a', 'aéa')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=CHECKOUT, capture_output=True, text=True, timeout=30
    )
    ascii_only, accent, emoji, known = json.loads(done.stdout)
    a, e = model.encode("a") + model.encode("é")
    assert known == [a, e, a]
    for ids in (ascii_only, accent, emoji):
        assert ids[0] == ids[-1] == a and -1 in ids
    assert done.stderr == ""


@pytest.mark.slow
def test_llama_cpp_still_needs_the_prefixes(convert, monkeypatch):
    """Once this fails, `list_extra_tokens` has no more work to do for characters."""
    monkeypatch.setattr(gguf, "list_extra_tokens", lambda tokenizer: [])
    _, _, path = convert(CharTokenizer(sorted("aé")), n_embd=8, n_layer=1)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from exporters.llamacpp import LlamaModel\n"
        "model = LlamaModel(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # its ids have no end\n"
        "model.encode('ê')"
    )
    words = [sys.executable, "-c", code, path]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, timeout=300)
    assert done.returncode < 0, done.stderr


def test_prefixes_of_characters_are_as_rare_as_the_rarest_character(convert):
    source, model, _ = convert(CharTokenizer(sorted("aé👩 ")), n_embd=8, n_layer=1)
    assert model.vocab_size == 4 + 4 and model.num_tokens == 4
    rare = gguf.find_rare_token(source)
    tensors = gguf.create_tensors(source, "fp32")
    for name in ("token_embd.weight", "output.weight"):
        assert all(torch.equal(row, tensors[name][rare]) for row in tensors[name][4:])


def test_a_model_of_gpt2s_vocabulary_has_its_tokens_without_padding(convert, gpt2_vocabulary):
    shape = {"n_embd": 32, "n_layer": 1}
    source, model, _ = convert(GPT2Tokenizer(), std=0.3, **shape)
    assert model.vocab_size == model.num_tokens == 50_257
    text = LINES + " é 日本語\n\n  x'll 123 <|endoftext|>\t\r\n , ."
    ids = model.encode(text)
    assert ids == source.tokenizer.encode(text).tolist()
    assert model.decode(ids) == text
    assert measure(source, model) < 1e-4
    # By default, llama.cpp takes GPT-2's comma for the end of a text.
    for name in ("bos", "eos"):
        assert model.get_metadata(f"tokenizer.ggml.{name}_token_id") == "50256"


def test_a_bpe_of_ones_own_has_its_tokens_and_an_end_of_text_that_is_never_generated(convert):
    tokenizer = BPETokenizer.train([LINES * 9], 300)
    source, model, _ = convert(tokenizer, std=0.3)
    size = tokenizer.vocab_size
    assert (model.vocab_size, model.num_tokens) == (size + 1, size)
    assert model.get_metadata("tokenizer.ggml.eos_token_id") == str(size)
    text = LINES + " é 日本語\n\n  x'll 123 <|endoftext|>\t\r\n , ."
    ids = model.encode(text)
    assert ids == tokenizer.encode(text).tolist()
    assert model.decode(ids) == text
    assert measure(source, model) < 1e-4
    assert count_agreeing(source, model) == 200


def test_no_character_ends_a_text(convert):
    _, _, path = convert(n_embd=8, n_layer=1)
    assert not [name for name in gguf_library.GGUFReader(path).fields if name.endswith("token_id")]


def test_the_file_has_the_same_bytes_each_time_and_no_path(convert):
    source, _, path = convert()
    content = path.read_bytes()
    Path("again").mkdir()
    (again,) = gguf.write(source, Path("again"), "fp32", "model")
    assert again.read_bytes() == content
    assert str(path.parent).encode() not in content and os.sep.encode() + b"tmp" not in content
    fields = gguf_library.GGUFReader(path).fields
    facts = {name: fields[f"folio.{name}"].contents() for name in ("weights_sha256", "step")}
    assert facts == {"weights_sha256": source.bundle.state.files[WEIGHTS_FILE], "step": 7}
    assert fields["general.name"].contents() == "model"


@pytest.mark.parametrize("dtype", gguf.SUFFIXES)
def test_the_tensors_of_a_file_are_read_back_bit_for_bit(dtype, convert):
    source, _, path = convert(dtype=dtype, **VARIANTS["gpt2, untied"])
    found_dtype, found = gguf.read_tensors(path)
    expected = gguf.create_tensors(source, dtype)
    assert found_dtype == dtype and found.keys() == expected.keys()
    assert all(is_same(found[name], expected[name]) for name in expected)


def test_a_damaged_file_is_no_export(convert):
    _, _, path = convert(n_embd=8, n_layer=1)
    content = path.read_bytes()
    for data in (
        b"",
        b"GGUF",
        content[:500],
        content[:-500],
        b"\xff" * 99,
        content[:16] + b"\xff" * 99,
    ):
        Path("bad.gguf").write_bytes(data)
        with pytest.raises((ValueError, OSError)):
            gguf.read_tensors(Path("bad.gguf"))


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"activation": "gelu"}, ["activation", "gelu", "qwen3"]),
        ({"architecture": "gpt2", "activation": "silu"}, ["activation", "silu", "gpt2"]),
        ({**GPT2, "block_size": 64}, ["block_size", "64"]),
        ({**GPT2, "block_size": 300}, ["block_size", "300"]),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused_with_the_reason(settings, facts, convert):
    with pytest.raises(UserError) as error:
        convert(**settings)
    assert all(fact in str(error.value) for fact in facts)


def test_weights_beyond_float16_are_refused(convert, tmp_path):
    convert(std=1e5, dtype="bf16", n_embd=8, n_layer=1)
    for dtype in ("fp16", "q8_0"):
        with pytest.raises(UserError, match=r"bf16"):
            convert(std=1e5, dtype=dtype, n_embd=8, n_layer=1)


def test_a_text_beyond_the_context_is_an_error(convert):
    _, model, _ = convert(n_embd=8, n_layer=1, block_size=32)
    with pytest.raises(ValueError, match="context"):
        model.generate(np.array([0]), 40)


def test_another_layout_of_the_library_is_an_error(monkeypatch):
    """The client is written for the structures of one version of llama.h."""
    monkeypatch.setattr(llamacpp, "DEFAULTS", (511, *llamacpp.DEFAULTS[1:]))
    with pytest.raises(ImportError):
        llamacpp.load_library()


def test_export_py_writes_and_verifies_a_gguf(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "PROMPTS", 2)
    monkeypatch.setattr(verify, "GREEDY_TOKENS", 30)
    save_random_model(tmp_path / "model", CharTokenizer(sorted(TEXT)), std=0.1, **SHAPE)
    flags = [str(tmp_path / "model"), "--format=gguf", "--out=out", "--verify"]
    assert run_command(export.main, flags) == 0
    out = capsys.readouterr().out
    assert "llama.cpp" in out and "30 of 30" in out
    assert Path("out/model-F32.gguf").is_file()
    assert "model-F32.gguf" in Path("out/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["To be", "a~b"])
def test_llama_cpps_server_continues_a_prompt_or_reports_an_unknown_character(prompt, convert):
    """In a process of its own, as the server's threads end with it."""
    _, model, path = convert(n_embd=16, n_layer=1)
    code = f"""
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_predict = {str(path)!r}, 50
server = xllamacpp.Server(params)
result = server.handle_completions({{"prompt": {prompt!r}, "temperature": 0}})
print(result["error"]["code"] if "error" in result else result["choices"][0]["text"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    if prompt == "a~b":
        assert done.stdout.strip() == "400"
    else:
        assert (
            done.stdout == model.decode(model.generate(np.array(model.encode(prompt)), 50)) + "\n"
        )
