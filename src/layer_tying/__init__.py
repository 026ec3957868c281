"""Dynamic layer tying: transformers that learn, while they train, which layers share weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layer_tying.errors import InputError, InvariantError

if TYPE_CHECKING:
    from layer_tying.compression.compress import compress
    from layer_tying.core.budget import max_independent
    from layer_tying.core.distributed import average_gradients
    from layer_tying.core.find import find_layers
    from layer_tying.core.patterns import pattern
    from layer_tying.core.sharding import shard_tied_layers
    from layer_tying.core.tie import tie
    from layer_tying.core.tied_layers import TiedLayers
    from layer_tying.core.tying import Rules, Tying
    from layer_tying.core.untied_copy import untied_copy
    from layer_tying.dynamic import Decision, DynamicTying
    from layer_tying.integrations.trainer import DynamicTyingCallback
    from layer_tying.policies import POLICIES
    from layer_tying.policies.base import Policy
    from layer_tying.policies.dqn import DQN
    from layer_tying.policies.simple import RandomPolicy, Schedule
    from layer_tying.runs.config import TrainConfig
    from layer_tying.runs.train import train
    from layer_tying.saving.export import export_compact, export_expanded
    from layer_tying.saving.load import load
    from layer_tying.saving.sharded import load_sharded, save_sharded

__all__ = [
    "DQN",
    "POLICIES",
    "Decision",
    "DynamicTying",
    "DynamicTyingCallback",
    "InputError",
    "InvariantError",
    "Policy",
    "RandomPolicy",
    "Rules",
    "Schedule",
    "TiedLayers",
    "TrainConfig",
    "Tying",
    "average_gradients",
    "compress",
    "export_compact",
    "export_expanded",
    "find_layers",
    "load",
    "load_sharded",
    "max_independent",
    "pattern",
    "save_sharded",
    "shard_tied_layers",
    "tie",
    "train",
    "untied_copy",
]


# Where they live. torch and transformers take seconds to import: only those who use them wait.
_HOME = {
    "DQN": "policies.dqn",
    "Decision": "dynamic",
    "DynamicTying": "dynamic",
    "DynamicTyingCallback": "integrations.trainer",
    "POLICIES": "policies",
    "Policy": "policies.base",
    "RandomPolicy": "policies.simple",
    "Rules": "core.tying",
    "Schedule": "policies.simple",
    "TiedLayers": "core.tied_layers",
    "TrainConfig": "runs.config",
    "Tying": "core.tying",
    "average_gradients": "core.distributed",
    "compress": "compression.compress",
    "export_compact": "saving.export",
    "export_expanded": "saving.export",
    "find_layers": "core.find",
    "load": "saving.load",
    "load_sharded": "saving.sharded",
    "max_independent": "core.budget",
    "pattern": "core.patterns",
    "save_sharded": "saving.sharded",
    "shard_tied_layers": "core.sharding",
    "tie": "core.tie",
    "train": "runs.train",
    "untied_copy": "core.untied_copy",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"layer_tying.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
