"""What the record costs: its share of the default model's training, at the default intervals.

The log does all that it does in a run (every step, histograms of all weights and gradients,
evaluations), but nothing else happens meanwhile: what is counted is the time of the process on
all its threads, TensorBoard's own included, or the time on the clock where that is longer. A step
without a log is timed in blocks before, between and after.
"""

import statistics
import tempfile
import time
from pathlib import Path

from optim import learning_rate_at
from parameters import ModelConfig
from trainer import (
    SAMPLE_TOKENS,
    Trainer,
    collect_weights_and_gradients,
    open_log,
    open_run,
    prepare_trainer,
    sample_text,
)
from utils.output import Output
from utils.report import write_report

STEPS, BLOCK = 1000, 40


def run(data: str | None) -> None:
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        config = ModelConfig(data=data, runs_dir=f"{directory}/runs")
        setup = prepare_trainer(config)
        steps += [_step(setup, number) for number in range(BLOCK)][5:]
        costs = {}
        for name, aim in (("TensorBoard", False), ("TensorBoard and Aim", True)):
            logged = prepare_trainer(config.model_copy(update={"aim_logging": aim}))
            costs[name] = _cost(setup, logged)
            steps += [_step(setup, number) for number in range(BLOCK)]
        step = statistics.median(steps)
        start = time.perf_counter()
        sample_text(setup.model, setup.data, config, SAMPLE_TOKENS)
        words = time.perf_counter() - start
        drawn = _drawn(Path(config.runs_dir))
    print(f"  a step takes {step * 1e3:.1f} ms without a log")
    for name, (each, once) in costs.items():
        print(
            f"  {name}: {each * 1e3:.2f} ms a step, {each / step * 100:.2f} %, and "
            f"{once:.1f} s to open and close"
        )
    print(
        f"  a sample every {config.sample_interval} steps: {words * 1e3:.0f} ms each, "
        f"{words / config.sample_interval / step * 100:.2f} %"
    )
    print(f"  the page at the end: {drawn * 1e3:.0f} ms")


def _step(setup: Trainer, number: int) -> float:
    start = time.perf_counter()
    Trainer.training_step(setup, number)
    return time.perf_counter() - start


def _cost(setup: Trainer, logged: Trainer) -> tuple[float, float]:
    """Seconds a step, and seconds once a run. `setup` has a model with gradients."""
    config, output = logged.config, Output(quiet=True)
    start = time.perf_counter()
    run = open_run(logged, None, [], output)
    log = open_log(logged, run, output)
    once = time.perf_counter() - start
    losses = {"train": 1.5, "val": 1.6}
    loss, grad_norm = Trainer.training_step(setup, 0)
    clock, process = time.perf_counter(), time.process_time()
    for step in range(1, STEPS + 1):
        if step % config.histogram_interval == 0:
            log.log_histograms(step, collect_weights_and_gradients(setup.model))
        log.log_step(step, loss, grad_norm, learning_rate_at(step - 1, config))
        if step % config.eval_interval == 0:
            log.log_evaluation(step, losses, losses, is_best=True)
            log.log_sample(step, "text " * 40)
    spent = max(time.perf_counter() - clock, time.process_time() - process)
    start = time.perf_counter()
    log.close()
    output.close()
    return spent / STEPS, once + time.perf_counter() - start


def _drawn(runs: Path) -> float:
    path = min(runs.iterdir())
    start = time.perf_counter()
    write_report(path / "report.html", [path])
    return time.perf_counter() - start
