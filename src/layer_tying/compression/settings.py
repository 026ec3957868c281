"""How a model is compressed, as settings. No torch here.

The text below a field is the help of its flag of ``layer-tying compress``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from layer_tying.errors import InputError
from layer_tying.runs.config import CONFIG, OptimizationConfig
from layer_tying.runs.reading import flat_settings
from layer_tying.settings import (
    check_at_least,
    check_finite,
    check_positive,
    check_shares,
    check_types,
)

FORMAT = 1
RUN, CHOICE = "run", "choice.json"  # in the output's folder; in that one
# What may have moved when a compression goes on: models and data are told by their contents.
PLACES = ("source", "output", "dataset", "data_dir")
NOT_HERE = ("epochs", "accumulate", "checkpointing", "compile", "parallel")  # of the optimization
USUAL: dict[str, Any] = {"lr": 1e-3, "final_lr": 0.0, "max_steps": 2000}  # of the optimization


@dataclass(frozen=True)
class HealingSettings:
    """What the tied model learns from the untouched one.

    Raises:
        InputError: if a value is out of its range.
    """

    sharing: Literal["tied", "mixture"] = "mixture"
    """mixture: each layer reads a learned mixture of the kept layers; or tied: one of them"""
    start: Literal["groups", "closed-form"] = "groups"
    """what mixtures start from: the groups that were chosen, or truncated SVD of all layers"""
    gradual: bool = False
    """tie one group of layers after another over the first half of the steps"""
    temperature: float = 1.0
    """of the distributions whose divergence is minimised"""
    loss_weight: float = 0.1
    """share of the ordinary loss; the rest is the divergence from the untouched model"""
    hidden_weight: float = 0.0
    """weight of the distance between hidden states and the untouched model's"""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, ("temperature",))
        check_finite(self, ("temperature", "hidden_weight"))
        check_at_least(self, 0, ("hidden_weight",))
        check_shares(self, ("loss_weight",))
        if self.start == "closed-form" and (self.sharing == "tied" or self.gradual):
            raise InputError("start closed-form is of mixtures that are made at once")


@dataclass(frozen=True)
class BudgetSettings:
    """How small the model gets: one of these is given; of several the tightest holds."""

    layers: int | None = None
    """most layers with weights of their own"""
    parameters: int | None = None
    """most parameters of the whole model"""
    bytes: int | None = None
    """most bytes of the file with its weights"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("layers", "parameters", "bytes"))
        if self.layers is None and self.parameters is None and self.bytes is None:
            raise InputError("give the size to reach: layers, parameters or bytes")


@dataclass(frozen=True)
class SearchSettings:
    """How the layers that share weights are found."""

    groups: Literal["any", "neighbours", "cycle", "free", "grown"] = "any"
    """which groups of layers are searched; any: all kinds, and the best by measurement"""
    probes: int = 2
    """batches on which divergences are measured"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("probes",))


@dataclass(frozen=True)
class CompressConfig:
    """One run of ``layer-tying compress``: what is compressed, on which data, into what.

    Raises:
        InputError: if a value is out of its range.
    """

    source: str
    """a folder of transformers, a run, or an export"""
    output: str
    """the folder that the small model is written to"""
    budget: BudgetSettings
    dataset: str = ""
    """a data set's name, hub:OWNER/NAME, or the path of a file or folder"""
    data_dir: str | None = None
    """where local data sets lie (else $LAYER_TYING_DATA)"""
    bptt: int | None = None
    """sequence length in tokens (default: the model's context, at most 256)"""
    batch_size: int = 8
    """sequences or images in a batch"""
    search: SearchSettings = SearchSettings()
    healing: HealingSettings = HealingSettings()
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(**USUAL))
    export_dtype: Literal["fp32", "bf16", "fp16", "int8"] | None = None
    """type of the stored weights (default: the model's)"""
    seed: int = 0
    """of the order of the data"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("bptt", "batch_size"))
        check_at_least(self, 0, ("seed",))
        if not self.dataset:
            raise InputError("name the data that the model is to be healed on: --data")
        if Path(self.source).resolve() == Path(self.output).resolve():
            raise InputError(f"cannot compress {self.source} into itself: name another folder")

    def settled(self, precision: str) -> CompressConfig:
        """The same with the precision that ``auto`` stands for."""
        return replace(self, optimization=settled(self.optimization, precision))

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)


def to_go_on_with(run: Path, asked: CompressConfig) -> CompressConfig:
    """What was asked for, if it is what OUTPUT/run was started with; precision as settled there.

    Raises:
        InputError: if there is no such run, or it is another compression.
    """
    try:
        saved = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        config = asked.settled(saved["optimization"]["precision"])
    except FileNotFoundError:
        raise InputError(f"{asked.output} holds no compression to go on with") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run / CONFIG} cannot be used: {error!r}") from None
    before, now = flat_settings(saved), flat_settings(json.loads(config.to_json()))
    for name, value in now.items():
        if name not in PLACES and before.get(name) != value:
            raise InputError(
                f"cannot resume {asked.output} with another configuration: {name} is "
                f"{before.get(name)!r} in the saved one and {value!r} in the other"
            )
    return config


def settled(optimization: OptimizationConfig, precision: str) -> OptimizationConfig:
    """The same with the precision that ``auto`` stands for."""
    is_settled = optimization.precision != "auto"
    return optimization if is_settled else replace(optimization, precision=precision)
