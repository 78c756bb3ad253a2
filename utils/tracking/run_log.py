"""A run's numbers, on their way from the device to the record.

`RunLog` is what the training loop talks to. Losses wait on the device and are fetched many at a
time; every step's reaches `metrics.jsonl`, the trackers and, now and then, a printed line.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.errors import RunError
from utils.output import Output, duration
from utils.tracking import CompositeTracker


class RunLog:
    """Collects the numbers of each step and hands them on in batches.

    Args:
        metrics: the `metrics.jsonl` to append to. Unlike a tracker's, its failure is the run's: a
            run without a record is not worth having.
        tracker: TensorBoard and the like.
        output: where lines and the live bar go.
        first_step: the steps that were made before this run.
        max_iters: the number of the last step.
        tokens_per_step: B times T.
        interval: steps between two fetches, and so between two lines.
    """

    def __init__(
        self,
        metrics: Path,
        tracker: CompositeTracker,
        output: Output,
        *,
        first_step: int,
        max_iters: int,
        tokens_per_step: int,
        interval: int,
    ):
        self._metrics = open(metrics, "a", encoding="utf-8")
        self._tracker = tracker
        self._output = output
        self._first_step = first_step
        self._max_iters = max_iters
        self._tokens_per_step = tokens_per_step
        self._interval = interval
        self._waiting: list[tuple[int, float]] = []  # (step, learning rate)
        self._on_device: list[torch.Tensor] = []  # loss, gradient norm, loss, …
        self._status = ""
        self._began = self._resumed = time.perf_counter()

    def step(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Take one step's numbers: scalar tensors, left where they are until the next fetch.

        Asking a device for one number makes it finish all its work first; asking once for fifty
        steps costs a fiftieth of that.
        """
        self._waiting.append((step, learning_rate))
        self._on_device += [loss, grad_norm]
        if len(self._waiting) >= self._interval:
            self.fetch()
        self._output.advance(step, self._status)

    def fetch(self) -> None:
        """Bring all waiting numbers from the device into the record, and print one line of them.

        Raises:
            RunError: a loss is not finite; the step is named.
        """
        if not self._waiting:
            return
        values = torch.stack(self._on_device).tolist()  # waits for the device
        seconds = (time.perf_counter() - self._resumed) / len(self._waiting)
        speed = self._tokens_per_step / seconds
        for (step, learning_rate), loss, grad_norm in zip(
            self._waiting, values[::2], values[1::2], strict=True
        ):
            scalars = {
                "loss/train": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": speed,
            }
            self._write(step, scalars)
            # A gradient that is not finite has just spoilt the weights, whatever the loss was.
            for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
                if not math.isfinite(value):
                    self._metrics.flush()
                    raise RunError(
                        f"the {what} is {value} at step {step}: the run cannot go on; "
                        "lower learning_rate"
                    )
        self._metrics.flush()
        self._waiting, self._on_device = [], []
        self._print_step(step, loss, learning_rate, grad_norm, seconds)
        self._resumed = time.perf_counter()

    def evaluation(
        self, step: int, losses: Mapping[str, float], bits: Mapping[str, float], *, is_best: bool
    ) -> None:
        """Record and print an evaluation: each split's mean loss, and its bits per byte."""
        scalars = {f"eval/{split}_loss": loss for split, loss in losses.items()}
        scalars |= {f"eval/{split}_bits_per_byte": value for split, value in bits.items()}
        self._write(step, scalars)
        self._metrics.flush()
        self._tracker.flush()
        if not all(map(math.isfinite, losses.values())):
            raise RunError(f"the evaluation's loss is not finite at step {step}: {dict(losses)}")
        width = len(f"{self._max_iters}")
        self._output.line(
            f"eval {step:>{width}}/{self._max_iters}  train {losses['train']:.4f}  "
            f"val {losses['val']:.4f}  ({bits['val']:.3f} bits per byte)"
            f"{'  best' if is_best else ''}"
        )

    def sample(self, step: int, text: str) -> None:
        """Record and print generated text."""
        self._tracker.log_text(step, "sample", text)
        self._output.line(f"\n--- sample at step {step} ---\n{text.strip()}\n---")

    def resume_clock(self) -> None:
        """Leave what was done since the last fetch (an evaluation, a save) out of the speed."""
        self._resumed = time.perf_counter()

    def close(self) -> None:
        """Close the trackers and the record."""
        self._tracker.close()
        self._metrics.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        # JSON has no infinity and no NaN: they become null.
        finite = {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._tracker.log(step, scalars)

    def _print_step(
        self, step: int, loss: float, learning_rate: float, grad_norm: float, seconds: float
    ) -> None:
        elapsed = time.perf_counter() - self._began
        left = duration(elapsed / (step - self._first_step) * (self._max_iters - step))
        speed = f"{self._tokens_per_step / seconds:,.0f}"
        self._status = f"loss {loss:.4f}  {speed} tok/s  {left} left"
        width = len(f"{self._max_iters}")
        self._output.step_line(
            f"step {step:>{width}}/{self._max_iters}  loss {loss:7.4f}  lr {learning_rate:.2e}  "
            f"grad {grad_norm:6.3f}  {seconds * 1000:7.1f} ms  {speed:>9} tok/s  {left:>7} left"
        )
