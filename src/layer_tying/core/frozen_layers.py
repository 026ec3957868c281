"""The paper's ablation "training without weight tying": a tying is claimed, and layers are frozen.

``FrozenLayers`` stands in for ``TiedLayers``. It has the tying that a policy gave it (the claim),
and a storage that may differ from it: a layer that is not independent in the claim, yet owns its
weights in the storage, is frozen. It computes with its weights, but has no gradient and no
optimizer state, and is not trainable.
"""

from __future__ import annotations

from torch.optim import Optimizer

from layer_tying.core.find import LayerStack
from layer_tying.core.tied_layers import Parameters, TiedLayers
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError, InvariantError


class FrozenLayers:
    """Layers that are frozen at their own weights where ``TiedLayers`` would tie them.

    Args:
        storage: the model's layers as they are in memory.
        tying: what is claimed at the start.
        copies: whether a layer whose claim changes is tied, or untied, as usual: then layers are
            frozen only until the policy first moves them (a literal reading of Algorithm 1, line
            2). Otherwise the storage never changes, and nothing is ever copied.

    Attributes:
        tying: the claim in force.
        storage: the layers as they are in memory.
        rules, stack: those of the storage.
    """

    def __init__(self, storage: TiedLayers, tying: Tying, *, copies: bool) -> None:
        storage.rules.check(tying)
        self.storage = storage
        self.tying = tying
        self.rules: Rules = storage.rules
        self.stack: LayerStack = storage.stack
        self._copies = copies
        self._set_trainable(thawed=set(), frozen=self.frozen)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are kept in step."""
        return self.storage.optimizers

    @property
    def frozen(self) -> set[int]:
        """The layers that keep weights of their own, and do not train them."""
        in_memory = set(self.storage.tying.independent_layers)
        return in_memory - set(self.tying.independent_layers)

    def parameters(self, layer: int) -> Parameters:
        """The parameters that a layer uses, by their names within the layer."""
        return self.storage.parameters(layer)

    def storage_for(self, tying: Tying) -> Tying:
        """The tying of the storage once the layers claim this one."""
        in_memory = self.storage.tying
        if not self._copies:
            return in_memory
        claims = zip(in_memory.owners, self.tying.owners, tying.owners, strict=True)
        return Tying(tuple(here if old == new else new for here, old, new in claims))

    def apply(self, tying: Tying) -> None:
        """Claim another tying: tie, untie, freeze and thaw what has to be.

        Raises:
            InputError: if the tying does not fit the model; then nothing has changed.
        """
        self.rules.check(tying)
        before = self.frozen
        self.storage.apply(self.storage_for(tying))
        self.tying = tying
        self._set_trainable(thawed=before - self.frozen, frozen=self.frozen - before)

    def mix(self) -> object:
        """Refuse: mixtures are of shared weights, and frozen layers keep their own.

        Raises:
            InputError: always.
        """
        raise InputError("frozen layers keep weights of their own: there is nothing to mix")

    def verify(self) -> None:
        """Check that claim and storage agree, and that the frozen layers are frozen.

        Raises:
            InvariantError: if they do not.
        """
        self.storage.verify()
        for layer, owner in enumerate(self.tying.owners):
            if self.storage.tying.owners[layer] not in (layer, owner):
                raise InvariantError(f"layer {layer} is tied to another layer than {owner}")
            for name, parameter in self.parameters(layer).items():
                is_frozen = not parameter.requires_grad and parameter.grad is None
                if is_frozen != (layer in self.frozen):
                    raise InvariantError(
                        f"{name} of layer {layer} should be the other of frozen and trainable"
                    )

    def _set_trainable(self, thawed: set[int], frozen: set[int]) -> None:
        for layer in thawed:
            for parameter in self.parameters(layer).values():
                parameter.requires_grad_(True)
        self.storage.drop_optimizer_state(frozen)
        for layer in frozen:
            for parameter in self.parameters(layer).values():
                parameter.requires_grad_(False)
                parameter.grad = None
