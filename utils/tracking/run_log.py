"""A run's numbers, on their way from the device to the record.

`RunLogger` is what the training loop talks to. Losses wait on the device and are fetched many at a
time; every step's reaches `metrics.jsonl`, the trackers and, now and then, a printed line.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.errors import RunError
from utils.metrics import get_tag
from utils.output import Output, format_duration
from utils.tracking import CompositeTracker
from utils.tracking.histograms import Histogram

SPIKE_AFTER = 100  # steps that a mean is worth something after
SPIKE_WINDOW = 0.02  # of a new loss in the running mean, so that it is of about the last 50
SPIKE_HEIGHT = 8.0  # mean deviations above the mean
SPIKE_LEAST = 0.1  # nats above the mean
OVERFLOWS = 25  # steps in a row that fp16 may leave out; its scale halves at each of them


class SpikeDetector:
    """Notices a loss that leaps above those before it.

    A batch that is hard is one or two mean deviations above; what is far higher is a step that
    went wrong: too high a learning rate, or text of another kind.
    """

    def __init__(self) -> None:
        self._mean = self._deviation = 0.0
        self._count = 0
        self._is_up = False

    def update(self, loss: float) -> float | None:
        """Take the next step's loss: None, or, where a spike begins, what was usual before it."""
        before = self._mean
        distance = loss - before
        height = max(SPIKE_LEAST, SPIKE_HEIGHT * self._deviation)
        is_up, was_up = self._count >= SPIKE_AFTER and distance > height, self._is_up
        self._is_up = is_up
        self._count += 1
        weight = max(SPIKE_WINDOW, 1 / self._count)
        self._mean += weight * distance
        if self._count > 1:
            self._deviation += weight * (abs(distance) - self._deviation)
        return before if is_up and not was_up else None


