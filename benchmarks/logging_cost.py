"""What the record costs: the time of a step with the run's log, against one without.

Both kinds of step alternate in blocks, so that what else the machine does hits both alike.
"""

import statistics
import tempfile
import time
from pathlib import Path

from optim import learning_rate_at
from parameters import ModelConfig
from prepare import set_up
from step import training_step
from train import open_log
from utils.output import Output
from utils.run_manager import RunDirectoryCreator

BLOCKS, STEPS = 12, 25


def run(data: str | None) -> None:
    config = ModelConfig(log_interval=STEPS)
    setup = set_up(config)
    with tempfile.TemporaryDirectory() as directory:
        log = open_log(setup, RunDirectoryCreator(Path(directory)).create("r"), Output(quiet=True))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        step = 0
        for block in range(2 * BLOCKS):
            logged = block % 2 == 0
            start = time.perf_counter()
            for _ in range(STEPS):
                loss, grad_norm = training_step(setup, step)
                step += 1
                if logged:
                    log.step(step, loss, grad_norm, learning_rate_at(step, config))
            seconds[logged].append((time.perf_counter() - start) / STEPS)
        log.close()
    with_log, without = (statistics.median(seconds[logged]) for logged in (True, False))
    print(
        f"  a step takes {without * 1e3:.1f} ms without and {with_log * 1e3:.1f} ms with the log: "
        f"{(with_log / without - 1) * 100:+.1f} %"
    )
