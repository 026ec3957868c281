"""What a run is: frozen, validated settings in groups, which make a round trip through JSON.

Every setting is a flag of ``layer-tying train`` (``max_steps`` is ``--max-steps``); the text below
a field is the flag's help. No two groups have a setting of one name, so that settings can also be
given flat: ``TrainConfig.from_flat(nlayers=4, lr=1e-3)``. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from layer_tying.data.config import DataConfig
from layer_tying.errors import InputError
from layer_tying.models.config import ModelConfig
from layer_tying.runs.tying_config import TyingConfig
from layer_tying.settings import (
    check_at_least,
    check_finite,
    check_positive,
    check_shares,
    check_types,
    hidden,
)

FORMAT = 3  # of run folders
# Settings that older run folders have, with the values that mean what is done now.
RETIRED = {"inherit": ("", "first"), "layer_price": (None,), "shared_init": ("", "plain")}
CONFIG = "config.json"
# What a fine-tuned model has from the run it starts from.
SHAPE = ("family", "tokenizer", "objective", "nlayers", "nhead", "emsize", "bptt")
# What may differ between a run and its resumption: where things lie, also in memory, and what is
# reported.
FREE = (
    "data_dir",
    "output_dir",
    "exp",
    "log_every",
    "log_with",
    "save_every",
    "parallel",
    "settled",
)


@dataclass(frozen=True)
class OptimizationConfig:
    """How the weights are trained."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw, or adamw8bit: its state in 8 bits, by bitsandbytes"""
    lr: float = 3e-3
    """peak learning rate of AdamW"""
    warmup: float = 0.05
    """share of the steps over which the learning rate rises"""
    final_lr: float = 0.1
    """where the cosine ends, as a share of the peak learning rate"""
    weight_decay: float = 0.1
    """weight decay of matrices (vectors are not decayed)"""
    clip: float = 1.0
    """largest norm of the gradient"""
    epochs: int = 1
    """passes over the training split"""
    max_steps: int | None = None
    """optimizer steps (of train: instead of --epochs)"""
    accumulate: int = 1
    """batches whose gradients make one optimizer step"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device computes in it (CUDA and CPUs that do), else fp32"""
    checkpointing: bool = False
    """recompute activations in the backward pass"""
    compile: bool = False
    """compile the layers with torch.compile"""
    parallel: Literal["replicate", "shard"] = "replicate"
    """what each of many processes holds: the whole model, or a part of every weight"""

    def __post_init__(self) -> None:
        check_types(self)
        if self.parallel == "shard" and (self.compile or self.optimizer != "adamw"):
            other = "compile" if self.compile else f"optimizer {self.optimizer}"
            raise InputError(f"parallel shard does not go with {other}: take parallel replicate")
        check_at_least(self, 1, ("epochs", "max_steps", "accumulate"))
        check_at_least(self, 0, ("weight_decay",))
        check_positive(self, ("lr", "clip"))
        check_finite(self, ("lr", "weight_decay"))
        check_shares(self, ("warmup", "final_lr"))


