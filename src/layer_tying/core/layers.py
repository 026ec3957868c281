"""What a policy's decisions need of the layers that they change."""

from __future__ import annotations

from typing import Protocol

from layer_tying.core.find import LayerStack
from layer_tying.core.tying import Rules, Tying


class Layers(Protocol):
    """The part of ``TiedLayers`` that a policy's decisions need; ablations have it too."""

    tying: Tying
    rules: Rules
    stack: LayerStack

    def apply(self, tying: Tying) -> None:
        """Change to another tying."""
        ...

    def mix(self) -> object:
        """Let the layers learn mixtures of their shared weights."""
        ...

    def verify(self) -> None:
        """Raise an InvariantError if the layers are not what their tying says."""
        ...
