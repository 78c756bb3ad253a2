"""Read the files of a run for its report.

A damaged `full_config.json` or `result.json` is an error. Anything else may be missing, as in older
runs, or cut off by a kill: what cannot be read is left out.
"""

import contextlib
import io
import json
import os
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from utils.errors import UserError
from utils.files import open_regular
from utils.output import pluralize
from utils.run_manager import RunDirectory, get_run_tag, read_record
from utils.tracking.metrics import get_tag

TRAIN, VAL = get_tag("eval_loss", "train"), get_tag("eval_loss", "val")
VAL_BITS = get_tag("bits_per_byte", "val")
STEP_LOSS, SPEED = get_tag("loss", "train"), get_tag("tokens_per_second", "train")
MAX_CHARS = 200_000  # of a diff and of the console output in a report
MAX_VALUE = 1e30  # larger numbers in metrics.jsonl are garbage
MAX_LINES = 20_000  # of metrics.jsonl, with an evaluation and without one, from which it is thinned
MAX_LENGTH = 1 << 16  # of a line
MAX_BYTES = 1 << 20  # of a text file

Metrics = Mapping[str, float]  # a line of metrics.jsonl


Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # larger ones cannot be formatted


class _Data(BaseModel):
    name: str = "unknown"
    sha256: str = ""
    tokens: Number | None = None
    unit: str | None = None  # of the tokenizer; not recorded by old versions
    vocab_size: Number | None = None


class _ResumedFrom(BaseModel):
    run_id: str | None = None
    step: Number = 0
    path: str = ""


class _Ancestor(BaseModel):
    name: str
    step: Number
    weights_sha256: str


class RunFacts(BaseModel):
    """`run` in full_config.json, as far as a report shows it."""

    argv: list[str] = []
    callbacks: list[dict[str, Any]] = []
    started: str | None = None
    model_name: str | None = None
    data: _Data = _Data()
    resumed_from: _ResumedFrom | None = None
    lineage: list[_Ancestor] = []
    parameters: Number | None = None
    device: str | None = None
    processes: Number = 1
    threads: Number | None = None
    precision: str | None = None
    torch_compile: str | None = None
    torch_compile_reason: str | None = None


class _Overfitting(BaseModel):
    since: Number
    rise: Annotated[float, Field(allow_inf_nan=False)]


class _Result(BaseModel):
    seconds: float | None = None
    stopped_by: str | None = None
    exit_status: Number | None = None
    error: str | None = None
    longest_overlap: str | None = None
    overfitting: _Overfitting | None = None


class LoggedSample(NamedTuple):
    """Text that the model of a step generated; `is_best` for the exported model, at the end."""

    step: int
    text: str
    is_best: bool


class LoggedRun:
    """The contents of a run's files.

    Raises `UserError` if its record is missing or damaged.
    """

    def __init__(self, path: Path):
        files = RunDirectory(path)
        self.path, self.name = path, path.resolve().name
        self.record, self.facts = _read_record(path)  # config, sources, git, diff
        self.tag = get_run_tag(self.name)
        config = self.record["config"]
        kind = config.get("tokenizer")
        self.unit = self.facts.data.unit or ("token" if kind in ("gpt2", "bpe") else "character")
        # Losses per token are comparable between runs with the same tokenization.
        splits = [config.get(name) for name in ("train_split", "test_split", "split_by")]
        parents = [each.weights_sha256 for each in self.facts.lineage]  # whose tokens it may have
        learned = [self.facts.data.vocab_size, self.facts.data.sha256, *splits, *parents]
        self.tokenization = [self.unit, *(learned if kind == "bpe" else [])]
        self.diff = self.record["diff"][:MAX_CHARS]
        self.environment = _read_if_file(files.meta / "env.txt")
        self.console = _read_if_file(files.console, end=True)[-MAX_CHARS:]
        # After those of the runs that it resumed, whose ids are listed, the oldest first.
        self.metrics, self.samples, self.resumed_runs = _read_logs(path.resolve(), self.facts)
        evaluations = [line for line in self.metrics if VAL in line]
        self.best: Metrics = min(evaluations, key=itemgetter(VAL), default={})
        steps, times = (self.get_points(STEP_LOSS, x) for x in ("step", "seconds"))
        self.last_step = int(steps[-1][0]) if steps else 0
        speeds = [speed for _, speed in self.get_points(SPEED)]
        self.speed = int(statistics.median(speeds)) if speeds else None  # tokens per second
        result = _read_result(files.meta / "result.json")
        self.result = result or _Result()
        self.seconds = times[-1][0] if times else None  # of training
        if self.result.seconds is not None and not self.resumed_runs:
            self.seconds = self.result.seconds
        self.status = _format_status(self.last_step, config.get("max_iters"), result)
        self.shape = _format_shape(config)

    def get_points(self, tag: str, x: str = "step", scale: float = 1) -> list[tuple[float, float]]:
        """Return a metric's values as points; `x`, step or seconds, is multiplied by `scale`."""
        return [(line[x] * scale, line[tag]) for line in self.metrics if {x, tag} <= line.keys()]


