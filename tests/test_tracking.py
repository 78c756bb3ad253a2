"""utils/tracking/: every step's numbers, and trackers that cannot hurt.

python -m pytest tests/test_tracking.py
"""

import io
import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import RunError
from utils.output import Output
from utils.tracking import CompositeTracker
from utils.tracking.run_log import RunLog
from utils.tracking.tensorboard import TensorBoardTracker

CALLS = ("make", "log", "log_text", "flush", "close")


class Recorder:
    """A tracker that remembers, and raises at the call it is told to."""

    def __init__(self, broken: str | None = None):
        self.broken, self.calls = broken, []
        self._note("make")

    def _note(self, call, *arguments):
        if call == self.broken:
            raise RuntimeError(f"{call} is broken\nsecond line")
        self.calls.append((call, *arguments))

    def log(self, step, scalars):
        self._note("log", step, dict(scalars))

    def log_text(self, step, name, text):
        self._note("log_text", step, name, text)

    def flush(self):
        self._note("flush")

    def close(self):
        self._note("close")


@pytest.mark.parametrize("broken", CALLS)
def test_a_tracker_that_raises_costs_one_warning_and_nothing_else(broken):
    healthy, warnings = Recorder(), []
    makers = {"Broken": lambda: Recorder(broken), "Healthy": lambda: healthy}
    tracker = CompositeTracker(makers, warnings.append)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
        tracker.log_text(step, "sample", "text")
        tracker.flush()
    tracker.close()
    assert warnings == [f"Broken failed and is left out from here on: {broken} is broken"]
    assert [call[0] for call in healthy.calls] == [
        "make",
        *["log", "log_text", "flush"] * 2,
        "close",
    ]


def test_tensorboard_gives_back_every_scalar_and_the_text(tmp_path):
    tracker = TensorBoardTracker(tmp_path / "tb")
    for step in range(1, 31):
        tracker.log(step, {"loss/train": 1 / step, "learning_rate": 0.1})
    tracker.log_text(30, "sample", "# no *markup*\nsecond line")
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0}).Reload()
    assert events.Tags()["scalars"] == ["loss/train", "learning_rate"]
    losses = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 31)]
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    # no *markup*\n    second line"
    assert len(list((tmp_path / "tb").iterdir())) == 1


@pytest.fixture
def make_log(tmp_path):
    def make(interval: int = 3, max_iters: int = 100, stream=None, first_step: int = 0):
        recorder = Recorder()
        output = Output(stream=stream or io.StringIO())
        log = RunLog(
            tmp_path / "metrics.jsonl",
            CompositeTracker({"Recorder": lambda: recorder}, output.warning),
            output,
            first_step=first_step,
            max_iters=max_iters,
            tokens_per_step=64,
            interval=interval,
        )
        return log, recorder, output

    return make


def lines(tmp_path) -> list[dict]:
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def step(log, number, loss=1.0):
    log.step(number, torch.tensor(loss), torch.tensor(2.0), 0.1)


def test_the_speed_is_that_of_the_steps_alone(make_log, tmp_path, monkeypatch):
    """Two steps of 64 tokens in 4 seconds, and an evaluation of 100 that does not count."""
    now = [0.0]
    monkeypatch.setattr("utils.tracking.run_log.time.perf_counter", lambda: now[0])
    log, _, output = make_log(interval=2)
    for number in (1, 2, 3, 4):
        now[0] += 2
        step(log, number)
        if number == 2:
            now[0] += 100
            log.resume_clock()
    assert [line["tokens_per_second"] for line in lines(tmp_path)] == [32.0] * 4
    printed = output.console.file.getvalue().splitlines()
    assert all(" 2000.0 ms " in line and " 32 tok/s" in line for line in printed)


def test_every_step_is_logged_in_batches(make_log, tmp_path):
    log, recorder, _ = make_log(interval=3)
    for number in (1, 2):
        step(log, number)
    assert lines(tmp_path) == []
    step(log, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    step(log, 4)
    log.fetch()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [call[1] for call in recorder.calls if call[0] == "log"] == [1, 2, 3, 4]
    expected = {"step", "loss/train", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(line.keys() == expected for line in lines(tmp_path))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(make_log, tmp_path, loss):
    log, _, _ = make_log(interval=3)
    step(log, 1)
    step(log, 2, loss)
    with pytest.raises(RunError, match="at step 2: the run cannot go on"):
        step(log, 3)
    log.close()
    assert [line["loss/train"] for line in lines(tmp_path)] == [1.0, None]


def test_an_evaluation_is_recorded_and_printed(make_log, tmp_path):
    log, recorder, output = make_log()
    log.evaluation(5, {"train": 1.0, "val": 2.0}, {"train": 1.5, "val": 3.0}, is_best=True)
    (line,) = lines(tmp_path)
    assert line == {
        "step": 5,
        "eval/train_loss": 1.0,
        "eval/val_loss": 2.0,
        "eval/train_bits_per_byte": 1.5,
        "eval/val_bits_per_byte": 3.0,
    }
    assert ("flush",) in recorder.calls
    printed = output.console.file.getvalue()
    assert printed == "eval   5/100  train 1.0000  val 2.0000  (3.000 bits per byte)  best\n"


def test_an_evaluation_that_is_not_finite_stops_the_run(make_log):
    log, _, _ = make_log()
    with pytest.raises(RunError, match="not finite at step 5"):
        log.evaluation(
            5, {"train": 1.0, "val": float("nan")}, {"train": 1, "val": 1}, is_best=False
        )


def test_step_lines_have_a_fixed_width(make_log):
    log, _, output = make_log(interval=1, max_iters=1000)
    for number in (1, 999):
        step(log, number, 1.0 / number)
    printed = output.console.file.getvalue().splitlines()
    assert len(printed) == 2
    assert len({len(line) for line in printed}) == 1
    assert re.match(r"step    1/1000  loss  1\.0000  lr 1\.00e-01  grad  2\.000 ", printed[0])


def test_the_log_closes_its_trackers_and_its_file(make_log):
    log, recorder, _ = make_log()
    log.close()
    assert recorder.calls[-1] == ("close",)
    assert log._metrics.closed
