"""Ten thousand random settings, by flag, YAML and JSON: accepted, or refused with a line for each.

make test-stress
"""

import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from helpers import LINES

import train
from config import ConfigLoader
from parameters import ALIASES, GROUPS, ModelConfig
from utils.command_line import format_flag
from utils.errors import UserError
from utils.output import run_command

CASES = 10_000
REAL_CASES = 200  # about so many of the accepted ones become a run of one step, or a dry run
SECONDS = 10  # that one may take
MEMORY = 1 << 30  # bytes by which the process may grow
# Flags of the real ones: they are small, and write within the test's directory.
SMALL = (
    "--data=text.txt --block-size=8 --n-embd=8 --n-head=2 --n-layer=1 --batch-size=2 "
    "--micro-batch-size=2 --max-iters=1 --eval-iters=1 --device=cpu --num-threads=1 "
    "--torch-compile=off --checkpoints-dir=checkpoints --cache-dir=cache "
    "--aim-repo=null --no-aim-logging --init-from=null"
).split()

NUMBERS = [0, 1, -1, 2, 8, 1023, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 0.999, 1e-3, 5e-324, 1e-45, 1e20, 1e38, 1.7e308, 10**4999]
NUMBERS += [math.inf, -math.inf, math.nan, True, False, None]
TEXTS = ["", " ", "auto", "on", "off", "yes", "true", "True", "null", "~", "none", "last", "cpu"]
TEXTS += ["cuda", "cuda:99", "cuda:01", "mps", "muon", "cosine", "gelu", "gpt2", "char", "file"]
TEXTS += ["1e3", "1_000", "0x10", "0b1", " 5 ", "+5", "05", "5.0", "1,000", "1e999", "½"]
TEXTS += ["nan", "inf", "-inf", "-1", "--seed", "-", "=", "--", "٣", "１２", "é", "e\u0301"]
TEXTS += ["\0", "a\0b", "\x1b[31m", "\x9b", "\x7f", "a\nb", "\r", "\u2028", "\u202e", "\ufeff"]
TEXTS += ["\udc80", "\ud800", "../x", "..", ".", "/", "/nowhere/x", "~/x", "a/b", "a\\b", "con"]
TEXTS += ["*", "**", "[", "{x}", "%s %d {0}", "${HOME}", "&a", "*a", "!!python/object:os.system"]
TEXTS += ["日本語", "😀", "🏳️‍🌈", "a.", "x" * 300, "x" * 70_000]
NESTED: list[Any] = [[], [1], [[[]]], {}, {"a": 1}, {"n_layer": {"n_layer": 1}}, [None] * 1000]
NESTED += [{1: 2}, [{"x": [math.nan]}]]
WRONG_YAML = [
    "- 1\n",
    "x",
    "&a [*a]",
    "<<: {seed: 1}",
    "a: *b",
    "? [1]\n: 2",
    "[" * 10_000,
    "\t: 1",
]
WRONG_YAML += ["seed: 2020-13-45", "seed: !!binary x", "a: &a {b: 1}\nc: *a", "---\n---\n", "%X 1"]
WRONG_YAML += [f"seed: !!int 0x{'f' * 5000}", f"!!int 0x{'f' * 5000}: 1"]
WRONG_JSON = ["[" * 100_000, "[]", "3", '"x"', "null", "", '{"a": 1', "{,}"]
RUNS_DIRS = ["runs", "a\nb", "ü 😀", "x" * 200, "x" * 5000, "-runs", "it's", "\x1b[31m"]
ACTIONS = ["--resume", "--resume=last", "--resume=auto", "--overwrite", "--reset-optimizer"]
ACTIONS += ["--resume=runs", "--callback=x", "--callback=os:getcwd", "--callback=", "--config"]
ACTIONS += ["--config=none.yaml", "--config=.", "--config=/dev/zero", "--config=text.txt"]
ACTIONS += ["--config=a\nb.yaml", "--resume=a\nb", "--callback=a\nb:c", "--init-from=a\nb"]
ACTIONS += ["stray", "a\nb", "-x", "--", "--help=x", "--show-config=yes"]


class Hang(BaseException):
    """A case takes too long; no handler of the code under test catches this."""


def make_value(draw: random.Random, name: str) -> Any:
    """Return a value for a setting: of its type in half of the cases, else anything."""
    if draw.random() < 0.5:
        return make_plausible_value(draw, name)
    return draw.choice(draw.choice([NUMBERS, TEXTS, NESTED]))


