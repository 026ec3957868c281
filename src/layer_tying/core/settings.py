"""How the layers of a model are tied, as a small record that goes with exports and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from layer_tying.errors import InputError


@dataclass(frozen=True)
class TyingSettings:
    """The options of ``TiedLayers``, whose names and meanings these are, and what they led to.

    Attributes:
        owners: the tying at the time of saving; empty where it is not known.
        policy: the name of the policy that decides, if one does.
    """

    owners: tuple[int, ...] = ()
    policy: str | None = None
    layers: str | tuple[str, ...] | None = None
    untied: tuple[str, ...] = ()
    by_kind: bool = False
    gradient: Literal["sum", "owner"] = "sum"
    optimizer_state: Literal["copy", "fresh"] = "copy"
    inherit: Literal["first", "majority"] = "first"
    residual_scaling: float = 0.0
    residual_outputs: tuple[str, ...] = ()

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
        if odd := sorted(set(values) - known):
            raise InputError(f"not the settings of a tying: {odd[0]} is none of {sorted(known)}")
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**tuples)


_OF_MODELS: WeakKeyDictionary[nn.Module, TyingSettings] = WeakKeyDictionary()


def remember_settings(model: nn.Module, settings: TyingSettings) -> None:
    """Keep the settings of a model's tying for as long as the model lives."""
    _OF_MODELS[model] = settings


def settings_of(model: nn.Module) -> TyingSettings:
    """The settings that were remembered of a model; the defaults if there are none."""
    return _OF_MODELS.get(model, TyingSettings())
