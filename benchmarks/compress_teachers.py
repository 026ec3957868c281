"""The models that are compressed, and models of their size after it, trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common import Case
from quality_settings import SETTINGS, Setting

from layer_tying.runs.config import TrainConfig

SCRATCH = "trained from scratch"


@dataclass(frozen=True)
class Teacher:
    """A model that is trained here, to be compressed.

    Attributes:
        setting: one of the benchmark of sharing, wider: the data and the flags.
        rate: its learning rate.
    """

    setting: Setting
    rate: float

    @property
    def depth(self) -> int:
        """Its layers."""
        return self.setting.depth

    @property
    def steps(self) -> int:
        """It was trained for."""
        return self.setting.flags["max_steps"]

    @property
    def about(self) -> str:
        """What it is, for the page."""
        return f"{self.depth} layers x {self.setting.flags['emsize']}, {self.steps:,} steps"


TEXT = SETTINGS["wiki2-bytes"]
TEACHERS = {
    "text": Teacher(replace(TEXT, flags={**TEXT.flags, "emsize": 128, "nhead": 4}), rate=1.5e-3),
}


def run_of(folder: Path, case: Case) -> TrainConfig:
    """The run that has to be there before a case: the teacher, or the model from scratch.

    A model from scratch trains for the teacher's steps and those of healing.
    """
    teacher = TEACHERS[case["teacher"]]
    flags = {**teacher.setting.flags, "lr": teacher.rate, "policy": "none"}
    name = case["teacher"]
    if case["method"] == SCRATCH:
        name += f"-{case['sets']}-{case['steps']}-{case['seed']}"
        flags |= {"nlayers": case["sets"], "seed": case["seed"]}
        flags["max_steps"] += case["steps"]
    if teacher.setting.cut:
        data = folder / "data"
        if not data.exists():
            teacher.setting.cut(data)
        flags["dataset"] = str(data)
    return TrainConfig.from_flat(**flags, output_dir=str(folder), exp=name)
