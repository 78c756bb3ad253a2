"""TensorBoard: `tensorboard --logdir runs/` shows the runs side by side."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.output import escape_control
from utils.run_manager import get_run_tag
from utils.tracking.histograms import Histogram
from utils.tracking.metrics import get_chart

# Regular expressions of the charts' names, which must not match their bits per byte.
STEP_LOSS, TRAIN_LOSS, VAL_LOSS = (
    get_chart(*metric) + "$"
    for metric in (("loss", "train"), ("eval_loss", "train"), ("eval_loss", "val"))
)
# Charts on the page "Custom Scalars", each with train and val loss together.
LAYOUT = {
    "loss": {
        "train and val, evaluated": ["Multiline", [TRAIN_LOSS, VAL_LOSS]],
        "every step, and val": ["Multiline", [STEP_LOSS, VAL_LOSS]],
    }
}


class TensorBoardTracker:
    """Write one event file to `directory`."""

    def __init__(self, directory: Path):
        # Imported late, as this takes a fifth of a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))
        # On a full disk TensorBoard's thread prints a traceback, and the next call raises the same
        # error, which is enough. Private names of TensorBoard 2.21 and Python 3.11.
        with contextlib.suppress(AttributeError):
            thread = self._writer.file_writer.event_writer._async_writer._worker
            thread._invoke_excepthook = lambda *_: None
        self._writer.add_custom_scalars(LAYOUT)

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Add the settings as hyperparameters and as a table, and the metadata as text.

        The page "Text" sorts by name: sample, settings, setup.
        """
        self._add_hparams(config, str(metadata.get("run_id", "")))
        others = dict(metadata)
        sources = others.pop("sources", {})
        rows = ["| setting | value | from |", "|---|---|---|"]
        rows += [
            f"| {name} | {format_cell(value)} | {format_cell(sources.get(name, ''))} |"
            for name, value in config.items()
        ]
        self._writer.add_text("settings", "\n".join(rows), 0)
        self.log_text("setup", json.dumps(others, indent=2, ensure_ascii=False), 0)

    def _add_hparams(self, config: Mapping[str, Any], run_id: str) -> None:
        """Add what the page "HParams" reads: the settings, and the trial's name, its tag first.

        `add_hparams` would create a second run in its own directory. Without a name, the page
        shows the directory's path, cut off before the tag.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        _, summary, _ = hparams({n: v for n, v in config.items() if v is not None}, {})
        plugin = summary.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        session = content.session_start_info
        session.group_name = format_trial(run_id)
        for name, value in config.items():
            if isinstance(value, bool):  # torch writes it as 0 or 1
                session.hparams[name].bool_value = value
        plugin.content = content.SerializeToString()
        self._writer.file_writer.add_summary(summary)

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Add each number under its tag."""
        for name, value in metrics.items():
            self._writer.add_scalar(get_chart(name, subset), value, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Add each histogram from its counts.

        `add_histogram` would count again, in NumPy, and fail on NaN.
        """
        for name, histogram in histograms.items():
            width = (histogram.high - histogram.low) / len(histogram.counts)
            limits = [histogram.low + width * (i + 1) for i in range(len(histogram.counts))]
            # "gradients" would sort before "loss".
            group = "parameter_" if name.startswith("gradients/") else ""
            self._writer.add_histogram_raw(
                group + name,
                min=histogram.low,
                max=histogram.high,
                num=sum(histogram.counts),
                sum=histogram.sum,
                sum_squares=histogram.sum_squares,
                bucket_limits=limits,
                bucket_counts=histogram.counts,
                global_step=step,
            )

    def log_text(self, name: str, text: str, step: int) -> None:
        """Add a text, shown as it is."""
        self._writer.add_text(name, format_literal(text), step)

    def flush(self) -> None:
        """Write the events that are still queued."""
        self._writer.flush()

    def close(self) -> None:
        """Write the queued events and close the event file."""
        self._writer.close()


def format_trial(run_id: str) -> str:
    """Return a run's tag before its time: `baseline 20260131_235959`; unique, as the id is."""
    tag = get_run_tag(run_id)
    return f"{tag} {run_id.removesuffix(f'_{tag}')}" if tag else run_id


def format_literal(text: str) -> str:
    """Return Markdown that shows a text: indented lines without control characters."""
    return "\n".join(f"    {line}" for line in escape_control(text).split("\n"))


def format_cell(value: Any) -> str:
    """Return Markdown that shows a value in a table: HTML entities for what may be markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^\w .,:/-]|_", lambda match: f"&#{ord(match[0])};", escape_control(text))