@dataclass(frozen=True)
class EvaluationConfig:
    """When the validation split is scored, and how much of it."""

    eval_every: int | None = None
    """steps between validations (default: a tenth of the run)"""
    eval_batches: int | None = 50
    """most batches of a validation during training"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("eval_every", "eval_batches"))


@dataclass(frozen=True)
class LoggingConfig:
    """Where a run lies and what it writes."""

    exp: str = "run"
    """name of the run, its folder in --output-dir"""
    output_dir: str = "runs"
    """where run folders are made"""
    log_every: int = 10
    """optimizer steps between logged lines"""
    save_every: int | None = None
    """steps between checkpoints (default: as validations)"""
    log_with: Literal["tensorboard", "wandb", "mlflow"] | None = None
    """also log to a tracker"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("log_every", "save_every"))
        parts = Path(self.exp).parts  # none of "" and "."
        if not parts or Path(self.exp).is_absolute() or ".." in parts:
            raise InputError(f"exp {self.exp!r} is not the name of a folder inside output-dir")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.exp


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        settled: names of the settings that were left open and then given their default by
            ``resolve``; empty as long as they are open.

    Raises:
        InputError: if a value is out of its range, or two values contradict each other.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    tying: TyingConfig = field(default_factory=TyingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0
    """of weights, data order and policy"""
    settled: tuple[str, ...] = hidden(())

    def __post_init__(self) -> None:
        check_at_least(self, 0, ("seed",))
        if self.seed >= 2**32:
            raise InputError(f"seed is less than 2**32, got {self.seed}")
        if self.optimization.max_steps is not None:
            self.tying.check_every(self.optimization.max_steps)
        self._check_task()
        self.tying.check_source(for_task=self.data.task is not None)

    def _check_task(self) -> None:
        task = self.data.task
        if task and self.model.family == "vit":
            raise InputError(f"task {task} is one of text, and family vit reads images")
        if task and not self.tying.source:
            raise InputError(f"task {task} needs --from RUN, the run to fine-tune")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.logging.folder

    @property
    def digest(self) -> str:
        """SHA-256 of all that makes a run the experiment it is, in hexadecimal."""
        values = {key: value for key, value in self.flat().items() if key not in FREE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, without the groups."""
        return {name: getattr(_home(self, name), name) for name in SETTINGS}

    @classmethod
    def from_flat(cls, **settings: Any) -> TrainConfig:
        """A configuration from settings by their names; the others have their defaults.

        Raises:
            InputError: if there is no such setting, or a value does not fit.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> TrainConfig:
        """The same with other values of some settings, by their names.

        Raises:
            InputError: if there is no such setting, or a value does not fit.
        """
        groups: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in SETTINGS:
                raise InputError(f"there is no setting {name!r}")
            groups.setdefault(SETTINGS[name], {})[name] = value
        own = groups.pop("", {})
        changed = {
            group: replace(getattr(self, group), **values) for group, values in groups.items()
        }
        return replace(self, **changed, **own)

    def open_again(self) -> TrainConfig:
        """The configuration before its defaults were settled."""
        defaults = {name: DEFAULTS[name] for name in self.settled}
        return self.replace(**(defaults | {"settled": ()}))

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The configuration that ``to_json`` wrote.

        Raises:
            InputError: if it is not one.
        """
        try:
            saved = json.loads(text)
            if not isinstance(saved, dict) or "format" not in saved:
                raise InputError(f"it has no format number; this program reads format {FORMAT}")
            if (number := saved.pop("format")) != FORMAT:
                raise InputError(f"it has format {number}; this program reads format {FORMAT}")
            settled = saved.pop("settled", ())
            groups = {name: kind(**_known(saved.pop(name))) for name, kind in GROUPS.items()}
            settled = tuple(name for name in settled if name not in RETIRED)
            return cls(**groups, **_known(saved), settled=settled)
        except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a run's configuration: {error}") from None


def _home(config: TrainConfig, name: str) -> Any:
    return getattr(config, SETTINGS[name]) if SETTINGS[name] else config


GROUPS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimization": OptimizationConfig,
    "tying": TyingConfig,
    "evaluation": EvaluationConfig,
    "logging": LoggingConfig,
}
# The group of each setting; "" for those of TrainConfig itself.
SETTINGS = {each.name: name for name, group in GROUPS.items() for each in fields(group)}
SETTINGS |= {each.name: "" for each in fields(TrainConfig) if each.name not in GROUPS}
DEFAULTS = TrainConfig().flat()


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where settings are tuples, and older runs have settings that are no more."""
    for name, meant in RETIRED.items():
        if values.get(name, meant[0]) not in meant:
            raise InputError(f"{name} {values[name]!r} is of an older version, and is no more")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name not in RETIRED
    }


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
        InputError: if there is none, or one of another version.
    """
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{folder} holds no run (no {CONFIG})") from None
    except UnicodeDecodeError:
        raise InputError(f"{folder / CONFIG}: not a run's configuration: not UTF-8") from None
    try:
        return TrainConfig.from_json(text)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def first_difference(one: TrainConfig, other: TrainConfig) -> str | None:
    """The first setting that makes two runs different experiments, or None."""
    ours, theirs = one.flat(), other.flat()
    for name in SETTINGS:
        if name not in FREE and ours[name] != theirs[name]:
            return f"{name} is {ours[name]!r} in one and {theirs[name]!r} in the other"
    return None
