"""Bundles that a stranger changed, with hashes that fit: commands answer with a line, or ignore it.

python -m pytest tests/test_forged_bundles.py
python -m pytest -m stress tests/test_forged_bundles.py     # 2,000 random ones
"""

import copy
import hashlib
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import LINES, save_random_model
from safetensors.torch import load_file, save

import evaluate
import inference
import inspect_model
import train
from bundle import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, clean_up, compute_state_digest
from parameters import ModelConfig
from tokenizer import create_tokenizer
from trainer import train as run_training
from utils.output import Output, run_command

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint after four steps with Muon, whose text is still there."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("trained")
    text = place / "play.txt"
    text.write_text(LINES * 30, encoding="utf-8")
    shape = {"block_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 2, "batch_size": 2}
    counts = {"max_iters": 4, "eval_iters": 1, "eval_interval": 2, "warmup_iters": 1}
    places = {"data": str(text), "runs_dir": str(place / "runs"), "device": "cpu"}
    config = ModelConfig(**shape, **counts, **places, sample_interval=0)
    return run_training(config, output=Output(quiet=True)).checkpoint


@pytest.fixture
def bundle(trained, tmp_path) -> Path:
    """A copy of that checkpoint, to change, beside a text."""
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    return Path(shutil.copytree(trained, tmp_path / "cwd" / "sent"))


def read_json(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def write(directory: Path, name: str, content: dict | bytes) -> None:
    """Replace a file of a bundle, and make the hashes fit, as anyone can."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode("utf-8")
    (directory / name).write_bytes(data)
    state = read_json(directory, STATE_FILE)
    if name != STATE_FILE and isinstance(state.get("files"), dict):
        state["files"][name] = hashlib.sha256(data).hexdigest()
    if isinstance(state.get("training_config"), dict):
        state["training_config"]["state_sha256"] = compute_state_digest(state)
    (directory / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def change_json(name: str, *keys: str, value: object) -> Change:
    def change(directory: Path) -> None:
        content = read_json(directory, name)
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        write(directory, name, content)

    return change


def change_optimizer(change: Callable[[dict], object]) -> Change:
    def apply(directory: Path) -> None:
        saved = torch.load(directory / OPTIMIZER_FILE, weights_only=True)
        change(saved)
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        write(directory, OPTIMIZER_FILE, buffer.getvalue())

    return apply


def change_header(change: Callable[[dict], object]) -> Change:
    """Change the header of the safetensors file, and none of its tensors' bytes."""

    def apply(directory: Path) -> None:
        content = (directory / WEIGHTS_FILE).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        write(directory, WEIGHTS_FILE, struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def replace_by_bpe(merges: object) -> Change:
    content = {"format_version": 1, "token_kind": "bpe", "merges": merges}
    return lambda directory: write(directory, TOKENIZER, content)


def put_surrogate(directory: Path) -> None:
    content = read_json(directory, TOKENIZER)
    content["chars"][0] = "\ud800"
    write(directory, TOKENIZER, content)


def fill_weights(value: float) -> Change:
    def apply(directory: Path) -> None:
        content = bytearray((directory / WEIGHTS_FILE).read_bytes())
        content[-4:] = struct.pack("<f", value)
        write(directory, WEIGHTS_FILE, bytes(content))

    return apply


COMMANDS = {
    "inspect": (inspect_model.main, []),
    "inference": (inference.main, ["--max-new-tokens=3", "--device=cpu"]),
    "evaluate": (evaluate.main, ["--device=cpu", "--json"]),
    "resume": (train.main, ["--max-iters=5", "--device=cpu", "--resume"]),
    "init-from": (
        train.main,
        ["--max-iters=1", "--device=cpu", "--data=text.txt", "--on-new-chars=drop", "--init-from"],
    ),
}


def call(name: str, bundle: Path, capsys) -> tuple[int, str]:
    """Run a command for a bundle; return its status and stderr. A traceback fails the test."""
    command, flags = COMMANDS[name]
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python does; pytest's replaces it
    status = run_command(command, [*flags, str(bundle)])
    error = capsys.readouterr().err
    assert status in (0, 1, 2), error
    assert (status == 0) == ("error: " not in error), error
    return status, error


def tensor(saved: dict, key: str = "exp_avg") -> dict:
    """Return the state of the first parameter that has `key`."""
    return next(state for state in saved["state"].values() if key in state)


STATE = "training_config"
REFUSED: dict[str, tuple[Change, str, str]] = {
    # A name: the change, a command that must refuse it, a fact of the message.
    "runs_dir": (change_json(STATE_FILE, STATE, "runs_dir", value="/tmp/x"), "resume", "runs_dir"),
    "cache": (change_json(STATE_FILE, STATE, "cache_dir", value="/tmp/x"), "resume", "cache_dir"),
    "aim": (change_json(STATE_FILE, STATE, "aim_repo", value="aim://h:1"), "resume", "aim_repo"),
    "unknown": (change_json(STATE_FILE, STATE, "later", value=1), "inspect", "later"),
    "data": (change_json(STATE_FILE, STATE, "data", value=5), "inspect", "data"),
    "null byte": (change_json(STATE_FILE, STATE, "data", value="a\0b"), "resume", "data"),
    "best_step": (change_json(STATE_FILE, STATE, "best_step", value=[1]), "resume", "best_step"),
    "sha": (change_json(STATE_FILE, STATE, "data_sha256", value=5), "resume", "data_sha256"),
    "runs": (change_json(STATE_FILE, STATE, "previous_runs", value=[{}]), "resume", "run_id"),
    "processes": (change_json(STATE_FILE, STATE, "processes", value="x"), "resume", "processes"),
    "run_tag": (change_json(STATE_FILE, STATE, "run_tag", value=["a"]), "resume", "run_tag"),
    "training_config": (change_json(STATE_FILE, STATE, value=[]), "inspect", "training_config"),
    "n_layer": (change_json(CONFIG, "n_layer", value=10**9), "inference", "n_layer"),
    "layers": (change_json(CONFIG, "n_layer", value=100_000), "resume", "n_layer"),
    "n_embd": (change_json(CONFIG, "n_embd", value=2**31 - 2), "evaluate", "n_embd"),
    "block_size": (change_json(CONFIG, "block_size", value=2**31 - 1), "inference", "block_size"),
    "vocabulary": (change_json(CONFIG, "vocab_size", value=10**9), "init-from", "vocab_size"),
    "ngram_rows": (change_json(CONFIG, "ngram_rows", value=5), "evaluate", "ngram_rows"),
    "speedrun": (
        change_json(CONFIG, "architecture", value="speedrun"),
        "inference",
        "ngram_rows 16384",
    ),
    "n-grams": (
        change_header(lambda h: {**h, "ngram_embedding.weight": {"dtype": "F32", "shape": []}}),
        "inference",
        "n-gram",
    ),
    "extra": (change_json(CONFIG, "runs_dir", value="x"), "inference", CONFIG),
    "kind": (change_json(TOKENIZER, "token_kind", value=None), "inspect", "token_kind"),
    "chars": (change_json(TOKENIZER, "chars", value=[["a"]]), "inference", "chars"),
    "surrogate": (put_surrogate, "evaluate", "surrogate"),
    "more": (change_json(TOKENIZER, "more", value=1), "inference", "more"),
    "merges": (replace_by_bpe([["a", "b"]]), "inspect", "merges"),
    "no merges": (replace_by_bpe([]), "inference", TOKENIZER),
    "later merge": (replace_by_bpe([[257, 97], [97, 98]]), "evaluate", TOKENIZER),
    "doubled": (replace_by_bpe([[97, 97], *([n, n] for n in range(256, 300))]), "inference", "128"),
    "bpe": (replace_by_bpe([[97, 98]]), "inference", "vocabulary of 257"),
    "scalar": (
        change_header(lambda h: h["token_embedding.weight"].update(shape=[])),
        "inference",
        WEIGHTS_FILE,
    ),
    "huge": (
        change_header(lambda h: b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b"]}}"),
        "inspect",
        WEIGHTS_FILE,
    ),
    "product": (
        change_header(lambda h: {**h, "a": {"dtype": "F32", "shape": [10**4000, 10**4000]}}),
        "inspect",
        WEIGHTS_FILE,
    ),
    "dimensions": (
        change_header(lambda h: {**h, "a": {"dtype": "F32", "shape": [2**62] * 300}}),
        "inspect",
        WEIGHTS_FILE,
    ),
    "nested": (change_header(lambda h: b"[" * 100_000), "inspect", WEIGHTS_FILE),
    "name": (change_header(lambda h: {**h, "blocks": h["head.weight"]}), "inference", WEIGHTS_FILE),
    "block": (
        change_header(lambda h: {**h, "blocks.0": h["head.weight"]}),
        "inspect",
        "",  # may be listed
    ),
    "int8": (change_header(lambda h: h["head.weight"].update(dtype="I32")), "inference", "I32"),
    "rows": (
        change_json(TOKENIZER, "chars", value=list("abc")),
        "inference",
        "vocabulary",
    ),
    "text": (change_optimizer(lambda s: tensor(s).update(exp_avg="x")), "resume", "exp_avg"),
    "sparse": (
        change_optimizer(lambda s: tensor(s).update(exp_avg=tensor(s)["exp_avg"].to_sparse())),
        "resume",
        "exp_avg",
    ),
    "0-dimensional": (
        change_optimizer(lambda s: tensor(s).update(exp_avg=torch.zeros(()))),
        "resume",
        "exp_avg",
    ),
    "expanded": (
        change_optimizer(
            lambda s: tensor(s).update(exp_avg=torch.zeros(1).expand(tensor(s)["exp_avg"].shape))
        ),
        "resume",
        "exp_avg",
    ),
    "double": (
        change_optimizer(lambda s: tensor(s).update(exp_avg=tensor(s)["exp_avg"].double())),
        "resume",
        "exp_avg",
    ),
    "step": (change_optimizer(lambda s: tensor(s).update(step=torch.ones(9))), "resume", "step"),
    "missing": (change_optimizer(lambda s: tensor(s).pop("exp_avg_sq")), "resume", "state"),
    "momentum": (
        change_optimizer(
            lambda s: tensor(s, "momentum").update(momentum=torch.zeros(1).expand(24, 8))
        ),
        "resume",
        "momentum",
    ),
    "empty": (change_optimizer(lambda s: s.update(state={})), "resume", "--reset-optimizer"),
    "list": (change_optimizer(lambda s: s.update(state=[])), "resume", "--reset-optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forged_bundle_is_refused_with_a_line(name, bundle, capsys):
    change, command, fact = REFUSED[name]
    change(bundle)
    start = time.monotonic()
    for each in COMMANDS:
        status, error = call(each, bundle, capsys)
        if each == command and fact:
            assert status == 2 and fact in error, error
            assert str(bundle) in error or "memory" in error, error
    assert time.monotonic() - start < 10
    assert {path.name for path in Path().iterdir()} <= {"sent", "runs", "text.txt"}


def test_one_bad_bundle_among_many_is_a_warning(bundle, capsys):
    shutil.copytree(bundle, "checkpoints/good")
    for number, (change, _, _) in enumerate(REFUSED.values()):
        change(Path(shutil.copytree(bundle, f"checkpoints/bad{number}")))
    assert run_command(inspect_model.main, []) == 0
    out, error = capsys.readouterr()
    assert "good" in out and "bad0" in error and "error: " not in error


@pytest.mark.parametrize("command", ["inference", "evaluate", "init-from"])
@pytest.mark.parametrize("rows", [49, 1 << 24])
def test_other_ngram_rows_than_those_of_the_weights_are_refused_before_an_allocation(
    command, rows, monkeypatch, capsys
):
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    shape = {"block_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 1}
    settings = {**shape, "architecture": "speedrun", "ngram_rows": 50}
    save_random_model(Path("sent"), create_tokenizer(LINES), data="text.txt", **settings)
    assert call(command, Path("sent"), capsys)[0] == 0
    change_json(CONFIG, "ngram_rows", value=rows)(Path("sent"))
    monkeypatch.setattr("model.NgramEmbedding.__init__", None)
    status, error = call(command, Path("sent"), capsys)
    assert status == 2 and f"ngram_rows {rows}" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_failure(value, bundle, capsys):
    fill_weights(value)(bundle)
    for command in ("inference", "evaluate", "resume", "init-from"):
        status, error = call(command, bundle, capsys)
        assert status == 1 and WEIGHTS_FILE in error, (command, error)


def test_weights_too_large_for_float32_are_a_failure(bundle, capsys):
    tensors = load_file(bundle / WEIGHTS_FILE)
    tensors["final_norm.weight"] = torch.full((8,), 1e300, dtype=torch.float64)
    write(bundle, WEIGHTS_FILE, save(tensors))
    for command in ("inference", "evaluate", "resume", "init-from"):
        status, error = call(command, bundle, capsys)
        assert status == 1 and WEIGHTS_FILE in error, (command, error)


def test_an_optimizer_file_that_unpacks_to_more_is_refused(bundle, capsys):
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(bundle / OPTIMIZER_FILE) as stored,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for each in stored.infolist():
            archive.writestr(each.filename, stored.read(each))
    write(bundle, OPTIMIZER_FILE, packed.getvalue())
    status, error = call("resume", bundle, capsys)
    assert status == 2 and OPTIMIZER_FILE in error and "compressed" in error


def test_an_optimizer_file_whose_entries_share_their_bytes_is_refused(bundle, capsys):
    packed = io.BytesIO((bundle / OPTIMIZER_FILE).read_bytes())
    with zipfile.ZipFile(packed, "a") as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
        for number in range(len(packed.getvalue()) // largest.file_size + 1):
            twin = copy.copy(largest)  # at the same place in the file
            twin.filename = f"{largest.filename}_{number}"
            archive.filelist.append(twin)
        archive._didModify = True
    write(bundle, OPTIMIZER_FILE, packed.getvalue())
    status, error = call("resume", bundle, capsys)
    assert status == 2 and OPTIMIZER_FILE in error and "overlap" in error


@pytest.mark.parametrize("lineage", [100_000])
def test_a_lineage_without_end_is_refused(bundle, lineage, capsys):
    parent = {"name": "a", "step": 1, "weights_sha256": "0", "data_sha256": None, "run_id": None}
    change_json(STATE_FILE, "lineage", value=[parent] * lineage)(bundle)
    for command in COMMANDS:
        status, error = call(command, bundle, capsys)
        assert status == 2 and "lineage" in error


# Links, pipes and other users ---------------------------------------------------------------------


def start_run(capsys) -> None:
    """Train in an unrelated new run, which tidies up after others."""
    shape = ["--block-size=8", "--n-embd=8", "--n-head=2", "--n-layer=1", "--batch-size=2"]
    counts = ["--max-iters=1", "--eval-iters=1", "--device=cpu", "--data=text.txt"]
    assert run_command(train.main, [*shape, *counts]) == 0, capsys.readouterr().err
    assert "error" not in capsys.readouterr().err


def list_files(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", [".tmp-1-x", ".next-1-x"])
@pytest.mark.parametrize("level", ["leftover", "step", "checkpoints", "artifacts", "run"])
def test_tidying_follows_no_link_out_of_a_run(name, level, bundle, capsys):
    """What a downloaded run links to is neither moved nor removed, however old it is."""
    victim = Path("victim")
    steps = victim / "artifacts" / "checkpoints" / "step_1"
    target = {"step": steps, "checkpoints": steps.parent, "artifacts": steps.parents[1]}
    target = {"leftover": steps / name, "run": victim, **target}[level]
    shutil.copytree(bundle, steps / name)
    for path in (steps / name, steps):
        os.utime(path, (0, 0))
    before = list_files(victim)
    link = Path("runs/20200101_000000_dl")
    for part in ("artifacts", "checkpoints", "step_1", name):
        if level == "run":
            break
        link = link / part
        if level in (part, {"step_1": "step", name: "leftover"}.get(part)):
            break
    link.parent.mkdir(parents=True)
    link.symlink_to(target.resolve(), target_is_directory=True)
    start_run(capsys)
    assert list_files(victim) == before


def test_a_link_in_a_bundle_that_is_saved_again_is_not_followed(bundle, capsys):
    shutil.copytree(bundle, "victim")
    before = list_files(Path("victim"))
    (bundle / ".next-1-x").symlink_to(Path("victim").resolve(), target_is_directory=True)
    clean_up(bundle)
    assert list_files(Path("victim")) == before
    Path("checkpoints").mkdir()
    bundle.rename("checkpoints/dante")
    flags = ["--model-name=dante", "--max-iters=5", "--device=cpu"]
    assert run_command(train.main, flags) == 0, capsys.readouterr().err
    assert list_files(Path("victim")) == before


@pytest.mark.parametrize("name", [STATE_FILE, CONFIG, TOKENIZER, WEIGHTS_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_place_that_is_no_plain_file_is_refused_at_once(name, kind, bundle, capsys):
    (bundle / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle / name)
    elif kind == "device":
        (bundle / name).symlink_to("/dev/zero")
    else:
        (bundle / name).mkdir()
    for command in COMMANDS:
        status, _ = call(command, bundle, capsys)
        is_read = name != OPTIMIZER_FILE or command in ("resume", "inspect")
        assert status == (2 if is_read else 0), command
    shutil.copytree(bundle, "checkpoints/m", symlinks=True) if kind != "pipe" else None
    if kind == "pipe":
        Path("checkpoints").mkdir()
        bundle.rename("checkpoints/m")
    start_run_over = ["--model-name=m", "--overwrite", "--max-iters=1", "--device=cpu"]
    shape = ["--block-size=8", "--n-embd=8", "--n-head=2", "--n-layer=1", "--batch-size=2"]
    status = run_command(train.main, [*start_run_over, *shape, "--data=text.txt", "--eval-iters=1"])
    error = capsys.readouterr().err
    assert status in (0, 1) and "Traceback" not in error, error


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process as another user than root; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("place", ["artifacts", "artifacts/checkpoints", "."])
def test_a_run_of_another_user_that_cannot_be_entered_is_skipped(
    place, bundle, capsys, monkeypatch
):
    with tempfile.TemporaryDirectory() as shared:  # pytest's directories are root's alone
        shutil.copy("text.txt", shared)
        monkeypatch.chdir(shared)
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        foreign = Path("runs/20200101_000000_theirs")
        (foreign / "artifacts" / "checkpoints").mkdir(parents=True)
        for directory in (Path(shared), Path("runs")):
            directory.chmod(0o777)
        (foreign / place).chmod(0)
        assert in_a_child(lambda: start_run(capsys)) == 0
        monkeypatch.undo()


# Random forgeries -------------------------------------------------------------------------------

VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**9, 1e308, -1.5, "", "x", "\ud800", "a\0b", "../x"),
    *([], {}, [[]], {"a": 1}, [None], ["x"] * 9, "é" * 300, {"run_id": "x"}, "/dev/zero"),
)


def forge(directory: Path, draw: random.Random) -> str:
    """Change something of a bundle; return what."""
    name = draw.choice((CONFIG, TOKENIZER, STATE_FILE, STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE))
    value = draw.choice(VALUES)
    if name == WEIGHTS_FILE:
        key, part = draw.choice(("dtype", "shape", "data_offsets")), draw.random()

        def change(header: dict) -> None:
            one = draw.choice([each for each in header if each != "__metadata__"])
            if part < 0.2:
                header[draw.choice(("blocks", "blocks.9.x", "", one + "x"))] = header.pop(one)
            elif part < 0.6:
                header[one][key] = draw.choice(
                    (value, ["F16", "I8", "BOOL", "C64"][draw.randrange(4)])
                )
            else:
                sizes = header[one]["shape"]
                header[one]["shape"] = draw.choice(([], sizes[::-1], [1, *sizes], [2**40], [0]))

        change_header(change)(directory)
        return f"{name} {key} {value!r:.60}"
    if name == OPTIMIZER_FILE:
        tensors = (
            torch.zeros(()),
            torch.zeros(3),
            torch.zeros(1).expand(8, 8),
            torch.zeros(8).to_sparse(),
        )

        def alter(saved: dict) -> None:
            place = draw.choice(
                (saved, saved["generators"], draw.choice([*saved["state"].values()]))
            )
            place[draw.choice([*place])] = draw.choice((value, *tensors))

        change_optimizer(alter)(directory)
        return name
    content = read_json(directory, name)
    place = content
    while draw.random() < 0.6:
        inner = [each for each in place.values() if isinstance(each, dict) and each]
        if not inner:
            break
        place = draw.choice(inner)
    key = draw.choice([*place, "runs_dir", "later"])
    place[key] = value
    write(directory, name, content)
    return f"{name} {key} {value!r:.60}"


N_FORGED = 2000


@pytest.mark.stress
def test_two_thousand_forged_bundles_end_no_command_in_a_traceback(trained, tmp_path, capsys):
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    draw = random.Random(0)
    statuses = []
    for number in range(N_FORGED):
        bundle = Path(shutil.copytree(trained, f"sent{number}"))
        changes = [forge(bundle, draw)]
        command = draw.choice(list(COMMANDS))
        start = time.monotonic()
        try:
            status, _ = call(command, bundle, capsys)
        except BaseException as error:
            pytest.fail(f"{number}: {command} with {changes}: {type(error).__name__}: {error}")
        assert time.monotonic() - start < 10, (number, command, changes)
        statuses.append(status)
        shutil.rmtree(bundle)
        shutil.rmtree("runs", ignore_errors=True)
        assert [each.name for each in Path().iterdir()] == ["text.txt"], (number, command, changes)
    assert statuses.count(2) > 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20  # in kB
