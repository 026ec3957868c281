"""How the layers of a model are tied: a small record that stays with the model.

It goes into checkpoints and exports as well, so that a model that was loaded goes on being tied as
it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn

from layer_tying.errors import InputError

ATTRIBUTE = "_layer_tying"  # of the model; plain data, so that copies and pickles have it too
RETIRED = ("inherit",)  # options that older checkpoints and exports have
CHOICES = {
    "gradient": ("sum", "owner"),
    "optimizer_state": ("copy", "fresh"),
}


@dataclass(frozen=True)
class TyingSettings:
    """The options of ``TiedLayers``, with their defaults, and what they led to.

    Attributes:
        layers: the dotted name of the list of layers (or several names, say an encoder's and a
            decoder's); found automatically where there is only one candidate.
        untied: name patterns (as in ``fnmatch``, within a layer) of parameters that each layer
            keeps for itself, such as ``["*ln_*"]``, the norms of GPT-2.
        by_kind: where blocks differ, tie within the classes of equal blocks instead of refusing.
        gradient: ``"sum"``: a shared weight's gradient is the sum over all the layers that use it
            (true tying). ``"owner"``: only the owner's own position contributes; this saves the
            weight gradients of all other positions.
        optimizer_state: the optimizer state of a newly independent layer: a ``"copy"`` of its
            owner's, or ``"fresh"``.
        residual_scaling: the power p of 1/n residual scaling: what a layer adds to the residual
            stream is multiplied by 1/n^p in the forward pass, where n layers use its weights.
        residual_outputs: name patterns of the modules within a layer whose output is added to the
            residual stream; needed for residual scaling.
        mixes: whether the layers read learned mixtures of the shared weights.
        owners: the tying at the time of saving; empty where it is not known.
        others: the settings of the other parts of the layers, where parts are tied each in its own
            way (see ``parts.py``).

    Raises:
        InputError: if a value is not one of the choices.
    """

    layers: str | tuple[str, ...] | None = None
    untied: tuple[str, ...] = ()
    by_kind: bool = False
    gradient: Literal["sum", "owner"] = "sum"
    optimizer_state: Literal["copy", "fresh"] = "copy"
    residual_scaling: float = 0.0
    residual_outputs: tuple[str, ...] = ()
    mixes: bool = False
    owners: tuple[int, ...] = ()
    others: tuple[TyingSettings, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name} is {' or '.join(map(repr, choices))}, got {value!r}")
        for name in ("untied", "residual_outputs"):
            if isinstance(value := getattr(self, name), str):
                raise InputError(f"{name} is a list of name patterns: write [{value!r}]")
        if not math.isfinite(self.residual_scaling):
            raise InputError(f"residual_scaling is a power of 1/n, got {self.residual_scaling}")
        if self.mixes and self.gradient == "owner":
            raise InputError(
                "gradient 'owner' is of tied layers: those that mix the shared weights all "
                "contribute to the gradient, take 'sum'"
            )

    def but(self, **changes: Any) -> TyingSettings:
        """The same settings but for some."""
        return TyingSettings.from_dict(asdict(self) | changes)

    def to_json(self) -> str:
        """The settings as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TyingSettings:
        """The settings that ``to_json`` wrote.

        Raises:
            InputError: if it is not such a text.
        """
        try:
            return cls.from_dict(json.loads(text))
        except ValueError as error:
            raise InputError(f"not the settings of a tying: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TyingSettings:
        """The settings from the values of a JSON object, whose lists become tuples.

        Raises:
            InputError: if one has another name.
        """
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in values.items() if name not in RETIRED}
        if odd := sorted(set(values) - known):
            raise InputError(f"not the settings of a tying: {odd[0]} is none of {sorted(known)}")
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        tuples["others"] = tuple(map(cls.from_dict, values.get("others", ())))
        return cls(**tuples)


def remember_settings(model: nn.Module, settings: TyingSettings) -> None:
    """Keep the settings of a model's tying with the model."""
    model.__dict__[ATTRIBUTE] = asdict(settings)


def is_remembered(model: nn.Module) -> bool:
    """Whether a model was tied, and remembers how."""
    return ATTRIBUTE in model.__dict__


def settings_of(model: nn.Module) -> TyingSettings:
    """The settings that were remembered of a model; the defaults if there are none."""
    return TyingSettings.from_dict(model.__dict__.get(ATTRIBUTE, {}))


def forget_settings(model: nn.Module) -> None:
    """Keep nothing of how a model was tied."""
    model.__dict__.pop(ATTRIBUTE, None)
