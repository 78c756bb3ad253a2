"""TensorBoard: `tensorboard --logdir runs/` shows the runs side by side."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoardTracker:
    """Writes event files to `directory`, one TensorBoard run for one run of Folio."""

    def __init__(self, directory: Path):
        # Here, as importing it takes a fifth of a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add each scalar under its own tag."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Add a text, as it is: indented, so that Markdown leaves it alone."""
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def flush(self) -> None:
        """Write what TensorBoard's own thread still holds."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest and close the event file."""
        self._writer.close()
