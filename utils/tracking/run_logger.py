"""The run's logger: from numbers on the device to `metrics.jsonl`, trackers and printed lines."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from parameters import ModelConfig
from utils.errors import RunError
from utils.isolation import Isolated
from utils.output import LogFile, Output, format_duration
from utils.tracking import Tracker
from utils.tracking.histograms import Histogram
from utils.tracking.metrics import get_tag

SPIKE_AFTER = 100  # steps before the running mean is reliable
SPIKE_WEIGHT = 0.02  # of a new loss in the running mean, which so covers about 50 steps
SPIKE_HEIGHT = 8.0  # mean absolute deviations above the mean
SPIKE_MIN_HEIGHT = 0.1  # nats above the mean
MAX_OVERFLOWS = 25  # consecutive steps that fp16 may skip; each halves the loss scale


class SpikeDetector:
    """Detect a loss far above the running mean.

    A hard batch is one or two mean absolute deviations above it. A spike means that the learning
    rate is too high, or that the text has changed.
    """

    def __init__(self) -> None:
        self._mean = self._deviation = 0.0
        self._count = 0
        self._is_high = False

    def update(self, loss: float) -> float | None:
        """Add the next step's loss; return the mean before it if a spike begins, else None."""
        mean, was_high = self._mean, self._is_high
        distance = loss - mean
        threshold = max(SPIKE_MIN_HEIGHT, SPIKE_HEIGHT * self._deviation)
        self._is_high = self._count >= SPIKE_AFTER and distance > threshold
        self._count += 1
        weight = max(SPIKE_WEIGHT, 1 / self._count)
        self._mean += weight * distance
        if self._count > 1:
            self._deviation += weight * (abs(distance) - self._deviation)
        return mean if self._is_high and not was_high else None


