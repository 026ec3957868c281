"""Logging to a tracker (TensorBoard, Weights & Biases, MLflow), through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from layer_tying.errors import InputError


def check_installed(tracker: str | None) -> None:
    """Raise an InputError if the tracker is not installed."""
    if tracker and importlib.util.find_spec(tracker) is None:
        raise InputError(f"log-with {tracker}: the package {tracker} is not installed")


@contextmanager
def tracking(
    accelerator: Accelerator, tracker: str | None, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Log to the run's tracker, if it has one; without, there is nothing to do."""
    if not tracker:
        yield
        return
    plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str)}
    accelerator.init_trackers("layer-tying", config=plain)
    try:
        yield
    finally:
        accelerator.end_training()
