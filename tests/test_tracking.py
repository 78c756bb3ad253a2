"""utils/tracking/: every step is logged, and a failing tracker never stops a run.

python -m pytest tests/test_tracking.py
"""

import html
import io
import json
import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from parameters import ModelConfig
from utils.errors import RunError
from utils.isolation import Isolated
from utils.output import Output, escape_control
from utils.tracking.histograms import Histogram
from utils.tracking.metrics import METRICS, get_chart, get_tag
from utils.tracking.run_logger import MAX_OVERFLOWS, SPIKE_AFTER, RunLogger, SpikeDetector
from utils.tracking.tensorboard import TensorBoardTracker, format_cell, format_literal

CALLS = ("make", "log_config", "log_metrics", "log_histograms", "log_text", "flush", "close")
LOSSES = {"train": 1.0, "val": 2.0}


class Recorder:
    """A tracker that stores its calls, and raises at the one named `broken`."""

    def __init__(self, broken: str | None = None):
        self.broken, self.calls = broken, []
        self._store("make")

    def _store(self, call, *arguments):
        if call == self.broken:
            raise RuntimeError(f"{call} is broken\nsecond line")
        self.calls.append((call, *arguments))

    def log_config(self, config, metadata):
        self._store("log_config", dict(config), dict(metadata))

    def log_metrics(self, metrics, step, subset):
        self._store("log_metrics", dict(metrics), step, subset)

    def log_histograms(self, histograms, step):
        self._store("log_histograms", dict(histograms), step)

    def log_text(self, name, text, step):
        self._store("log_text", name, text, step)

    def flush(self):
        self._store("flush")

    def close(self):
        self._store("close")


def create_logger(directory, trackers, output, interval, max_iters=100, **options) -> RunLogger:
    config = ModelConfig(batch_size=8, block_size=8, log_interval=interval, max_iters=max_iters)
    files = (directory / "metrics.jsonl", directory / "samples.jsonl")
    return RunLogger(*files, trackers, output, config, **{"first_step": 0, **options})


def step(log, number, loss=1.0, grad_norm=2.0):
    log.log_step(number, torch.tensor(loss), torch.tensor(grad_norm), 0.1)


@pytest.mark.parametrize("broken", CALLS)
def test_a_tracker_that_raises_is_dropped_with_one_warning(broken, tmp_path):
    healthy, warnings = Recorder(), []
    trackers = Isolated(lambda *words: warnings.append(words), lambda tracker: tracker.close())
    trackers.add("Broken", lambda: Recorder(broken))
    trackers.add("Healthy", lambda: healthy)
    trackers.call_each(lambda tracker: tracker.log_config({}, {}))
    log = create_logger(tmp_path, trackers, Output(quiet=True), interval=1)
    for number in (1, 2):
        step(log, number)
        log.log_histograms(number, {"w": torch.tensor([0.0, 1.0, 1.0])})
        log.log_sample(number, "text")
        log.log_evaluation(number, LOSSES, LOSSES, is_best=False)
    log.close()
    ((warning, details),) = warnings
    assert "Broken" in warning and f"{broken} is broken" in warning and "\n" not in warning
    assert "Traceback" in details
    assert "RuntimeError" in details
    evaluated = ["log_metrics", "log_metrics", "flush"]
    each = ["log_metrics", "log_histograms", "log_text", *evaluated]
    assert [call[0] for call in healthy.calls] == ["make", "log_config", *each * 2, "close"]


# TensorBoard -----------------------------------------------------------------------------------


def read_events(directory: Path) -> EventAccumulator:
    (events,) = directory.iterdir()  # one file, and so one run
    guidance = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(events), size_guidance=guidance).Reload()


def read_text(event) -> str:
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_has_every_number_and_text_once(tmp_path):
    before = set(threading.enumerate())
    tracker = TensorBoardTracker(tmp_path / "tb")
    for step in range(1, 31):
        tracker.log_metrics({"loss": 1 / step, "learning_rate": 0.1}, step, "train")
    tracker.log_metrics({"eval_loss": 2.0, "bits_per_byte": 3.0}, 30, "val")
    tracker.log_text("sample", "# no *markup*\nsecond line", 30)
    tracker.close()
    assert set(threading.enumerate()) == before
    events = read_events(tmp_path / "tb")
    metrics = ("loss", "train"), ("learning_rate", "train"), ("eval_loss", "val")
    tags = [get_chart(*metric) for metric in (*metrics, ("bits_per_byte", "val"))]
    assert events.Tags()["scalars"] == tags
    losses = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 31)]
    assert [(event.step, event.value) for event in events.Scalars("eval/val_loss")] == [(30, 2.0)]
    (text,) = events.Tensors("sample/text_summary")
    assert read_text(text) == "    # no *markup*\n    second line"


