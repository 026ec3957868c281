"""Dynamic layer tying: transformers that learn, while they train, which layers share weights."""

from layer_tying.dqn import DQN
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.policies import Policy, RandomPolicy, pattern
from layer_tying.surgery import TiedLayers
from layer_tying.tying import Rules, Tying

__all__ = [
    "DQN",
    "Decision",
    "DynamicTying",
    "InputError",
    "Policy",
    "RandomPolicy",
    "Rules",
    "TiedLayers",
    "Tying",
    "pattern",
]
