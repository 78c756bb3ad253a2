"""TensorBoard: `tensorboard --logdir runs/` shows the runs side by side."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.metrics import get_tag
from utils.tracking.histograms import Histogram

# One chart with the losses together, on the page "Custom Scalars".
LAYOUT = {
    "loss": {
        "train and val, evaluated": [
            "Multiline",
            [get_tag("eval_loss", "train"), get_tag("eval_loss", "val")],
        ],
        "every step, and val": [
            "Multiline",
            [get_tag("loss", "train"), get_tag("eval_loss", "val")],
        ],
    }
}


class TensorBoardTracker:
    """Writes event files to `directory`, one TensorBoard run for one run of Folio."""

    def __init__(self, directory: Path):
        # Here, as importing it takes a fifth of a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))
        # Where the disk is full, its thread dies with a traceback on stderr, and the next call
        # raises the same, which is told in one line.
        with contextlib.suppress(AttributeError):
            thread = self._writer.file_writer.event_writer._async_writer._worker
            thread._invoke_excepthook = lambda *_: None
        self._writer.add_custom_scalars(LAYOUT)

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Add the settings as hyperparameters and as a table, and the rest as text.

        `add_hparams` would make a second run in a directory of its own. What it writes there
        belongs here: the page "HParams" needs no more than the session's settings.
        """
        from torch.utils.tensorboard.summary import hparams

        known = {name: value for name, value in config.items() if value is not None}
        _, session, _ = hparams(known, {})
        self._writer.file_writer.add_summary(session)
        sources = metadata.get("sources", {})
        rows = ["| setting | value | from |", "|---|---|---|"]
        rows += [
            f"| {name} | {_cell(value)} | {_cell(sources.get(name, ''))} |"
            for name, value in config.items()
        ]
        self._writer.add_text("config", "\n".join(rows), 0)
        about = {name: value for name, value in metadata.items() if name != "sources"}
        self.log_text("run", json.dumps(about, indent=2, ensure_ascii=False), 0)

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Add each number under its tag."""
        for name, value in metrics.items():
            self._writer.add_scalar(get_tag(name, subset), value, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Add each histogram as it was counted.

        `add_histogram` would count again, in NumPy, and fail where a value is NaN.
        """
        for name, histogram in histograms.items():
            width = (histogram.high - histogram.low) / len(histogram.counts)
            limits = [histogram.low + width * (i + 1) for i in range(len(histogram.counts))]
            self._writer.add_histogram_raw(
                name,
                min=histogram.low,
                max=histogram.high,
                num=histogram.num,
                sum=histogram.sum,
                sum_squares=histogram.sum_squares,
                bucket_limits=limits,
                bucket_counts=histogram.counts,
                global_step=step,
            )

    def log_text(self, name: str, text: str, step: int) -> None:
        """Add a text, as it is: indented, so that Markdown leaves it alone."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.split("\n")), step)

    def flush(self) -> None:
        """Write what TensorBoard's own thread still holds."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and close the event file."""
        self._writer.close()


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\\", "\\\\").replace("|", "\\|")
