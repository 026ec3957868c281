"""Running figures of a run: where the time went, and what it held at each step."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from layer_tying.runs.memory import ModelState


class Stopwatch:
    """Seconds by activity. Each lap ends one activity and starts whatever comes next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, activity: str) -> None:
        """Add the time since the last lap to an activity, the accelerator's work included."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds in all laps so far."""
        return sum(self.seconds.values())


def progress_bar(name: str, done: int, total: int, is_shown: bool = True) -> tqdm[Any]:
    """A bar of optimizer steps."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        disable=not is_shown,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n}/{total}{postfix}, {remaining} left",
    )


@dataclass
class Tally:
    """Sums over the steps of a run, from which its means and peaks are reported."""

    steps: int = 0
    tokens: int = 0
    independent_layers: int = 0
    trainable_parameters: int = 0
    model_state_bytes: int = 0
    model_state_bytes_peak: int = 0
    peak_memory_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add_step(self, tokens: int, independent_layers: int, state: ModelState) -> None:
        """Count a training step."""
        self.steps += 1
        self.tokens += tokens
        self.independent_layers += independent_layers
        self.trainable_parameters += state.num_trainable
        self.model_state_bytes += state.total_bytes
        self.model_state_bytes_peak = max(self.model_state_bytes_peak, state.total_bytes)

    def means(self) -> dict[str, float]:
        """The figures of ``summary.json`` that are means or peaks over training."""
        steps = max(self.steps, 1)
        return {
            "independent_layers_mean": self.independent_layers / steps,
            "trainable_parameters_mean": self.trainable_parameters / steps,
            "model_state_bytes_mean": self.model_state_bytes / steps,
            "model_state_bytes_peak": self.model_state_bytes_peak,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
