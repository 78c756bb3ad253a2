"""inference.py: the text that a bundle generates.

python -m pytest tests/test_inference.py
"""

import io
import itertools
import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import CHECKOUT

import evaluate
import inference
from bundle import WEIGHTS_FILE, compute_state_digest, read_bundle
from generate import generate_tokens
from inference import InferenceConfig
from trainer import Trainer, train
from utils.errors import RunError, UserError
from utils.output import Output
from utils.run_manager import RunDirectory


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """The directory of the result of `run`, so that these tests train only once."""
    return {"directory": tmp_path_factory.mktemp("trained") / "runs"}


@pytest.fixture
def run(trained, tiny, quiet):
    """A run whose model is trained a little, in `runs`."""
    if "result" in trained:
        shutil.copytree(trained["directory"], "runs")
    else:
        config = tiny(max_iters=60, n_embd=32, learning_rate=2e-2, eval_interval=0)
        trained["result"] = train(config, output=quiet)
        shutil.copytree("runs", trained["directory"])
    return trained["result"]


@pytest.fixture
def generate(capsys):
    def run_command(*flags: str) -> str:
        assert inference.main(["--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    return run_command


def test_the_greedy_sample_of_a_small_run_is_the_golden_one(run, generate):
    text = generate("--prompt", "To be", "--temperature", "0", "--max-new-tokens", "25")
    assert text == "To be, or not to be, that is t\n"


def test_the_model_and_the_default_prompt_are_noted_on_stderr(run, capsys):
    assert inference.main(["--device", "cpu", "--max-new-tokens", "5"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"{run.export_dir}, step 60"
    assert "no prompt" in second


def test_the_newest_run_is_taken_by_default(run, generate, tiny, quiet):
    newest = train(tiny(), output=quiet)
    assert generate("--max-new-tokens=30") == generate(
        "--run", str(newest.run_dir), "--max-new-tokens=30"
    )
    assert generate("--max-new-tokens=30") != generate(
        "--run", str(run.run_dir), "--max-new-tokens=30"
    )


def test_an_export_moved_elsewhere_is_all_that_is_needed(run, generate, tmp_path, text_file):
    before = generate("--max-new-tokens", "50")
    shutil.move(run.export_dir, tmp_path / "gift")
    shutil.rmtree("runs")
    text_file.unlink()
    assert generate("--run", str(tmp_path / "gift"), "--max-new-tokens", "50") == before


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run, generate):
    assert generate("--seed", "3") == generate("--seed", "3")
    assert generate("--seed", "3") != generate("--seed", "4")


def test_the_whole_prompt_is_printed_even_if_the_model_sees_its_end_only(run, generate):
    prompt = "Whether 'tis nobler in the mind to suffer, or to be"
    assert len(prompt) > 16
    assert generate("--prompt", prompt, "--max-new-tokens", "5").startswith(prompt)


def test_several_samples_are_separated_by_a_line(run, generate):
    parts = generate("--num-samples", "3", "--max-new-tokens", "40").split("---\n")
    assert len(parts) == 3
    assert len(set(parts)) == 3


def test_top_k_1_is_greedy_and_a_top_k_above_the_vocabulary_keeps_all(run, generate):
    greedy = generate("--temperature", "0", "--max-new-tokens", "30")
    assert generate("--top-k", "1", "--max-new-tokens", "30") == greedy
    assert generate("--top-k", "9999") == generate()


def test_a_sample_is_never_interpreted_as_markup(tiny, quiet, generate, text_file):
    text_file.write_text("[bold]x[/bold] [red]y :smile: \\[" * 200, encoding="utf-8")
    train(tiny(max_iters=200, learning_rate=1e-2, n_embd=32, block_size=40), output=quiet)
    assert "[bold]x[/bold] [red]y :smile:" in generate("--temperature=0", "--max-new-tokens=200")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "Zoë #"], "'#' 'Z' 'ë'"),
        (["--run", "nowhere"], "nowhere: no such model"),
        (["--run", "."], "training_state.json"),
        (["--runs-dir", "nowhere"], "nowhere"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-k", "0"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.1"], "--top-p"),
        (["--min-p", "1"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--run", ""], "--run"),
        (["--num-samples", "100001"], "100000"),
        (["--on-unknown", "drop"], "error, skip, replace or normalize"),
        (["--stop="], "--stop"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file"),
        (["--prompt-file", "nowhere"], "nowhere"),
        (["--interactive", "--json"], "leave --json out"),
        (["--run", "a", "--model-name", "b"], "--run and --model-name"),
        (["a", "--run", "b"], "--run and a"),
        (["a", "b"], "a and b"),
        (["nowhere"], "nowhere"),
        (["--propmt", "x"], "--prompt?"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_a_users_mistake_is_a_one_line_error(run, flags, words):
    with pytest.raises(UserError) as caught:
        inference.main(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_prompt_is_in_the_vocabulary_of_a_text_without_line_ends(
    tiny, quiet, generate, text_file
):
    text_file.write_text("abcd" * 500, encoding="utf-8")
    train(tiny(), output=quiet)
    assert set(generate("--max-new-tokens", "20").strip()) <= set("abcd")


def test_an_empty_prompt_is_the_default_prompt_and_a_prompt_may_be_any_word(run, generate):
    assert generate("--prompt", "") == generate()
    assert generate("--prompt", "none", "--max-new-tokens=3").startswith("none")


def test_an_operand_names_the_model(run, generate):
    assert generate(str(run.run_dir)) == generate("--run", str(run.run_dir))


def test_backslash_n_in_a_prompt_is_a_new_line_and_a_file_is_taken_as_it_is(
    run, generate, tmp_path
):
    expected = generate("--prompt", "To be,\nor", "--max-new-tokens=9")
    assert expected.startswith("To be,\nor")
    assert generate("--prompt", "To be,\\nor", "--max-new-tokens=9") == expected
    (tmp_path / "prompt.txt").write_text("To be,\nor", encoding="utf-8")
    assert generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens=9") == expected


def test_standard_input_is_read_for_the_prompt_dash_only(run, generate, monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    give(b"To be")
    expected = generate("--prompt", "To be", "--max-new-tokens=9")
    assert sys.stdin.buffer.read() == b"To be", "it was not read"
    give(b"To be")
    assert generate("--prompt", "-", "--max-new-tokens=9") == expected
    give(b"")
    assert generate("--prompt", "-") == generate()
    give(b"\xff\xfe")
    with pytest.raises(UserError, match=r"standard input.*UTF-8"):
        inference.main(["--prompt", "-"])


def test_unknown_characters_are_skipped_or_replaced_on_request(run, generate, capsys):
    def prompted(*flags: str) -> tuple[str, str]:
        assert inference.main(["--device=cpu", "--max-new-tokens=0", *flags]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    out, err = prompted("--prompt", "To #be§", "--on-unknown", "skip")
    assert (out, "skipped 2 characters" in err) == ("To be\n", True)
    out, err = prompted("--prompt", "To#be", "--on-unknown", "replace")
    assert (out, "replaced 1 character" in err) == ("To be\n", True)
    with pytest.raises(UserError):  # it is unknown in every normalization
        prompted("--prompt", "To#be", "--on-unknown", "normalize")
    out, err = prompted("--prompt", "##", "--on-unknown", "skip")
    assert "no prompt" in err


def test_the_model_sees_the_last_tokens_of_a_long_prompt_and_a_note_says_how_many(run, capsys):
    tail = "nobler in the mind"[-16:]
    outs = []
    for prompt in ("To be, or not to be, " + tail, tail):
        inference.main(["--device=cpu", "--prompt", prompt, "--max-new-tokens=9"])
        printed = capsys.readouterr()
        outs.append(printed.out.removeprefix(prompt))
        is_noted = "37 characters" in printed.err and "the last 16" in printed.err
        assert is_noted == (len(prompt) > 16)
    assert outs[0] == outs[1]


def test_a_run_without_an_export_generates_from_its_newest_checkpoint_with_a_note(run, capsys):
    shutil.rmtree(run.export_dir)
    assert inference.main(["--device", "cpu", "--max-new-tokens", "5"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "step_00000060, step 60" in first
    assert "no export" in first


def test_a_sample_ends_before_the_first_stop_sequence(run, generate):
    whole = generate("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    assert whole == "To be, or not to be, that is t\n"
    flags = ("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    assert generate(*flags, "--stop", "that") == "To be, or not to be, \n"
    assert generate(*flags, "--stop", "that", "--stop", "or not") == "To be, \n"
    assert generate(*flags, "--stop", "nowhere") == whole
    assert generate(*flags, "--stop", "s absent") == whole, (
        "the beginning of a stop sequence is not one"
    )
    assert generate(*flags, "--stop", "To be") == whole, "the prompt may contain it"


def test_characters_are_printed_as_they_are_generated(run, monkeypatch):
    pieces = []
    monkeypatch.setattr(Output, "print_piece", lambda self, piece, style: pieces.append(piece))
    flags = ["--device=cpu", "--prompt", "To be", "--max-new-tokens=20", "--seed=2"]
    inference.main([*flags, "--engine=torch"])
    assert pieces[0] == "To be"
    assert len(pieces) > 15
    assert all(len(piece.strip("\n")) == 1 for piece in pieces[1:])
    text = "".join(pieces)
    pieces.clear()
    inference.main([*flags, "--engine=numba"])  # several characters at a time, but for the first
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert len(pieces[1].strip("\n")) == 1


def test_on_a_terminal_the_prompt_is_bold_and_control_characters_are_escaped(
    tiny, quiet, text_file, capsys, monkeypatch
):
    text_file.write_bytes(b"a\x1b[2J\rb\r\n" * 300)
    train(tiny(max_iters=60, learning_rate=1e-2), output=quiet)
    flags = ["--device=cpu", "--prompt=a", "--temperature=0", "--max-new-tokens=9"]
    flags.append("--num-samples=2")
    assert inference.main(flags) == 0
    piped = capsys.readouterr().out
    assert piped == "a\x1b[2J\rb\r\na\n---\na\x1b[2J\rb\r\na\n"
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    assert inference.main(flags) == 0
    shown = "\x1b[1ma\x1b[0m\\x1b[2J\nb\na\n"
    assert stream.getvalue() == f"{shown}---\n{shown}"


def test_each_of_several_samples_is_the_one_of_its_seed_alone(run, generate):
    parts = generate("--num-samples=3", "--seed=7", "--max-new-tokens=40").split("---\n")
    alone = [generate(f"--seed={seed}", "--max-new-tokens=40") for seed in (7, 8, 9)]
    assert parts == alone


def test_json_is_one_object_with_text_log_probabilities_and_speed(run, generate, capsys):
    flags = ("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    result = json.loads(generate(*flags, "--json"))
    assert result["text"] + "\n" == generate(*flags)
    assert result["prompt"] == "To be"
    assert len(result["log_probs"]) == 25
    assert all(log_prob <= 0 for log_prob in result["log_probs"])
    assert result["tokens_per_second"] > 0
    assert (result["step"], "samples" in result) == (60, False)
    stopped = json.loads(generate(*flags, "--json", "--stop", "that"))
    assert (stopped["text"], len(stopped["log_probs"])) == ("To be, or not to be, ", 16)
    assert stopped["log_probs"] == result["log_probs"][:16]
    several = json.loads(generate("--json", "--num-samples=2", "--seed=5", "--max-new-tokens=9"))
    assert [each["seed"] for each in several["samples"]] == [5, 6]
    assert several["samples"][0]["text"] == several["text"]


def test_interactive_mode_continues_each_line_and_survives_an_error(run, capsys, monkeypatch):
    lines = "To be\nZoë\nThe mind\\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert inference.main(["--device=cpu", "--interactive", "--max-new-tokens=5", "--seed=3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("To be")
    assert "The mind\n" in printed.out
    assert "'Z' 'ë'" in printed.err


def test_ctrl_c_ends_a_sample_and_not_interactive_mode(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\nThe\n"))
    print_samples, interrupted = inference.TextGenerator.print_samples, []

    def interrupt_first(self, prompt):
        if not interrupted:
            interrupted.append(prompt)
            raise KeyboardInterrupt
        print_samples(self, prompt)

    monkeypatch.setattr(inference.TextGenerator, "print_samples", interrupt_first)
    assert inference.main(["--device=cpu", "--interactive", "--max-new-tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("The")


def test_interactive_mode_uses_new_seeds_for_each_prompt(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\nTo be\n"))
    inference.main(["--device=cpu", "--interactive", "--max-new-tokens=15", "--temperature=1"])
    first, second = capsys.readouterr().out.split("To be")[1:]
    assert first != second


def test_a_terminal_has_arrow_keys_history_and_ctrl_d(run, folio):
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    master, slave = os.openpty()
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--interactive", "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=3"], stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    seen = b""

    def read_until(words: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        assert words in seen
        seen = seen.split(words, 1)[1]

    read_until(b"> ")
    os.write(master, b"To be\n")
    read_until(b"To be")
    read_until(b"> ")
    os.write(master, b"\x1b[A")  # the arrow up: the line before
    read_until(b"To be")
    os.write(master, b"\n")
    seen = b""
    read_until(b"> ")
    os.write(master, b"\x04")
    assert process.wait(60) == 0
    os.close(master)


def test_a_closed_standard_output_ends_the_command_without_a_traceback(run, folio):
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(100)
    process.stdout.close()
    assert process.wait(60) in (0, 1, 141)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_int8_generates_text(run, generate):
    text = generate(
        "--prompt", "To be", "--temperature", "0", "--max-new-tokens", "5", "--quantize=int8"
    )
    assert text.startswith("To be, ")


def test_int8_samples_do_not_depend_on_each_other(run, generate):
    flags = ("--quantize=int8", "--max-new-tokens=60", "--temperature=1")
    parts = generate("--num-samples=6", "--seed=7", *flags).split("---\n")
    assert parts == [generate(f"--seed={seed}", *flags) for seed in range(7, 13)]


def test_json_is_intact_if_standard_output_is_not_utf_8(tiny, quiet, folio, text_file):
    text_file.write_text("äöü€😀" * 400, encoding="utf-8")
    train(tiny(), output=quiet)
    flags = ("--json", "--device=cpu", "--max-new-tokens=20")
    plain = folio("inference.py", *flags, env={"PYTHONIOENCODING": "utf-8"})
    ascii_only = folio("inference.py", *flags, env={"PYTHONIOENCODING": "ascii"})
    text = json.loads(ascii_only.stdout)["text"]
    assert text == json.loads(plain.stdout)["text"]
    assert set(text) <= set("äöü€😀")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_result_that_cannot_be_written_exits_1(run):
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--device=cpu", "--json"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "standard output" in done.stderr


@pytest.mark.parametrize("flag", ["--interactive", "--prompt=-"])
def test_a_closed_standard_input_is_a_one_line_error(run, monkeypatch, flag):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input"):
        inference.main([flag])


def test_a_lack_of_memory_is_a_one_line_error(run, monkeypatch):
    def fail_to_allocate(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("decode_torch.KVCache", fail_to_allocate)
    with pytest.raises(UserError, match=r"2 samples.*memory"):
        inference.main(["--device=cpu", "--engine=torch", "--num-samples=2"])


def test_the_speed_in_json_excludes_the_prefill(run, generate, monkeypatch):
    now = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(inference, "time", clock)
    flags = ("--max-new-tokens=10", "--num-samples=3", "--engine=torch")
    result = json.loads(generate("--json", *flags))
    assert result["tokens_per_second"] == pytest.approx(3)  # 3 texts, a clock that ticks each token
    assert json.loads(generate("--json", "--max-new-tokens=1"))["tokens_per_second"] is None


# The best step of a named model ------------------------------------------------------------------


@pytest.fixture
def named(tiny, quiet, monkeypatch):
    """A run of the named model `play`, whose best val loss is that of step 2 of 4."""
    losses = iter([2.5, 2.0, 2.2, 2.3])
    monkeypatch.setattr(Trainer, "evaluate", lambda _: {"train": 1.0, "val": next(losses)})
    return train(tiny(model_name="play", max_iters=4, eval_interval=1), output=quiet)


def read_step(capsys, *flags: str) -> int:
    assert inference.main(["--device=cpu", "--max-new-tokens=2", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["step"]


@pytest.mark.parametrize(
    "reference",
    ["--model-name=play", "play", "checkpoints/play/", "runs/../checkpoints/play", "link/play"],
)
def test_a_named_model_generates_with_its_best_step_or_the_last(named, capsys, reference):
    Path("link").symlink_to("checkpoints")
    assert read_step(capsys, reference) == 2
    assert read_step(capsys, reference, "--last") == 4
    inference.main(["--device=cpu", "--max-new-tokens=2", reference])
    note = capsys.readouterr().err
    assert str(named.export_dir) in note and "--last" in note


def test_a_run_generates_with_its_best_step_or_the_last(named, capsys):
    for flags in ([], ["--run", named.run_dir.name], [str(named.run_dir)]):
        assert read_step(capsys, *flags) == 2
        assert read_step(capsys, *flags, "--last") == 4


def test_the_best_of_a_run_without_checkpoints_is_its_last_with_a_note(named, capsys):
    shutil.rmtree(named.checkpoint.parent)
    assert inference.main(["--device=cpu", "--max-new-tokens=2", "--last"]) == 0
    assert "no checkpoint" in capsys.readouterr().err


def test_the_best_step_of_a_named_model_is_found_in_a_checkpoint_too(named, capsys):
    shutil.rmtree(named.export_dir)
    assert read_step(capsys, "play") == 2


@pytest.mark.parametrize("lost", ["run", "best", "another"])
def test_a_named_model_whose_best_step_is_lost_generates_with_its_last(named, capsys, lost):
    if lost == "run":
        shutil.rmtree("runs")
    elif lost == "best":
        shutil.rmtree(named.export_dir)
        shutil.rmtree(RunDirectory(named.run_dir).get_checkpoint(2))
    else:  # models of other steps in their places
        for place in (named.export_dir, RunDirectory(named.run_dir).get_checkpoint(2)):
            shutil.rmtree(place)
            shutil.copytree("checkpoints/play", place)
    assert read_step(capsys, "play") == 4


@pytest.mark.parametrize("name", ["../../elsewhere/runs/{}", "..", ".", "", "a\0b", "\ud800", "/"])
def test_a_named_model_cannot_name_a_directory_elsewhere_as_its_run(named, capsys, tmp_path, name):
    shutil.copytree(named.export_dir, "artifacts/export")  # the place that ".." would name
    shutil.move("runs", tmp_path / "elsewhere")
    Path("runs").mkdir()
    path = Path("checkpoints/play/training_state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["run_id"] = name.format(named.run_dir.name)
    state["training_config"]["state_sha256"] = compute_state_digest(state)
    path.write_text(json.dumps(state), encoding="utf-8")
    assert read_step(capsys, "play") == 4


def test_evaluate_measures_the_best_step_of_a_named_model(named, capsys):
    for flags, step in (([], 2), (["--last"], 4)):
        assert evaluate.main(["--device=cpu", "--json", "play", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == step


def test_load_model_loads_the_best_step_of_a_named_model(named):
    best, _ = inference.load_model("play")
    expected, _ = inference.load_model(named.export_dir)
    last, _ = inference.load_model(named.checkpoint)
    weights = [model.token_embedding.weight for model in (best, expected, last)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


# Engines --------------------------------------------------------------------------------------


def read_json(generate, *flags: str) -> dict:
    return json.loads(generate("--json", *flags))


def hide_numba(monkeypatch) -> None:
    """Make numba look as if it was not installed."""
    for name in ("decode_numba", "decode_loops", "utils.compile_cache"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--top-p=0.9", "--num-samples=3"]])
def test_both_engines_generate_the_same_text_and_the_record_has_the_engine(run, generate, flags):
    numba = read_json(generate, "--engine=numba", "--max-new-tokens=200", *flags)
    torch = read_json(generate, "--engine=torch", "--max-new-tokens=200", *flags)
    assert (numba["engine"], torch["engine"]) == ("numba", "torch")
    assert numba["text"] == torch["text"]
    assert numba["log_probs"] == pytest.approx(torch["log_probs"], abs=1e-4)


def test_auto_takes_numba_on_a_cpu(run, generate):
    assert read_json(generate, "--max-new-tokens=5")["engine"] == "numba"


def test_numba_generates_without_torch(run):
    code = (
        "import sys, inference; inference.main(['--engine=numba']); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_a_stop_sequence_ends_a_sample_between_two_calls_of_the_loops(run, generate):
    text = read_json(generate, "--engine=numba", "--max-new-tokens=300", "--temperature=1")["text"]
    stop = text[100:104]
    flags = ("--engine=numba", "--max-new-tokens=300", "--temperature=1", f"--stop={stop}")
    assert read_json(generate, *flags)["text"] == text[: text.index(stop)]


def test_without_numba_engine_numba_is_an_error_that_names_the_extra(run, monkeypatch):
    hide_numba(monkeypatch)
    with pytest.raises(UserError, match=r"--engine numba.*pip install.*\[fast\]"):
        inference.main(["--engine=numba"])


def test_without_numba_auto_takes_torch_and_says_why_in_one_line(run, monkeypatch, capsys):
    hide_numba(monkeypatch)
    assert inference.main(["--json", "--device=cpu"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["engine"] == "torch"
    (line,) = [line for line in printed.err.splitlines() if "numba" in line]
    assert "PyTorch" in line and "[fast]" in line


def test_loops_that_do_not_compile_are_one_line_and_auto_takes_torch(run, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise TypeError("no such\ninstruction")

    monkeypatch.setattr("decode_numba.NumbaEngine", fail)
    with pytest.raises(UserError, match=r"--engine numba.*compiled.*TypeError"):
        inference.main(["--engine=numba"])
    assert inference.main(["--json", "--device=cpu", "--max-new-tokens=5"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["engine"] == "torch"
    assert len([line for line in printed.err.splitlines() if "TypeError" in line]) == 1


def test_numba_on_another_device_than_a_cpu_is_an_error(run):
    with pytest.raises(UserError, match=r"--engine numba.*cuda"):
        inference.main(["--engine=numba", "--device=cuda"])


def test_weights_in_bfloat16_are_left_to_torch(run, monkeypatch):
    bundle = read_bundle(run.export_dir, WEIGHTS_FILE)
    tensors = safetensors.torch.load(bundle.contents[WEIGHTS_FILE])
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    contents = {**bundle.contents, WEIGHTS_FILE: safetensors.torch.save(halved)}
    bundle = replace(bundle, contents=contents)
    lines = []
    engine = inference.load_engine_from_bundle(bundle, InferenceConfig(), lines.append)
    assert engine.name == "torch"
    assert "BF16" in lines[0]
    with pytest.raises(UserError, match="BF16"):
        inference.load_engine_from_bundle(bundle, InferenceConfig(engine="numba"), lines.append)


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensors: tensors.pop("final_norm.weight"), UserError, "final_norm.weight"),
        (lambda tensors: tensors["head.weight"].fill_(math.nan), RunError, "NaN"),
    ],
)
def test_weights_that_do_not_fit_or_are_nan_are_the_same_error_of_both_engines(
    run, engine, change, error, message
):
    bundle = read_bundle(run.export_dir, WEIGHTS_FILE)
    tensors = safetensors.torch.load(bundle.contents[WEIGHTS_FILE])
    change(tensors)
    bundle = replace(bundle, contents={WEIGHTS_FILE: safetensors.torch.save(tensors)})
    with pytest.raises(error, match=message):
        inference.load_engine_from_bundle(bundle, InferenceConfig(engine=engine))


@pytest.mark.parametrize(
    ("samples", "device", "expected"),
    [(1, "auto", True), (100_000, "auto", False), (1, "cpu", True)],
)
def test_auto_leaves_large_work_to_a_gpu(run, monkeypatch, samples, device, expected):
    monkeypatch.setattr("utils.device.choose_device", lambda requested: torch.device("cuda"))
    bundle = read_bundle(run.export_dir, WEIGHTS_FILE)
    config = InferenceConfig(num_samples=samples, device=device)
    assert inference.is_better_on_cpu(bundle, config) is expected


def test_auto_takes_torch_if_the_compiled_loops_cannot_be_kept(run, monkeypatch):
    bundle = read_bundle(run.export_dir, WEIGHTS_FILE)
    cache = types.SimpleNamespace(is_compiled=False, is_writable=False)
    monkeypatch.setattr("decode_numba.get_compile_cache", lambda dtype: cache)
    lines = []
    assert (
        inference.load_engine_from_bundle(bundle, InferenceConfig(), lines.append).name == "torch"
    )
    assert "cache" in lines[0]


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_samples_that_cannot_fit_into_memory_are_refused_before_they_are_allocated(
    run, monkeypatch, engine
):
    monkeypatch.setattr("utils.memory._get_total_memory", lambda device: 10**7)
    with pytest.raises(UserError, match="100000 samples"):
        inference.main(["--device=cpu", f"--engine={engine}", "--num-samples=100000"])


def test_load_engine_returns_an_engine_for_generate_tokens(run):
    engine, tokenizer = inference.load_engine(run.run_dir)
    model, _ = inference.load_model(run.run_dir)
    texts = [generate_tokens(each, tokenizer.encode("To be"), 50) for each in (engine, model)]
    assert np.array_equal(*texts)
