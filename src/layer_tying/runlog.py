"""A run folder's files: the configuration, a line a logged step, a line a decision, the summary."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from layer_tying.config import TrainConfig
from layer_tying.dynamic import Decision
from layer_tying.errors import InputError
from layer_tying.tying import Tying

CONFIG, METRICS, DECISIONS, SUMMARY = "config.json", "metrics.jsonl", "tying.jsonl", "summary.json"


class RunLog:
    """Writes a run folder; a process that does not log (``active=False``) writes nothing."""

    def __init__(self, folder: Path, active: bool = True) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._active = active

    def start(self, config: TrainConfig, overwrite: bool) -> None:
        """Make the folder of a new run.

        Raises:
            InputError: if it cannot be made, or holds a run that may not be overwritten.
        """
        if not self._active:
            return
        if (self.folder / CONFIG).exists():
            if not overwrite:
                raise InputError(
                    f"{self.folder} holds a run: go on with --resume, replace it with --overwrite, "
                    f"or name another --exp"
                )
            shutil.rmtree(self.folder)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(config.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the run folder {self.folder}: {error}") from None

    def config(self) -> TrainConfig:
        """The configuration of the run that is there.

        Raises:
            InputError: if there is none.
        """
        try:
            return TrainConfig.from_json((self.folder / CONFIG).read_text(encoding="utf-8"))
        except OSError:
            raise InputError(f"{self.folder} holds no run to go on with") from None

    def metrics(self, **values: Any) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._append(METRICS, values)

    def decision(self, **values: Any) -> None:
        """Add a line to ``tying.jsonl``."""
        self._append(DECISIONS, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all."""
        self._write(SUMMARY, json.dumps(_finite(values), indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the lines after a step, which a run that goes on from there writes again."""
        for name in (METRICS, DECISIONS):
            if self._active and (self.folder / name).exists():
                lines = (self.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
                self._write(name, "".join(line for line in lines if _step_of(line) <= step))

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self._active:
            with (self.folder / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(_finite(values)) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self._active:
            temporary = self.folder / f".{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.folder / name)


def start_line(tying: Tying) -> dict[str, Any]:
    """The first line of ``tying.jsonl``: the tying that the run starts from."""
    return {"step": 0, "action": None, "state": tying.owners, "reward": None, "epsilon": None}


def decision_line(decision: Decision, with_q: bool) -> dict[str, Any]:
    """A line of ``tying.jsonl``; the Q-matrix is large and goes with few of them."""
    line = {
        "step": decision.step,
        "action": decision.action,
        "state": decision.state,
        "reward": decision.reward,
        "epsilon": decision.statistics.get("epsilon"),
    }
    if decision.event:
        line["event"] = decision.event
    if with_q and "q" in decision.statistics:
        line["q"] = decision.statistics["q"]
    return line


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and the hardware that a figure was measured with."""
    is_cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON does not have become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _step_of(line: str) -> float:
    """The step of a logged line; infinite if the line is torn."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