def _format_shape(config: Mapping[str, Any]) -> str:
    """Return `3 layers, 4 heads, 128 channels, context 256`."""
    nouns = {"n_layer": "layer", "n_head": "head", "n_embd": "channel"}
    sizes = {name: size for name, size in config.items() if isinstance(size, int)}
    parts = [pluralize(sizes[name], noun) for name, noun in nouns.items() if name in sizes]
    return ", ".join([*parts, f"context {sizes.get('block_size', 'unknown')}"])


def _format_status(step: int, max_iters: Any, result: _Result | None) -> str:
    """Return the last step, and why the run ended there."""
    is_early = isinstance(max_iters, int) and step < max_iters
    done = pluralize(step, "step") + (f" of {max_iters:,}" if is_early else "")
    if result is None:
        return f"{done}: still running, or killed"
    signal = "stopped by Ctrl-C or a signal" if result.exit_status else None
    reason = result.error or result.stopped_by or signal
    return f"{done}: {reason}" if reason else done


def _read_result(path: Path) -> _Result | None:
    text = _read_if_file(path)
    with _translate_damage(path):
        return _Result.model_validate_json(text) if text else None


def _read_record(run_dir: Path) -> tuple[dict[str, Any], RunFacts]:
    record = read_record(run_dir)
    with _translate_damage(RunDirectory(run_dir).meta / "full_config.json"):
        return record, RunFacts.model_validate(record["run"])


@contextlib.contextmanager
def _translate_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "content"
        raise UserError(f"{path} is damaged: {key}: {problem['msg']}") from None


def _read_logs(
    run: Path, facts: RunFacts
) -> tuple[list[dict[str, float]], list[LoggedSample], list[str]]:
    """Return the metrics and samples of a run and the runs that it resumed, and the ids of these.

    The oldest run comes first.
    """
    lines, samples, runs = _read_numbers(run), _read_samples(run), [run]
    while facts.resumed_from is not None:
        resumed = facts.resumed_from
        # The resumed run is beside this one, or, if this one was moved, above its checkpoint.
        for place in (runs[0].parent / str(resumed.run_id), *Path(resumed.path).parents):
            with contextlib.suppress(UserError):
                facts, earlier = _read_record(place)[1], place.resolve()
                break
        else:
            break
        if earlier in runs:  # damaged records may refer to each other in a circle
            break
        past = [line for line in _read_numbers(earlier) if line["step"] <= resumed.step]
        spent = max((line.get("seconds", 0) for line in past), default=0)
        for line in lines:
            if "seconds" in line:
                line["seconds"] += spent
        lines, runs = past + lines, [earlier, *runs]
        made = [each for each in _read_samples(earlier) if not each.is_best]
        samples = [each for each in made if each.step <= resumed.step] + samples
    return lines, samples, [run.name for run in runs[:-1]]


def _read_samples(run: Path) -> list[LoggedSample]:
    lines = _parse_lines(_thin_lines(_read_lines(RunDirectory(run).samples)))
    samples = [LoggedSample(x.get("step"), x.get("text"), x.get("exported") is True) for x in lines]
    return [
        each
        for each in samples
        if isinstance(each.step, int) and abs(each.step) <= MAX_VALUE and isinstance(each.text, str)
    ]


def _read_numbers(run: Path) -> list[dict[str, float]]:
    """Return the numbers in each line of metrics.jsonl that has a step; a long file is thinned."""
    numbers = [
        {k: v for k, v in line.items() if isinstance(v, (int, float)) and abs(v) <= MAX_VALUE}
        for line in _parse_lines(_thin_lines(_read_lines(RunDirectory(run).metrics)))
    ]
    return [line for line in numbers if "step" in line]


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a JSON-lines file that begin as an object does, cut to `MAX_LENGTH`."""
    with contextlib.suppress(OSError), open_regular(path) as raw:
        file = io.TextIOWrapper(io.BufferedReader(raw), "utf-8", "replace", newline="\n")
        lines = iter(lambda: file.readline(MAX_LENGTH), "")
        yield from (line for line in lines if line.startswith("{"))


def _thin_lines(lines: Iterable[str]) -> list[str]:
    """Return the lines; of more than `MAX_LINES` of one kind, every n-th and the last two.

    The two kinds are lines with a val loss, which are few, and all others.
    """
    kept: tuple[dict[int, str], dict[int, str]] = ({}, {})
    counts, every, last = [0, 0], [1, 1], deque(maxlen=2)  # the last one may be cut off by a kill
    for number, text in enumerate(lines):
        kind = f'"{VAL}"' in text
        last.append((number, text))
        if counts[kind] % every[kind] == 0:
            kept[kind][number] = text
        counts[kind] += 1
        if len(kept[kind]) > 2 * MAX_LINES:
            every[kind] *= 2
            for old in list(kept[kind])[1::2]:
                del kept[kind][old]
    return [text for _, text in sorted({**kept[0], **kept[1], **dict(last)}.items())]


def _parse_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects in JSON lines, without lines that are damaged or cut off."""
    for text in lines:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def _read_if_file(path: Path, *, end: bool = False) -> str:
    """Return the text of a file, or only its beginning or `end` if it is long; "" without one."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_BYTES) if end else 0)
        return (io.BufferedReader(file).read(MAX_BYTES) or b"").decode("utf-8", "replace")
    return ""