def make_plausible_value(draw: random.Random, name: str) -> Any:
    annotation = ModelConfig.model_fields[name].annotation
    options = [each for each in get_args(annotation) if each is not type(None)]
    while options and get_origin(annotation) is not Literal:
        if len(options) < len(get_args(annotation)) and draw.random() < 0.2:
            return None
        annotation = options[0]
        options = [each for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is Literal:
        return draw.choice(options)
    if annotation is bool:
        return draw.random() < 0.5
    if annotation is int:
        return draw.choice([0, 1, 2, 4, 16, draw.randrange(10_000)])
    if annotation is float:
        return draw.choice([0.0, 0.5, 1.0, 2.0, draw.random(), 10 ** draw.uniform(-10, 2)])
    places = {"data": "text.txt", "device": "cpu", "init_from": "checkpoints/none"}
    return places.get(name) or draw.choice(["plain", "a b", "ü", "x-1_2.y", "日本"])


def make_key(draw: random.Random, name: str) -> Any:
    """Return a setting's name, as it is in most cases, else spelt in another way."""
    if draw.random() < 0.85:
        return name
    middle = draw.randrange(len(name))
    spellings = [name.replace("_", "-"), name.upper(), name.title(), f" {name}", f"{name} "]
    spellings += [name[:middle] + name[middle + 1 :], name[:middle] + "x" + name[middle:]]
    spellings += [f"{name}s", f"no_{name}", f"{name}.{name}", *ALIASES, "$schema", "config", "run"]
    return draw.choice([*spellings, *TEXTS, 1, None, True, 1.5])


def make_settings(draw: random.Random) -> list[tuple[Any, Any]]:
    """Return some settings, a few of them more than once."""
    names = draw.choices(list(ModelConfig.model_fields), k=draw.choice([1, 1, 2, 3, 5]))
    if draw.random() < 0.5:  # all are legal one by one, most of the time
        return [(name, make_plausible_value(draw, name)) for name in names]
    return [(make_key(draw, name), make_value(draw, name)) for name in names]


def to_flags(draw: random.Random, settings: list[tuple[Any, Any]]) -> list[str]:
    flags = []
    for key, value in settings:
        name = str(key)
        flag = draw.choice([format_flag, lambda each: f"--{each}"])(name)
        if value is True and draw.random() < 0.5:
            flags.append(flag)
        elif value is False and draw.random() < 0.5:
            flags.append(f"--no-{name}")
        else:
            text = "null" if value is None else to_text(value)
            flags += draw.choice([[flag, text], [f"{flag}={text}"], [f"{flag}={text}"]])
    # Without the two characters that no command line can have.
    return [flag.replace("\0", "").replace("\ud800", "") for flag in flags]


def to_text(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**4000:  # more digits than str() converts
        return "1" + "0" * 4999
    return value if isinstance(value, str) else json.dumps(value, default=str)


def to_json(draw: random.Random, settings: list[tuple[Any, Any]]) -> str:
    pairs = []
    for key, value in settings:
        shown = to_text(value) if isinstance(value, int) else json.dumps(value)
        pairs.append(f"{json.dumps(str(key))}: {shown}")
    text = "{" + ", ".join(pairs) + "}"
    return damage(draw, text, WRONG_JSON)


def to_yaml(draw: random.Random, settings: list[tuple[Any, Any]]) -> str:
    """Return YAML: dumped, or its values as they are written by hand, unquoted."""
    if draw.random() < 0.5:
        lines = [f"{key}: {to_text(value)}" for key, value in settings]
    else:
        is_huge = any(isinstance(v, int) and abs(v) > 10**4000 for _, v in settings)
        lines = [] if is_huge else [yaml.dump({key: value}).strip() for key, value in settings]
    text = "\n".join(lines) + "\n"
    return damage(draw, text, WRONG_YAML)


def damage(draw: random.Random, text: str, wrong: list[str]) -> str:
    """Return the text of a file; in a few cases a wrong one, or with something added or cut off."""
    chance = draw.random()
    if chance < 0.03:
        return draw.choice(wrong)
    if chance < 0.06:
        return text + draw.choice(wrong)
    return text[: draw.randrange(len(text) + 1)] if chance < 0.08 else text


def make_command(draw: random.Random) -> list[str]:
    """Return the flags of a command, and write the files that they name."""
    flags: list[str] = []
    for kind in draw.choice([["flag"], ["yaml"], ["json"], ["flag", "yaml"], ["json", "flag"]]):
        settings = make_settings(draw)
        if kind == "flag":
            flags += to_flags(draw, settings)
            continue
        text = (to_yaml if kind == "yaml" else to_json)(draw, settings)
        content = text.encode("utf-8", "surrogatepass")
        if draw.random() < 0.03:
            content = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"]) + content
        name = "config.json" if kind == "json" and draw.random() < 0.1 else f"mine.{kind}"
        Path(name).write_bytes(content)
        if name != "config.json":  # which is read without a flag
            flags += ["--config", name]
    if draw.random() < 0.05:
        flags.insert(draw.randrange(len(flags) + 1), draw.choice(ACTIONS))
    return flags


class Outcome:
    """How a command ended, and its lines."""

    def __init__(self, flags: list[str]):
        self.problems: list[str] = []
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") for _ in range(2)]
        streams[1].reconfigure(errors="backslashreplace")  # as Python's
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = streams
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            self.status = run_command(self._call, flags)
        except SystemExit as error:  # --help
            self.status = error.code
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
        self.out, self.error = (stream.buffer.getvalue().decode() for stream in streams)

    def _call(self, flags) -> int:
        try:
            return train.main(flags)
        except UserError as error:
            self.problems = list(error.problems)
            raise

    def check(self, *statuses: int) -> None:
        """Assert that the status is one of these, and that each problem is one clear line."""
        assert self.status in statuses, (self.status, self.error)
        lines = self.error.removesuffix("\n").split("\n") if self.error else []
        if self.status == 2:
            assert 1 <= len(lines) == len(self.problems), lines
        for line in lines:
            assert line.startswith(("error: ", "warning: ")), lines
            assert line.isprintable() and 15 < len(line) < 2000, line
            assert "Traceback" not in line, line


@contextmanager
def watch_writes(allowed: Path) -> Iterator[list[str]]:
    """Collect the paths outside `allowed` that this process creates, opens to write or removes."""
    outside: list[str] = []
    is_watching = True
    calls = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link")

    def hook(event: str, arguments: tuple) -> None:
        if not is_watching:
            return
        if event == "open":
            path, _, mode = arguments
            writes = isinstance(mode, int) and mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writes else []
        elif event in calls:
            paths = [each for each in arguments[:2] if isinstance(each, (str, bytes, os.PathLike))]
        else:
            return
        for path in paths:
            if isinstance(path, int) or os.fsdecode(path) == os.devnull:
                continue
            if not Path(os.fsdecode(path)).resolve().is_relative_to(allowed):
                outside.append(f"{event} {path!r}")

    sys.addaudithook(hook)  # which cannot be removed
    yield outside
    is_watching = False


@pytest.fixture
def limits(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """Interrupt a case that hangs, and yield the list of the paths written elsewhere."""

    def interrupt(number, frame):
        raise Hang

    # The files of configs/, which reading takes most of the time of a case, are always the same.
    configs = ConfigLoader()._configs
    monkeypatch.setattr(ConfigLoader, "_read_configs", lambda loader, directory: configs)
    place = tmp_path / "cwd" / "deep" / "down"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = signal.signal(signal.SIGALRM, interrupt)
    with watch_writes(tmp_path.resolve()) as outside:
        yield outside
    signal.signal(signal.SIGALRM, before)


def get_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(number: int, flags: list[str]) -> str:
    files = [f"{path}: {path.read_bytes()[:300]!r}" for path in Path().glob("*.[jy]*")]
    return f"case {number}: {[flag[:200] for flag in flags]} {files}"


def try_case(number: int, flags: list[str], *statuses: int) -> Outcome:
    start = time.monotonic()
    try:
        outcome = Outcome(flags)
        outcome.check(*statuses)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        pytest.fail(f"{describe(number, flags)}: {type(error).__name__}: {error}")
    assert time.monotonic() - start < SECONDS, describe(number, flags)
    return outcome


@pytest.mark.stress
def test_ten_thousand_random_settings_are_accepted_or_refused_with_a_line_each(limits, capsys):
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    draw = random.Random(0)
    counts: Counter[str] = Counter()
    start, peak = time.monotonic(), get_peak_bytes()
    for number in range(CASES):
        flags = make_command(draw)
        shown = try_case(number, [*flags, "--show-config"], 0, 2)
        counts["accepted" if shown.status == 0 else "refused"] += 1
        if shown.status == 0 and not shown.out.startswith(("usage", "Note:")):
            # A line for each setting, whatever characters its value has.
            assert len(shown.out.splitlines()) == len(GROUPS) + len(ModelConfig.model_fields)
        if shown.status == 0 and draw.random() < 3 * REAL_CASES / CASES:
            more = draw.choice([["--dry-run"], []])
            small = [*flags, *SMALL, f"--runs-dir={draw.choice(RUNS_DIRS)}"]
            status = try_case(number, [*small, *more], 0, 1, 2).status
            counts[f"{'dry run' if more else 'run'} with status {status}"] += 1
        assert not limits, describe(number, flags)
        for path in Path().iterdir():
            if path.name != "text.txt":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    growth, seconds = get_peak_bytes() - peak, time.monotonic() - start
    assert growth < MEMORY
    assert min(counts["accepted"], counts["refused"]) > CASES // 5, counts
    with capsys.disabled():
        numbers = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
        print(f"\n{CASES:,} cases in {seconds:.0f} s: {numbers}; ", end="")
        print(f"{growth / 2**20:.0f} MB more memory")
