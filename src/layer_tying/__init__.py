"""Dynamic layer tying: transformers that learn, while they train, which layers share weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layer_tying.core.distributed import average_gradients
from layer_tying.core.patterns import pattern
from layer_tying.core.residual_scale import damp_shared_layers
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Rules, Tying
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.policies.bandit import Bandit
from layer_tying.policies.base import Policy
from layer_tying.policies.dqn import DQN
from layer_tying.policies.simple import RandomPolicy

if TYPE_CHECKING:
    from layer_tying.core.sharding import shard_tied_layers
    from layer_tying.saving.export import export_compact, export_expanded, load

__all__ = [
    "DQN",
    "Bandit",
    "Decision",
    "DynamicTying",
    "InputError",
    "Policy",
    "RandomPolicy",
    "Rules",
    "TiedLayers",
    "Tying",
    "average_gradients",
    "damp_shared_layers",
    "export_compact",
    "export_expanded",
    "load",
    "pattern",
    "shard_tied_layers",
]


# What needs transformers or FSDP, whose imports take seconds: only who uses it waits for it.
_HOME = {
    "export_compact": "saving.export",
    "export_expanded": "saving.export",
    "load": "saving.export",
    "shard_tied_layers": "core.sharding",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"layer_tying.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
