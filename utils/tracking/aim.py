"""Aim."""

from pathlib import Path

from parameters import ModelConfig


def require_aim():
    """Stub."""


def aim_repository(config: ModelConfig) -> str:
    """Where Aim keeps the runs of these settings, as `aim up --repo` takes it."""
    return config.aim_repo or str(Path(config.runs_dir).resolve().parent)


class AimTracker:
    """Stub."""
