"""Dynamic layer tying: transformers that learn, while they train, which layers share weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layer_tying.bandit import Bandit
from layer_tying.damping import damp_shared_layers
from layer_tying.dqn import DQN
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.parallel import average_gradients
from layer_tying.policies import Policy, RandomPolicy, pattern
from layer_tying.surgery import TiedLayers
from layer_tying.tying import Rules, Tying

if TYPE_CHECKING:
    from layer_tying.export import export_compact, export_expanded, load
    from layer_tying.sharding import shard_tied_layers

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
    "export_compact": "export",
    "export_expanded": "export",
    "load": "export",
    "shard_tied_layers": "sharding",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"layer_tying.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