class RunLogger:
    """Collects the numbers of each step and hands them on in batches.

    Args:
        metrics: the `metrics.jsonl` to append to. Unlike a tracker's, its failure is the run's: a
            run without a record is not worth having.
        samples: the `samples.jsonl` to append generated text to.
        tracker: TensorBoard and the like.
        output: where lines and the live bar go.
        first_step: the steps that were made before this run.
        max_iters: the number of the last step.
        tokens_per_step: B times T.
        interval: steps between two fetches, and so between two lines.
        may_overflow: whether a gradient may be infinite, as in fp16, where that step is left out.
    """

    def __init__(
        self,
        metrics: Path,
        samples: Path,
        tracker: CompositeTracker,
        output: Output,
        *,
        first_step: int,
        max_iters: int,
        tokens_per_step: int,
        interval: int,
        may_overflow: bool = False,
    ):
        self._metrics = open(metrics, "a", encoding="utf-8")
        # A lone surrogate is escaped, which JSON understands.
        self._samples = open(samples, "a", encoding="utf-8", errors="backslashreplace")
        self._tracker = tracker
        self._output = output
        self._first_step = first_step
        self._max_iters = max_iters
        self._tokens_per_step = tokens_per_step
        self._interval = interval
        self._may_overflow = may_overflow
        self._waiting: list[tuple[int, float, float]] = []  # (step, seconds, learning rate)
        self._on_device: list[torch.Tensor] = []  # loss, gradient norm, loss, …
        self._status = ""
        self._spikes = SpikeDetector()
        self._overflows = 0  # in a row
        self._began = self._resumed = time.perf_counter()

    def log_step(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Take one step's numbers: scalar tensors, left where they are until the next fetch.

        Asking a device for one number makes it finish all its work first; asking once for fifty
        steps costs a fiftieth of that.
        """
        self._waiting.append((step, self._elapsed(), learning_rate))
        self._on_device += [loss, grad_norm]
        if len(self._waiting) >= self._interval:
            self.flush_steps()
        self._output.advance(step, self._status)

    def flush_steps(self) -> None:
        """Bring all waiting numbers from the device into the record, and print one line of them.

        Raises:
            RunError: a loss is not finite; the step is named.
        """
        if not self._waiting:
            return
        values = torch.stack(self._on_device).tolist()  # waits for the device
        seconds = (time.perf_counter() - self._resumed) / len(self._waiting)
        speed = self._tokens_per_step / seconds
        for (step, elapsed, learning_rate), loss, grad_norm in zip(
            self._waiting, values[::2], values[1::2], strict=True
        ):
            metrics = {
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": speed,
            }
            self._record(step, elapsed, {"train": metrics})
            usual = self._spikes.update(loss)
            if usual is not None:
                self._output.print(
                    f"Note: loss spike at step {step}: {loss:.4f}, after about {usual:.4f} "
                    f"(gradient {grad_norm:.3g}); if it stays up, lower learning_rate"
                )
            self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
            if self._may_overflow and self._overflows == OVERFLOWS:
                raise RunError(
                    f"the gradients overflow fp16 at step {step}, as at the {OVERFLOWS - 1} before "
                    "it, and nothing is learned: take --precision bf16 or fp32"
                )
            # A gradient that is not finite has just spoilt the weights, whatever the loss was.
            for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
                is_fatal = what == "loss" or not self._may_overflow
                if is_fatal and not math.isfinite(value):
                    self._metrics.flush()
                    raise RunError(
                        f"the {what} is {value} at step {step}: the run cannot go on; "
                        "lower learning_rate"
                    )
        self._metrics.flush()
        self._waiting, self._on_device = [], []
        self._print_step(step, loss, learning_rate, grad_norm, seconds)
        self._resumed = time.perf_counter()

    def log_evaluation(
        self, step: int, losses: Mapping[str, float], bits: Mapping[str, float], *, is_best: bool
    ) -> None:
        """Record and print an evaluation: each split's mean loss, and its bits per byte."""
        metrics = {
            split: {"eval_loss": losses[split], "bits_per_byte": bits[split]} for split in losses
        }
        self._record(step, self._elapsed(), metrics)
        self._metrics.flush()
        self._tracker.flush()
        if not all(map(math.isfinite, losses.values())):
            raise RunError(f"the evaluation's loss is not finite at step {step}: {dict(losses)}")
        width = len(f"{self._max_iters}")
        self._output.print(
            f"eval {step:>{width}}/{self._max_iters}  train {losses['train']:.4f}  "
            f"val {losses['val']:.4f}  ({bits['val']:.3f} bits per byte)"
            f"{'  best' if is_best else ''}"
        )

    def log_histograms(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Record how the values of each tensor are distributed; those not finite are counted."""
        histograms = {name: Histogram.from_tensor(tensor) for name, tensor in tensors.items()}
        self._tracker.log_histograms(histograms, step)
        if nonfinite := sum(histogram.nonfinite for histogram in histograms.values()):
            self._record(step, self._elapsed(), {"train": {"nonfinite": nonfinite}})

    def log_sample(self, step: int, text: str) -> None:
        """Record and print generated text."""
        self._samples.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
        self._samples.flush()
        self._tracker.log_text("sample", text, step)
        self._output.print(f"\n--- sample at step {step} ---\n{text.strip()}\n---")

    def reset_timer(self) -> None:
        """Leave what was done since the last fetch (an evaluation, a save) out of the speed."""
        self._resumed = time.perf_counter()

    def close(self) -> None:
        """Close the trackers and the record."""
        self._tracker.close()
        self._samples.close()
        self._metrics.close()

    def _elapsed(self) -> float:
        """Seconds since the log was opened."""
        return time.perf_counter() - self._began

    def _record(
        self, step: int, elapsed: float, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Write the numbers of each subset: one line of JSON, and to the trackers."""
        line: dict[str, float | None] = {"step": step, "seconds": round(elapsed, 3)}
        for subset, values in metrics.items():
            for name, value in values.items():
                # JSON has no infinity and no NaN: they become null.
                line[get_tag(name, subset)] = value if math.isfinite(value) else None
            self._tracker.log_metrics(values, step, subset)
        self._metrics.write(json.dumps(line) + "\n")

    def _print_step(
        self, step: int, loss: float, learning_rate: float, grad_norm: float, seconds: float
    ) -> None:
        left = format_duration(
            self._elapsed() / (step - self._first_step) * (self._max_iters - step)
        )
        speed = f"{self._tokens_per_step / seconds:,.0f}"
        self._status = f"loss {loss:.4f}  {speed} tok/s  {left} left"
        width = len(f"{self._max_iters}")
        self._output.print_step(
            f"step {step:>{width}}/{self._max_iters}  loss {loss:7.4f}  lr {learning_rate:.2e}  "
            f"grad {grad_norm:6.3f}  {seconds * 1000:7.1f} ms  {speed:>9} tok/s  {left:>7} left"
        )
