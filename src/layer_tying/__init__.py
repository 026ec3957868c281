"""Dynamic layer tying: transformers that learn, while they train, which layers share weights."""

from typing import TYPE_CHECKING, Any

from layer_tying.dqn import DQN
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.parallel import average_gradients
from layer_tying.policies import Policy, RandomPolicy, pattern
from layer_tying.surgery import TiedLayers
from layer_tying.tying import Rules, Tying

if TYPE_CHECKING:
    from layer_tying.export import export_compact, export_expanded, load

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
    "average_gradients",
    "export_compact",
    "export_expanded",
    "load",
    "pattern",
]


def __getattr__(name: str) -> Any:
    """Exporting needs transformers, whose import takes seconds: only who exports waits for it."""
    if name in ("export_compact", "export_expanded", "load"):
        from layer_tying import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