@dataclass(eq=False)
class RunLogger:
    """Log a run's numbers: every step's, though they are fetched from the device in batches."""

    metrics: Path  # metrics.jsonl; unlike a tracker's, its failure ends the run
    samples: Path  # samples.jsonl
    trackers: Isolated[Tracker]
    output: Output
    config: ModelConfig  # with max_iters; numbers are fetched and printed each log_interval steps
    first_step: int  # steps made before this run
    may_overflow: bool = False  # the gradient, as with fp16, which skips that step

    def __post_init__(self) -> None:
        self._metrics, self._samples = LogFile(self.metrics), LogFile(self.samples)
        self._queued: list[tuple[int, float, float]] = []  # (step, seconds, learning rate)
        self._on_device: list[torch.Tensor] = []  # loss, gradient norm, loss, …
        self._status = ""
        self._spikes = SpikeDetector()
        self._overflows = 0  # consecutive
        self._start = self._timer = time.perf_counter()

    def log_step(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Queue one step's numbers: scalar tensors, left on the device until the next fetch.

        A fetch waits for all work on the device, so one for 50 steps costs a fiftieth of 50.
        """
        self._queued.append((step, self._elapsed(), learning_rate))
        self._on_device += [loss, grad_norm]
        self._status = self._status or f"loss {loss:.4f}"  # of the first step, until there is more
        if len(self._queued) >= self.config.log_interval:
            self.flush_steps()
        self.output.advance(step, self._status)

    def flush_steps(self) -> None:
        """Fetch and log all queued steps, and print a line for the last of them.

        Raises `RunError` if a loss or a gradient norm is not finite, or the run was deleted.
        """
        self._reopen_lost_files()
        if not self._queued:
            return
        values = torch.stack(self._on_device).tolist()  # waits for the device
        seconds = (time.perf_counter() - self._timer) / len(self._queued)
        speed = self.config.tokens_per_step / seconds
        fetched = zip(self._queued, values[::2], values[1::2], strict=True)
        for (step, elapsed, learning_rate), loss, grad_norm in fetched:
            metrics = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
            self._record(step, elapsed, {"train": {**metrics, "tokens_per_second": speed}})
            self._check_step(step, loss, grad_norm)
        self._queued, self._on_device = [], []
        seconds_per_step = self._elapsed() / (step - self.first_step)
        left = format_duration(seconds_per_step * (self.config.max_iters - step))
        self._status = f"loss {loss:.4f}  {speed:,.0f} tok/s  {left} left"
        self.output.print_step(
            f"step {self._format_step(step)}  loss {loss:7.4f}  lr {learning_rate:.2e}  "
            f"grad {grad_norm:6.3f}  {seconds * 1000:7.1f} ms  {speed:>9,.0f} tok/s  "
            f"{left:>7} left"
        )
        self.reset_timer()

    def _check_step(self, step: int, loss: float, grad_norm: float) -> None:
        """Print a note about a loss spike; raise `RunError` if the run cannot continue."""
        mean = self._spikes.update(loss)
        if mean is not None:
            self.output.print(
                f"Note: loss spike at step {step}: {loss:.4f}, after a mean of {mean:.4f} "
                f"(gradient norm {grad_norm:.3g}); if it persists, lower learning_rate"
            )
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        if self.may_overflow and self._overflows == MAX_OVERFLOWS:
            raise RunError(
                f"the gradients overflow fp16 at step {step} and the {MAX_OVERFLOWS - 1} before "
                "it, so all of these were skipped: use --precision bf16 or fp32"
            )
        # The weights are NaN after a gradient that is not finite, unless fp16 skips the step.
        if not math.isfinite(loss) or (self._overflows and not self.may_overflow):
            raise RunError(
                f"the loss is {loss} and the gradient norm {grad_norm} at step {step}: the run "
                "cannot go on; lower learning_rate"
            )

    def log_evaluation(
        self, step: int, losses: Mapping[str, float], bits: Mapping[str, float], *, is_best: bool
    ) -> None:
        """Log and print an evaluation: each split's mean loss, and its bits per byte."""
        self._reopen_lost_files()
        both = {split: {"eval_loss": losses[split], "bits_per_byte": bits[split]} for split in bits}
        self._record(step, self._elapsed(), both)
        self.trackers.call_each(lambda tracker: tracker.flush())
        if not all(map(math.isfinite, losses.values())):
            raise RunError(f"the evaluation's loss is not finite at step {step}: {dict(losses)}")
        self.output.print(
            f"eval {self._format_step(step)}  train {losses['train']:.4f}  "
            f"val {losses['val']:.4f}  ({bits['val']:.3f} bits per byte)"
            f"{'  best' if is_best else ''}"
        )

    def log_histograms(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Log a histogram of each tensor, and the number of values that are not finite."""
        histograms = {name: Histogram.from_tensor(tensor) for name, tensor in tensors.items()}
        self.trackers.call_each(lambda tracker: tracker.log_histograms(histograms, step))
        if nonfinite := sum(histogram.nonfinite for histogram in histograms.values()):
            self._record(step, self._elapsed(), {"train": {"nonfinite": nonfinite}})

    def log_sample(self, step: int, text: str, note: str = "") -> None:
        """Log generated text, and print it in one line, with a note below."""
        self._write_sample({"step": step, "text": text})
        self.trackers.call_each(lambda tracker: tracker.log_text("sample", text, step))
        shown = text.strip().replace("\n", "↵")
        self.output.print(f"sample {self._format_step(step)}  {shown}{note and f'  ({note})'}")

    def log_best_sample(self, step: int, text: str) -> None:
        """Log and print generated text of the exported model, that of `step`."""
        self._write_sample({"step": step, "text": text, "exported": True})
        self.trackers.call_each(lambda tracker: tracker.log_text("sample_exported", text, step))
        self.output.print(
            f"\n--- Sample of the best model (step {step:,}) ---\n{text.strip()}\n---"
        )

    def _write_sample(self, line: Mapping[str, object]) -> None:
        self._reopen_lost_files()
        self._samples.write(json.dumps(line, ensure_ascii=False) + "\n")

    def reset_timer(self) -> None:
        """Exclude the time since the last fetch (an evaluation, a save) from the speed."""
        self._timer = time.perf_counter()

    def close(self) -> None:
        """Close the trackers and the files."""
        self.trackers.close_each(lambda tracker: tracker.close())
        self._samples.close()
        self._metrics.close()

    def _reopen_lost_files(self) -> None:
        for file in (self._metrics, self._samples):
            if warning := file.reopen_if_lost():
                self.output.print_warning(warning)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    def _format_step(self, step: int) -> str:
        last = str(self.config.max_iters)
        return f"{step:>{len(last)}}/{last}"

    def _record(
        self, step: int, elapsed: float, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Write the numbers of each subset to `metrics.jsonl`, in one line, and to the trackers."""
        line: dict[str, float | None] = {"step": step, "seconds": round(elapsed, 3)}

        def log(tracker: Tracker) -> None:
            for subset, values in metrics.items():
                tracker.log_metrics(values, step, subset)

        self.trackers.call_each(log)
        for subset, values in metrics.items():
            for name, value in values.items():
                # JSON has no NaN and no infinity: they become null.
                line[get_tag(name, subset)] = value if math.isfinite(value) else None
        self._metrics.write(json.dumps(line) + "\n")
