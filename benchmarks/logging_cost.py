"""Cost of logging, as a share of the default model's training at the default intervals.

Everything is logged as in a run (every step, histograms of all weights and gradients, evaluations),
but nothing else runs meanwhile. The cost is the CPU time of all threads, TensorBoard's included, or
the wall time if that is longer. Steps without logging are timed before, between and after.
"""

import statistics
import tempfile
import time
from pathlib import Path

from optim import learning_rate_at
from parameters import ModelConfig
from run_record import open_log, open_run, sample_text
from trainer import (
    SAMPLE_TOKENS,
    Trainer,
    collect_weights_and_gradients,
    prepare_trainer,
)
from utils.output import Output
from utils.profiling import get_sample_period
from utils.report import write_report

LOGGED_STEPS, TIMED_STEPS, WARMUP = 1000, 40, 5


def run(data: str | None) -> None:
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        config = ModelConfig(data=data, runs_dir=f"{directory}/runs")
        trainer = prepare_trainer(config)
        steps += _time_steps(trainer)[WARMUP:]
        costs = {}
        for name, aim in (("TensorBoard", False), ("TensorBoard and Aim", True)):
            logged = prepare_trainer(config.model_copy(update={"aim_logging": aim}))
            costs[name] = _measure_cost(trainer, logged)
            steps += _time_steps(trainer)
        step = statistics.median(steps)
        start = time.perf_counter()
        sample_text(trainer.model, trainer.data, config, SAMPLE_TOKENS)
        sampling = time.perf_counter() - start
        report = _time_report(Path(config.runs_dir))
    print(f"  a step takes {step * 1e3:.1f} ms without logging")
    for name, (each, once) in costs.items():
        print(
            f"  {name}: {each * 1e3:.2f} ms a step, {each / step * 100:.2f} %, and "
            f"{once:.1f} s to open and close"
        )
    period = get_sample_period(config)
    print(
        f"  a sample every {period} steps: {sampling * 1e3:.0f} ms each, "
        f"{sampling / period / step * 100:.2f} %"
    )
    print(f"  the report at the end: {report * 1e3:.0f} ms")


def _time_steps(trainer: Trainer) -> list[float]:
    seconds = []
    for number in range(TIMED_STEPS):
        start = time.perf_counter()
        trainer.training_step(number)
        seconds.append(time.perf_counter() - start)
    return seconds


def _measure_cost(trainer: Trainer, logged: Trainer) -> tuple[float, float]:
    """Return the seconds per step, and once per run. `trainer`'s model has gradients."""
    config, output = logged.config, Output(quiet=True)
    start = time.perf_counter()
    run = open_run(logged, None, [], output)
    log = open_log(logged, run, output)
    once = time.perf_counter() - start
    losses = {"train": 1.5, "val": 1.6}
    loss, grad_norm = trainer.training_step(0)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(1, LOGGED_STEPS + 1):
        if step % config.histogram_interval == 0:
            log.log_histograms(step, collect_weights_and_gradients(trainer.model))
        log.log_step(step, loss, grad_norm, learning_rate_at(step - 1, config))
        if step % config.eval_interval == 0:
            log.log_evaluation(step, losses, losses, is_best=True)
            log.log_sample(step, "text " * 40)
    seconds = max(time.perf_counter() - wall, time.process_time() - cpu)
    start = time.perf_counter()
    log.close()
    output.close()
    return seconds / LOGGED_STEPS, once + time.perf_counter() - start


def _time_report(runs: Path) -> float:
    path = min(runs.iterdir())
    start = time.perf_counter()
    write_report(path / "report.html", path)
    return time.perf_counter() - start