MARKUP = (
    "\r![x](http://a.b/c.png)",
    "\r\n\r\n<img src=http://a.b/c.png>",
    "```\r<b>bold</b>\r```",
    "~~~\x0b# title\x0c- item\x85**bold**\u2028> quote\x1c[a](http://a.b)",
    "\x02wzxhzdk:0\x03\x00<!-- <script>x</script>",
    "| a | b |\n|---|---|\n| c | `d` |\n\n[a]: http://a.b\n<http://a.b> &amp; \\* _x_",
)


@pytest.mark.parametrize("text", MARKUP)
def test_tensorboard_shows_any_text_literally(text):
    shown = markdown_to_safe_html(format_literal("x" + text))
    code = re.fullmatch(r"<pre><code>([^<]*)</code></pre>", shown)[1]
    assert html.unescape(code).split() == escape_control("x" + text).split()


@pytest.mark.parametrize("text", MARKUP)
def test_tensorboard_shows_any_setting_literally(text):
    table = f"| setting | value |\n|---|---|\n| data | {format_cell(text)} |"
    name, cell = re.findall(r"<td>([^<]*)</td>", markdown_to_safe_html(table))
    assert (name, html.unescape(cell).split()) == ("data", escape_control(text).split())


def test_tensorboard_has_the_histograms_as_counted(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    tracker = TensorBoardTracker(tmp_path / "tb")
    for step in (5, 10):
        tracker.log_histograms({"parameters/w": Histogram.from_tensor(values * step)}, step)
    tracker.close()
    events = read_events(tmp_path / "tb").Histograms("parameters/w")
    assert [event.step for event in events] == [5, 10]
    histogram = events[0].histogram_value
    assert (histogram.num, sum(histogram.bucket)) == (1000, 1000)
    assert histogram.min == pytest.approx(values.min().item() * 5)
    assert histogram.max == pytest.approx(values.max().item() * 5)
    assert histogram.sum == pytest.approx(values.sum().item() * 5, rel=1e-3)
    assert len(histogram.bucket_limit) == len(histogram.bucket)
    buckets = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    below = sum(count for limit, count in buckets if limit <= 0)
    assert below == pytest.approx((values < 0).sum().item(), abs=50)  # one bin


def test_tensorboard_has_the_config_as_text_and_as_hparams_in_the_same_run(tmp_path):
    tracker = TensorBoardTracker(tmp_path / "tb")
    config = {"learning_rate": 1e-3, "data": "a|b.txt", "epochs": None, "bias": False}
    run_id = "20260131_235959_baseline_2"
    tracker.log_config(config, {"run_id": run_id, "sources": {"data": "--data"}})
    tracker.close()
    events = read_events(tmp_path / "tb")
    table = read_text(events.Tensors("settings/text_summary")[0])
    assert "| learning_rate | 0.001 |  |" in table
    assert "| data | a&#124;b.txt | --data |" in table
    assert run_id in read_text(events.Tensors("setup/text_summary")[0])
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info
    assert session.group_name.split() == ["baseline_2", "20260131_235959"]
    hparams = session.hparams
    assert hparams["learning_rate"].number_value == 1e-3
    assert hparams["data"].string_value == "a|b.txt"
    assert hparams["bias"].WhichOneof("kind") == "bool_value"
    assert "epochs" not in hparams


def test_tensorboard_which_sorts_by_name_shows_losses_and_samples_first(tmp_path):
    tracker = TensorBoardTracker(tmp_path / "tb")
    for name, metric in METRICS.items():
        for subset in metric.subsets:
            tracker.log_metrics({name: 1.0}, 1, subset)
    histogram = Histogram.from_tensor(torch.ones(2))
    tracker.log_histograms({"parameters/w": histogram, "gradients/w": histogram}, 1)
    tracker.log_text("sample", "To be", 1)
    tracker.log_config({}, {})
    tracker.close()
    tags = read_events(tmp_path / "tb").Tags()
    charts = sorted(tags["scalars"] + tags["histograms"])
    assert charts[0] == get_chart("eval_loss", "train")
    groups = list(dict.fromkeys(chart.split("/")[0] for chart in charts))
    losses = [get_chart("eval_loss", "val"), get_chart("loss", "train")]
    assert {loss.split("/")[0] for loss in losses} == set(groups[:2])  # the page opens these
    texts = [tag for tag in sorted(tags["tensors"]) if tag.endswith("/text_summary")]
    assert texts[0] == "sample/text_summary"


def test_tensorboard_has_a_chart_with_train_and_val_loss_together(tmp_path):
    TensorBoardTracker(tmp_path / "tb").close()
    content = read_events(tmp_path / "tb").Tensors("custom_scalars__config__")[0]
    layout = Layout.FromString(content.tensor_proto.string_val[0])
    (category,) = layout.category
    names = [get_chart(n, subset) for n, metric in METRICS.items() for subset in metric.subsets]
    shown = [
        {name for name in names if any(re.match(tag, name) for tag in chart.multiline.tag)}
        for chart in category.chart
    ]
    assert {"eval/train_loss", "eval/val_loss"} in shown
    assert {"loss/train", "eval/val_loss"} in shown


def test_a_full_disk_raises_and_prints_no_traceback_of_tensorboards_thread(tmp_path, monkeypatch):
    """Fails if TensorBoard renames the private names that tracking/tensorboard.py uses."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    tracker = TensorBoardTracker(tmp_path / "tb")

    def write(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", lambda writer, data: write(data))
    with pytest.raises(OSError, match="No space"):
        tracker.log_metrics({"loss": 1.0}, 1, "train")
        tracker.flush()
    tracker._writer.file_writer.event_writer._async_writer._worker.join(10)
    assert printed == []


# Histograms ------------------------------------------------------------------------------------


def test_a_histogram_has_the_counts_of_numpy():
    values = torch.randn(5000)
    histogram = Histogram.from_tensor(values, bins=20)
    counts, edges = np.histogram(values.numpy(), bins=20)
    assert (histogram.low, histogram.high) == pytest.approx((edges[0], edges[-1]))
    assert np.abs(np.array(histogram.counts) - counts).sum() <= 4  # those on a bin's edge
    assert sum(histogram.counts) == 5000
    assert histogram.sum == pytest.approx(values.double().sum().item())
    assert histogram.sum_squares == pytest.approx(values.double().square().sum().item())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted_but_in_no_bin(poison):
    values = torch.tensor([1.0, 2.0, poison, 3.0, poison])
    histogram = Histogram.from_tensor(values, bins=2)
    assert histogram == Histogram(1.0, 3.0, [1, 2], 6.0, 14.0, nonfinite=2)


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [1.0], [-7.5] * 3, [float("nan")] * 2, [1e-45, 0.0], [3e38, -3e38, 1.0]],
)
def test_a_histogram_of_anything_has_a_width_and_every_finite_value(values):
    tensor = torch.tensor(values)
    histogram = Histogram.from_tensor(tensor)
    assert histogram.low < histogram.high
    assert sum(histogram.counts) == tensor.isfinite().sum()
    assert histogram.nonfinite == tensor.numel() - sum(histogram.counts)


def test_a_bin_counts_beyond_the_integers_of_float32():
    count = 2**24 + 3
    assert max(Histogram.from_tensor(torch.zeros(count)).counts) == count


def test_the_range_is_at_most_the_widest_that_torch_can_divide():
    histogram = Histogram.from_tensor(torch.tensor([3e38, -3e38, 1.0]))
    assert (histogram.low, histogram.high) == (pytest.approx(-1e38), pytest.approx(1e38))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_histogram_takes_every_floating_type(dtype):
    values = torch.linspace(0, 1, 9, dtype=dtype).view(3, 3)
    assert sum(Histogram.from_tensor(values, bins=3).counts) == 9


# Metrics ---------------------------------------------------------------------------------------


def test_tags_are_declared_once_and_differ():
    for get in (get_tag, get_chart):
        tags = [get(n, subset) for n, metric in METRICS.items() for subset in metric.subsets]
        assert len(tags) == len(set(tags))
        with pytest.raises(KeyError):
            get("undeclared", "train")


# The logger ------------------------------------------------------------------------------------


@pytest.fixture
def make_logger(tmp_path):
    def make(interval: int = 3, max_iters: int = 100, stream=None, first_step: int = 0):
        recorder = Recorder()
        output = Output(stream=stream or io.StringIO())
        trackers = Isolated(output.print_warning)
        trackers.add("Recorder", lambda: recorder)
        log = create_logger(tmp_path, trackers, output, interval, max_iters, first_step=first_step)
        return log, recorder, output

    return make


def lines(tmp_path) -> list[dict]:
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_speed_excludes_evaluations(make_logger, tmp_path, monkeypatch):
    """Two steps of 64 tokens take 4 seconds, and an evaluation 100."""
    now = [0.0]
    monkeypatch.setattr("utils.tracking.run_logger.time.perf_counter", lambda: now[0])
    log, _, output = make_logger(interval=2)
    for number in (1, 2, 3, 4):
        now[0] += 2
        step(log, number)
        if number == 2:
            now[0] += 100
            log.reset_timer()
    assert [line["tokens_per_second"] for line in lines(tmp_path)] == [32.0] * 4
    printed = output.console.file.getvalue().splitlines()
    assert all(" 2000.0 ms " in line and " 32 tok/s" in line for line in printed)


def test_every_step_is_logged_though_fetched_in_batches(make_logger, tmp_path):
    log, recorder, _ = make_logger(interval=3)
    for number in (1, 2):
        step(log, number)
    assert lines(tmp_path) == []
    step(log, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    step(log, 4)
    log.flush_steps()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    logged = [call[1:] for call in recorder.calls if call[0] == "log_metrics"]
    assert [(step, subset) for _, step, subset in logged] == [(n, "train") for n in (1, 2, 3, 4)]
    names = {"learning_rate", "grad_norm", "tokens_per_second"}
    assert all(set(metrics) == {"loss", *names} for metrics, _, _ in logged)
    keys = {"step", "seconds", "loss/train", *names}
    assert all(line.keys() == keys for line in lines(tmp_path))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(make_logger, tmp_path, loss):
    log, _, _ = make_logger(interval=3)
    step(log, 1)
    step(log, 2, loss)
    with pytest.raises(RunError, match=r"at step 2.*learning_rate"):
        step(log, 3)
    log.close()
    assert [line["loss/train"] for line in lines(tmp_path)] == [1.0, None]


def test_an_evaluation_is_recorded_and_printed(make_logger, tmp_path):
    log, recorder, output = make_logger()
    log.log_evaluation(5, {"train": 1.0, "val": 2.0}, {"train": 1.5, "val": 3.0}, is_best=True)
    (line,) = lines(tmp_path)
    assert line.pop("seconds") >= 0
    assert line == {
        "step": 5,
        "eval/train_loss": 1.0,
        "eval/val_loss": 2.0,
        "eval/train_bits_per_byte": 1.5,
        "eval/val_bits_per_byte": 3.0,
    }
    assert recorder.calls[1:] == [
        ("log_metrics", {"eval_loss": 1.0, "bits_per_byte": 1.5}, 5, "train"),
        ("log_metrics", {"eval_loss": 2.0, "bits_per_byte": 3.0}, 5, "val"),
        ("flush",),
    ]
    printed = output.console.file.getvalue()
    assert printed == "eval   5/100  train 1.0000  val 2.0000  (3.000 bits per byte)  best\n"


def test_an_evaluation_that_is_not_finite_stops_the_run_with_the_step(make_logger):
    log, _, _ = make_logger()
    with pytest.raises(RunError, match="step 5"):
        log.log_evaluation(
            5, {"train": 1.0, "val": float("nan")}, {"train": 1, "val": 1}, is_best=False
        )


def test_step_lines_have_a_fixed_width(make_logger):
    log, _, output = make_logger(interval=1, max_iters=1000)
    for number in (1, 999):
        step(log, number, 1.0 / number)
    printed = output.console.file.getvalue().splitlines()
    assert len(printed) == 2
    assert len({len(line) for line in printed}) == 1
    assert re.match(r"step    1/1000  loss  1\.0000  lr 1\.00e-01  grad  2\.000 ", printed[0])


def test_a_sample_is_recorded_printed_and_tracked(make_logger, tmp_path):
    log, recorder, output = make_logger()
    log.log_sample(5, "Nel mezzo\ndel \u2026 [bold]cammin[/]")
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 5, "text": "Nel mezzo\ndel \u2026 [bold]cammin[/]"}
    assert recorder.calls[-1] == ("log_text", "sample", "Nel mezzo\ndel \u2026 [bold]cammin[/]", 5)
    assert "del \u2026 [bold]cammin[/]" in output.console.file.getvalue()


def test_histograms_go_to_the_trackers_and_nonfinite_counts_to_the_metrics(make_logger, tmp_path):
    log, recorder, _ = make_logger()
    log.log_histograms(3, {"parameters/w": torch.ones(4), "gradients/w": torch.ones(4)})
    assert lines(tmp_path) == []
    log.log_histograms(
        6, {"parameters/w": torch.ones(4), "gradients/w": torch.tensor([1, math.nan])}
    )
    log.close()
    logged = [call for call in recorder.calls if call[0] == "log_histograms"]
    assert [(set(call[1]), call[2]) for call in logged] == [
        ({"parameters/w", "gradients/w"}, 3),
        ({"parameters/w", "gradients/w"}, 6),
    ]
    (line,) = lines(tmp_path)
    assert (line["step"], line["nonfinite"]) == (6, 1)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_file_that_is_deleted_goes_on_in_a_new_one_with_a_warning(tmp_path, capsys, name):
    log = create_logger(tmp_path, Isolated(lambda *words: None), Output(), 2)
    for number in range(1, 9):
        step(log, number)
        if number == 3:
            (tmp_path / name).unlink()
    log.log_sample(8, "To be")
    log.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / name) in warning
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == (list(range(3, 9)) if name == "metrics.jsonl" else list(range(1, 9)))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"] == "To be"


def test_the_bar_shows_a_loss_from_the_first_step(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Output, "advance", lambda self, *values: shown.append(values))
    log = create_logger(tmp_path, Isolated(lambda *words: None), Output(quiet=True), 50)
    step(log, 1, loss=4.25)
    log.close()
    ((number, status),) = shown
    assert number == 1 and "4.25" in status


def test_closing_the_logger_closes_its_trackers_and_files(make_logger):
    log, recorder, _ = make_logger()
    log.close()
    assert recorder.calls[-1] == ("close",)
    assert log._metrics._file.closed


# Loss spikes ----------------------------------------------------------------------------------


def falling(step: int) -> float:
    """Return a typical loss: it falls, and some batches are harder than others."""
    return 2 + 2 * math.exp(-step / 40) + 0.05 * math.sin(step * 12.9898)


def test_a_falling_loss_has_no_spikes():
    detector = SpikeDetector()
    assert not any(detector.update(falling(step)) for step in range(2000))


def test_a_sudden_high_loss_is_one_spike_reported_with_the_mean_before_it():
    detector = SpikeDetector()
    for step in range(SPIKE_AFTER + 200):
        assert detector.update(falling(step)) is None
    assert detector.update(3.5) == pytest.approx(2.0, abs=0.1)
    assert detector.update(3.5) is None  # reported once
    assert detector.update(2.0) is None
    assert detector.update(4.0) is not None


def test_there_is_no_spike_before_there_is_a_mean():
    detector = SpikeDetector()
    assert not any(detector.update(loss) for loss in [4.0, 3.0] * (SPIKE_AFTER // 2 - 1) + [50.0])


def test_a_spike_is_one_line_with_its_step_and_loss(tmp_path, capsys):
    trackers, output = Isolated(lambda *words: None), Output()
    log = create_logger(tmp_path, trackers, output, 50, 300)
    for step in range(1, 301):
        loss = 9.0 if step == 250 else falling(step)
        log.log_step(step, torch.tensor(loss), torch.tensor(4.5), 1e-3)
    log.close()
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "Note" in line]
    for fact in ("spike at step 250", "9.0000", "4.5", "learning_rate"):
        assert fact in note


def test_with_fp16_a_gradient_may_overflow_but_not_the_loss(tmp_path):
    trackers, output = Isolated(lambda *words: None), Output(quiet=True)
    log = create_logger(tmp_path, trackers, output, 1, 9, may_overflow=True)
    log.log_step(1, torch.tensor(1.0), torch.tensor(math.inf), 1e-3)
    with pytest.raises(RunError, match=r"loss is nan.* at step 2"):
        log.log_step(2, torch.tensor(math.nan), torch.tensor(1.0), 1e-3)
    log.close()


def test_fp16_that_overflows_in_many_consecutive_steps_stops_the_run(tmp_path):
    trackers, output = Isolated(lambda *words: None), Output(quiet=True)
    log = create_logger(tmp_path, trackers, output, 1, 99, may_overflow=True)
    norms = [math.inf] * (MAX_OVERFLOWS - 1) + [1.0] + [math.nan] * MAX_OVERFLOWS
    with pytest.raises(RunError, match=r"fp16 at step 50 .*--precision bf16"):
        for step, norm in enumerate(norms, start=1):
            log.log_step(step, torch.tensor(1.0), torch.tensor(norm), 1e-3)
    log.close()
