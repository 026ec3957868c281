"""The models that are compressed, and models of their size after it, trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import Case
from quality_settings import SETTINGS, Flags, of_the_paper

from layer_tying.runs.config import TrainConfig

SCRATCH = "trained from scratch"


@dataclass(frozen=True)
class Teacher:
    """A model that is trained here, to be compressed.

    Attributes:
        what: it is, in a few words for the page.
        flags: of `layer-tying train`, but where the run lies.
        healing_rate: the learning rate of healing.
        at_half: the methods that are better at half of it, with four layers.
        cut: writes the data into a folder, where they are a part of a text.
        probes: how many batches the groups are chosen on, two at most.
    """

    what: str
    flags: Flags
    healing_rate: float
    at_half: tuple[str, ...] = ()
    cut: Callable[[Path], None] | None = None
    probes: int = 2

    @property
    def depth(self) -> int:
        """Its layers."""
        return self.flags["nlayers"]

    @property
    def steps(self) -> int:
        """It was trained for."""
        return self.flags["max_steps"]

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return self.flags["lr"]

    @property
    def about(self) -> str:
        """Its shape and training, for the page."""
        width = self.flags["emsize"]
        return f"{self.what} of {self.depth} layers x {width}, {self.steps:,} steps"


TEXT = SETTINGS["wiki2-bytes"]
WIDER = {"emsize": 128, "nhead": 4, "lr": 1.5e-3, "policy": "none"}
TEACHERS = {
    "text": Teacher(
        "Llama on bytes",
        {**TEXT.flags, **WIDER},
        healing_rate=3e-3,
        at_half=("compress", "low rank"),
        cut=TEXT.cut,
    ),
    "vit": Teacher("ViT on CIFAR-10", of_the_paper("vit-cifar10-conventional"), healing_rate=1e-3),
    "bert": Teacher(
        "BERT on masked bytes",
        of_the_paper("bert-wiki2-conventional"),
        healing_rate=2e-3,
        probes=1,  # its batches have 64 sequences, eight times as many as those of the text
    ),
}


def run_of(folder: Path, case: Case) -> TrainConfig:
    """The run that has to be there before a case: the teacher, or the model from scratch.

    A model from scratch trains for the teacher's steps and those of healing.
    """
    teacher = TEACHERS[case["teacher"]]
    flags = dict(teacher.flags)
    name = case["teacher"]
    if case["method"] == SCRATCH:
        name += f"-{case['sets']}-{case['steps']}-{case['seed']}"
        flags |= {"nlayers": case["sets"], "seed": case["seed"]}
        flags["max_steps"] += case["steps"]
    if teacher.cut:
        data = folder / "data"
        if not data.exists():
            teacher.cut(data)
        flags["dataset"] = str(data)
    return TrainConfig.from_flat(**flags, output_dir=str(folder), exp=name)
