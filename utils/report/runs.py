"""Read the files of a run for its report.

A damaged `full_config.json` or `result.json` is an error. Anything else may be missing, as in older
runs, or cut off by a kill: what cannot be read is left out.
"""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.errors import UserError
from utils.output import pluralize
from utils.run_manager import RunDirectory, read_record
from utils.tracking.metrics import get_tag

TRAIN, VAL = get_tag("eval_loss", "train"), get_tag("eval_loss", "val")
STEP_LOSS, SPEED = get_tag("loss", "train"), get_tag("tokens_per_second", "train")
MAX_CHARS = 200_000  # of a diff and of the console output in a report
MAX_VALUE = 1e30  # larger numbers in metrics.jsonl are garbage

_F = TypeVar("_F", bound=BaseModel)
Metrics = Mapping[str, float]  # a line of metrics.jsonl


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Data(_Facts):
    name: str = "unknown"
    sha256: str = ""
    tokens: int | None = None
    vocab_size: int | None = None


class _ResumedFrom(_Facts):
    run_id: str | None = None
    step: int = 0
    path: str = ""


class _Ancestor(_Facts):
    name: str
    step: int
    weights_sha256: str


class RunFacts(_Facts):
    """`run` in full_config.json, as far as a report shows it."""

    argv: list[str] = []
    callbacks: list[dict[str, Any]] = []
    started: str | None = None
    model_name: str | None = None
    data: _Data = _Data()
    resumed_from: _ResumedFrom | None = None
    lineage: list[_Ancestor] = []
    parameters: int | None = None
    device: str | None = None
    processes: int = 1
    threads: int | None = None
    precision: str | None = None
    torch_compile: str | None = None
    torch_compile_reason: str | None = None


class _Result(_Facts):
    seconds: float | None = None
    stopped_by: str | None = None
    exit_status: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """The contents of a run's files. The metrics include those of the runs that it resumed."""

    path: Path
    facts: RunFacts
    record: Mapping[str, Any]  # config, sources, git, diff
    status: str  # the last step, and why the run ended there
    environment: str
    console: str
    samples: Sequence[tuple[int, str]]  # step, text
    steps: Sequence[Metrics]
    evaluations: Sequence[Metrics]
    best: Metrics  # the evaluation with the lowest validation loss, or {}
    last_step: int
    seconds: float | None  # of training
    speed: int | None  # median tokens per second
    resumed_runs: Sequence[str]  # their ids, the oldest first

    @property
    def name(self) -> str:
        """Its id."""
        return self.path.resolve().name


def read_run(path: Path) -> Run:
    """Read a run's files. Raises `UserError` if its record is missing or damaged."""
    directory, record = RunDirectory(path), read_record(path)
    config_path, result_path = (directory.meta / n for n in ("full_config.json", "result.json"))
    facts = _validate(RunFacts.model_validate, record["run"], config_path)
    text = _read_if_file(result_path)
    result = _validate(_Result.model_validate_json, text, result_path) if text else None
    metrics, resumed_runs = _read_metrics(path, facts, {path.resolve()})
    samples = [(line.get("step"), line.get("text")) for line in _read_jsonl(directory.samples)]
    steps = [line for line in metrics if STEP_LOSS in line]
    evaluations = [line for line in metrics if VAL in line]
    last_step = int(steps[-1]["step"]) if steps else 0
    speeds = [line[SPEED] for line in steps if SPEED in line]
    seconds = [line["seconds"] for line in steps if "seconds" in line]
    if result is not None and result.seconds is not None and not resumed_runs:
        seconds.append(result.seconds)
    return Run(
        path=path,
        facts=facts,
        record={**record, "diff": record["diff"][:MAX_CHARS]},
        status=_format_status(last_step, record["config"].get("max_iters"), result),
        environment=_read_if_file(directory.meta / "env.txt"),
        console=_read_if_file(directory.console)[-MAX_CHARS:],
        samples=[(s, t) for s, t in samples if isinstance(s, int) and isinstance(t, str)],
        steps=steps,
        evaluations=evaluations,
        best=min(evaluations, key=lambda line: line[VAL], default={}),
        last_step=last_step,
        seconds=seconds[-1] if seconds else None,
        speed=int(statistics.median(speeds)) if speeds else None,
        resumed_runs=resumed_runs,
    )


def _format_status(step: int, max_iters: Any, result: _Result | None) -> str:
    is_early = isinstance(max_iters, int) and step < max_iters
    done = pluralize(step, "step") + (f" of {max_iters:,}" if is_early else "")
    if result is None:
        return f"{done}: still running, or killed"
    signal = "stopped by Ctrl-C or SIGTERM" if result.exit_status else None
    reason = result.error or result.stopped_by or signal
    return f"{done}: {reason}" if reason else done


def _validate(validate: Callable[[Any], _F], values: Any, path: Path) -> _F:
    try:
        return validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "content"
        raise UserError(f"{path} is damaged: {key}: {problem['msg']}") from None


def _read_metrics(
    path: Path, facts: RunFacts, seen: set[Path]
) -> tuple[list[dict[str, float]], list[str]]:
    """Return a run's metrics after those of the runs that it resumed, and the ids of these.

    `seen` are runs that were read already: damaged records may refer to each other in a circle.
    """
    numbers = [
        {k: v for k, v in line.items() if isinstance(v, (int, float)) and abs(v) <= MAX_VALUE}
        for line in _read_jsonl(RunDirectory(path).metrics)
    ]
    lines = [line for line in numbers if "step" in line]
    resumed = facts.resumed_from
    if resumed is None:
        return lines, []
    # The resumed run is beside this one, or, if this one was moved, above its checkpoint.
    for place in (path.resolve().parent / str(resumed.run_id), *Path(resumed.path).parents):
        with contextlib.suppress(UserError):
            earlier_facts = _validate(RunFacts.model_validate, read_record(place)["run"], place)
            earlier = place.resolve()
            if earlier in seen:
                break
            past, resumed_runs = _read_metrics(earlier, earlier_facts, seen | {earlier})
            past = [line for line in past if line["step"] <= resumed.step]
            spent = max((line.get("seconds", 0) for line in past), default=0)
            for line in lines:
                if "seconds" in line:
                    line["seconds"] += spent
            return past + lines, [*resumed_runs, earlier.name]
    return lines, []


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON-lines file, without lines that are damaged or cut off."""
    for text in _read_if_file(path).split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def _read_if_file(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_file():  # a device or a pipe might never end
            return path.read_text(encoding="utf-8", errors="replace")
    return ""
