"""The commands as users run them: real processes, their output and their exit status.

python -m pytest tests/test_commands.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, TINY_FLAGS

RAN_WITHOUT_TORCH = """
import runpy, sys
sys.path.insert(0, {checkout!r})
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    status = left.code
heavy = [name for name in ("torch", "tensorboard", "git", "safetensors") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else status)
"""


@pytest.mark.parametrize("script", ["train.py", "inference.py", "inspect_model.py"])
@pytest.mark.parametrize(
    ("flags", "status"),
    [(["--help"], 0), (["--no-such-flag"], 2), (["--runs-dir"], 2)],
)
def test_help_and_wrong_flags_do_not_import_torch(script, flags, status):
    argv = [str(CHECKOUT / script), *flags]
    code = RAN_WITHOUT_TORCH.format(checkout=str(CHECKOUT), argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_show_config_and_a_missing_text_do_not_import_torch():
    for flags, status in ((["--show-config"], 0), (["--data", "none.txt"], 2)):
        argv = [str(CHECKOUT / "train.py"), *flags]
        code = RAN_WITHOUT_TORCH.format(checkout=str(CHECKOUT), argv=argv)
        assert subprocess.run([sys.executable, "-c", code]).returncode == status


@pytest.mark.slow
def test_a_run_in_a_pipe_prints_plain_lines_and_commands_that_work(folio, text_file):
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, "--run_tag", "x")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    (run_dir,) = Path("runs").iterdir()
    assert done.stdout == (run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    commands = done.stdout.partition("Next:\n")[2].splitlines()
    assert len(commands) == 3
    for command in (commands[0], commands[2]):
        again = subprocess.run(command.strip(), shell=True, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr


def test_a_rerun_from_full_config_json_gives_identical_losses(folio, text_file):
    folio("train.py", "--data", text_file, *TINY_FLAGS, "--dropout=0.1", check=True)
    (first,) = Path("runs").iterdir()
    record = first / "meta" / "full_config.json"
    folio("train.py", "--config", record, "--runs-dir", "again", check=True)
    (second,) = Path("again").iterdir()

    def losses(run):
        text = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
        rows = map(json.loads, text.splitlines())
        timings = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in timings} for row in rows]

    assert losses(first) == losses(second)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--show-config"],
        ["train.py", "--dry-run", *TINY_FLAGS],
        ["profile_model.py", "--steps=2", "--json", *TINY_FLAGS],
        ["inspect_model.py"],
    ],
)
def test_a_result_that_cannot_be_written_exits_1(text_file, words):
    script, *flags = words
    data = [] if script == "inspect_model.py" else [f"--data={text_file}"]
    command = [sys.executable, str(CHECKOUT / script), *data, *flags]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert "standard output" in done.stderr


@pytest.fixture
def bad_files(tmp_path):
    """Create one of each kind of file that cannot be used."""
    (tmp_path / "unknown.yaml").write_text("n_layers: 3\nlearning_rate: fast\n")
    (tmp_path / "unknown.json").write_text('{"max_itres": 3}')
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "void").mkdir()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


# The flags, and the facts that each error line has. {0} is `bad_files`, {1} a good text.
MISTAKES = {
    "unknown flag": ("--max-itres 5", [["unknown flag --max-itres", "--max-iters"]]),
    "unknown key in YAML": (
        "--config {0}/unknown.yaml",
        [
            ["{0}/unknown.yaml", "unknown key n_layers", "n_layer?"],
            ["{0}/unknown.yaml", "learning_rate", '"fast"'],
        ],
    ),
    "unknown key in JSON": (
        "--config {0}/unknown.json",
        [["{0}/unknown.json", "unknown key max_itres", "max_iters?"]],
    ),
    "duplicate key": ("--config {0}/twice.yaml", [["{0}/twice.yaml", "seed"]]),
    "true for a number": ("--seed true", [["--seed", '"true"']]),
    "NaN": ("--dropout nan", [["--dropout", "finite", '"nan"']]),
    "infinity": ("--learning-rate inf", [["--learning-rate", "finite", '"inf"']]),
    "wrong type": ("--n-layer two", [["--n-layer", '"two"']]),
    "wrong range": ("--dropout 1.5", [["--dropout", "1", '"1.5"']]),
    "heads": (
        "--n-embd 10 --n-head 4",
        [["n_embd 10", "n_head 4", "n_embd: --n-embd", "n_head: --n-head"]],
    ),
    "a pipe for a text": ("--data {0}/pipe", [["{0}/pipe", "--data"]]),
    "a device for a config": ("--config /dev/zero", [["/dev/zero"]]),
    "missing config": ("--config none.yaml", [["none.yaml", "no such file"]]),
    "a name that is not Unicode": ("--data caf\udce9.txt", [["--data", '"caf\\udce9.txt"']]),
    "missing text": ("--data none.txt", [["none.txt", "--data", "no such file"]]),
    "empty text": ("--data {0}/empty.txt", [["{0}/empty.txt", "--data", "empty"]]),
    "text that is not UTF-8": (
        "--data {0}/latin.txt",
        [["{0}/latin.txt", "UTF-8", "byte 0xe9", "line 1"]],
    ),
    "empty directory": ("--data {0}/void", [["{0}/void", "--data"]]),
    "pattern without a match": ("--data {0}/*.md", [["{0}/*.md", "--data"]]),
    "cache_dir is a file": (
        "--data {1} --cache-dir {0}/file --token-store on",
        [["{0}/file", "File exists", "--cache-dir"]],
    ),
    "short text": (
        "--data {0}/short.txt --block-size 8",
        [["train", "4 of 5", "block_size 8", "9", "train_split"]],
    ),
    "runs_dir is a file": (
        "--data {1} --runs-dir {0}/file --block-size 16",
        [["{0}/file", "File exists", "--runs-dir"]],
    ),
    "no CUDA": ("--data {1} --device cuda", [["--device cuda", "--device auto"]]),
    "several at once": (
        "--seed x --nonsense --config {0}/unknown.json --data none.txt",
        [
            ["unknown flag --nonsense"],
            ["--seed", '"x"'],
            ["{0}/unknown.json", "max_itres"],
            ["none.txt", "--data"],
        ],
    ),
}


@pytest.mark.parametrize(("flags", "problems"), MISTAKES.values(), ids=MISTAKES.keys())
def test_every_mistake_is_one_line_on_stderr_and_exit_status_2(
    folio, bad_files, text_file, flags, problems
):
    words = [word.format(bad_files, text_file) for word in flags.split()]
    done = folio("train.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == len(problems), lines
    for line, facts in zip(lines, problems, strict=True):
        assert line.startswith("error: ")
        for fact in facts:
            assert fact.format(bad_files, text_file) in line
    assert list(Path.cwd().iterdir()) == []


def test_an_unknown_key_in_a_legacy_file_is_an_error(folio):
    Path("config.json").write_text('{"n_layers": 3}', encoding="utf-8")
    done = folio("train.py")
    assert done.stderr.startswith("error: config.json: unknown key n_layers")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2


def test_a_note_names_shadowed_legacy_keys_and_the_flag_that_prefers_the_file(folio):
    Path("config.json").write_text('{"n_layer": 3}', encoding="utf-8")
    shown = folio("train.py", "--show-config").stdout
    note = shown.splitlines()[0]
    assert all(word in note for word in ("n_layer", "configs/", "--config config.json"))
    assert "configs/model.json" in next(x for x in shown.splitlines() if x.startswith("  n_layer"))
    preferred = folio("train.py", "--show-config", "--config", "config.json").stdout
    line = next(x for x in preferred.splitlines() if x.startswith("  n_layer"))
    assert line.split() == ["n_layer", "3", "config.json"]


def test_dry_run_writes_nothing(folio, text_file, tmp_path):
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Model ")
    assert "\nMemory " in done.stdout and "\nTime " in done.stdout
    assert "n_layer" not in done.stdout
    assert list(Path.cwd().iterdir()) == []
    assert not (tmp_path / "cache").exists()


def test_dry_run_with_show_config_prints_the_settings_last(folio, text_file):
    flags = ["--data", text_file, *TINY_FLAGS, "--dry-run", "--show-config"]
    printed = folio("train.py", *flags, check=True).stdout
    assert printed.startswith("Model ")
    assert printed.index("\nTime ") < printed.index("\narchitecture\n") < printed.index(" n_layer ")


def test_a_closed_pipe_is_not_an_error(text_file):
    command = f"{sys.executable} {CHECKOUT}/train.py --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: python train.py")


def test_parameters_py_prints_the_json_schema(folio):
    assert json.loads(folio("parameters.py").stdout)["title"] == "Folio configuration"


# torch.compile --------------------------------------------------------------------------------

BROKEN = {"CXX": "/nowhere/c++"}


@pytest.mark.slow
def test_torch_compile_on_with_a_broken_compiler_is_an_error(folio, text_file, tmp_path):
    env = {**BROKEN, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    flags = ["--data", text_file, *TINY_FLAGS, "--torch-compile"]
    done = folio("train.py", *flags, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in ("torch_compile", "inductor", "C++ compiler", "off"))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_torch_compile_auto_with_a_broken_compiler_trains_without_it(text_file, tmp_path):
    env = {**os.environ, **BROKEN, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    code = (
        "import sys, utils.device, train; utils.device.MIN_FLOPS_TO_COMPILE['cpu'] = 0.0; "
        "sys.exit(train.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--data", str(text_file), *TINY_FLAGS]
    env["PYTHONPATH"] = str(CHECKOUT)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    notes = [line for line in done.stdout.splitlines() if line.startswith("Note:")]
    assert len(notes) == 1
    assert "inductor" in notes[0]
    (record,) = Path("runs").glob("*/meta/full_config.json")
    run = json.loads(record.read_text(encoding="utf-8"))["run"]
    assert run["torch_compile"] == "off"
    assert run["torch_compile_reason"] in notes[0]
