"""Sharing parameters in a live model: tie and untie its layers while it trains.

The one invariant: state and storage agree, always. If ``tying.owners[i] == j``, every shared
parameter of layer i *is* layer j's ``Parameter`` (the same object); if ``owners[i] == i``, it
shares storage with no other independent layer. The optimizer holds each live parameter exactly
once, and optimizer state for no other.

Parameters are tied, not modules: each layer keeps its own module, its ``layer_idx``, its buffers,
its hooks and its slot in the KV cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import nn
from torch.optim import Optimizer

from layer_tying.core import parts
from layer_tying.core.distributed import held_here
from layer_tying.core.mixtures import Mixtures, add_to_optimizers, refuse_schedulers
from layer_tying.core.optimizer_state import OptimizerState, listed
from layer_tying.core.residual_scale import check_named, factors
from layer_tying.core.tying import Rules, Tying, storage_sources
from layer_tying.core.weight_access import (
    read_as_they_are,
    read_detached,
    refuse_sharded,
    scale_output,
    store,
    tying_in_storage,
)
from layer_tying.errors import InputError, InvariantError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch

Parameters = dict[str, nn.Parameter]


class Options(TypedDict, total=False):
    """The options of ``TiedLayers``: those of ``TyingSettings`` that can be chosen."""

    layers: str | Sequence[str] | None
    untied: Sequence[str]
    by_kind: bool
    gradient: Literal["sum", "owner"]
    optimizer_state: Literal["copy", "fresh"]
    residual_scaling: float
    residual_outputs: Sequence[str]


class TiedLayers:
    """The layers of a model, with a tying that can be changed while it trains.

    Example::

        layers = TiedLayers(model, optimizer)
        layers.apply(Tying.from_labels("aaabbb"))  # two independent layers, used three times each

    Args:
        model: any module that holds its layers in one list of equal blocks. Where layers come tied
            already, the tying is read off them.
        optimizer: the optimizer of the model's parameters (or several, or none). Its
            ``param_groups`` and ``state`` are kept in step.
        options: ``layers``, ``untied``, ``by_kind``, ``gradient``, ``optimizer_state``,
            ``residual_scaling`` and ``residual_outputs``: see ``TyingSettings``. What is left out
            is as it was when these layers were last tied, if they were.

    Attributes:
        tying: the tying in force.
        settings: the options.
        rules: which tyings this model allows.
        stack: the layers, and where their parameters live.
        mixtures: the coefficients, where layers mix the shared weights.

    Raises:
        InputError: if the layers cannot be found, do not match, share parameters only in part, or
            are mixed or scaled by a tying of another module, such as one that this one wraps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        **options: Unpack[Options],
    ) -> None:
        parts.check_remembered(model)
        self.settings, self.stack = parts.settings_of_part(model, options)
        settings = self.settings
        check_named(self.stack, options.get("residual_outputs", ()))
        parts.check_residual_outputs(self.stack, settings)
        self.rules = Rules(self.stack.kinds, len(self.stack.kinds))
        self.tying = tying_in_storage(self.stack)
        self._states = [OptimizerState(each, model) for each in listed(optimizer)]
        self._remove_from_optimizers()
        self._add_to_optimizers()
        self.mixtures = self._mixtures() if settings.mixes else None
        read_as_they_are(parts.modules_of_no_other(self.stack, settings))
        self._set_weight_access()
        parts.remember_part(self.stack, settings)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are kept in step."""
        return [state.optimizer for state in self._states]

    def parameters(self, layer: int) -> Parameters:
        """The parameters that a layer uses, by their names within the layer."""
        used: Parameters = {}
        for name, (module, attribute) in self.stack.slots[layer].items():
            parameter = module._parameters[attribute]
            assert parameter is not None
            used[name] = parameter
        return used

    def apply(self, tying: Tying) -> None:
        """Change to another tying, as one transition from the weights in use now.

        A layer that becomes independent goes on from the weights it used: the model computes the
        same function, unless 1/n residual scaling has another n. A layer that is tied drops its own
        weights, gradient and optimizer state. What is dropped is freed before anything is copied,
        and nothing is copied that could be taken over: memory never rises above the larger of
        before and after.

        Call it between optimizer steps, with gradients cleared.

        Raises:
            InputError: if the tying does not fit the model; then nothing has changed.
            torch.OutOfMemoryError: if there is no room for a layer's own weights. Training can go
                on, with those tied that could not be untied.
        """
        self.rules.check(tying)
        if tying == self.tying:
            return
        if self.mixtures:
            raise InputError(
                f"the tying {self.tying} cannot change: the layers mix the shared weights"
            )
        refuse_sharded(self.stack.model)
        if tying_in_storage(self.stack) != self.tying:
            raise InputError(
                "the layers' weights were exchanged by something else since they were last tied: "
                "load_state_dict(assign=True), to_empty() and a second TiedLayers do that"
            )
        self._remove_from_optimizers()
        sources = storage_sources(self.tying, tying)
        old = {source: self.parameters(source) for source, _ in sources.values()}
        self.drop_optimizer_state(self._layers_that_lose_state(sources))
        for layer, owner in enumerate(tying.owners):
            self._point(layer, old[sources[owner][0]])
        try:
            for owner, (source, needs_copy) in sources.items():
                if needs_copy:
                    copies = self._copy(old[source])
                    for layer in tying.groups[owner]:
                        self._point(layer, copies)
        finally:  # where memory has run out, layers stay tied that were to be independent
            self.tying = tying_in_storage(self.stack)
            self._add_to_optimizers()
            self._set_weight_access()

    def mix(self) -> Mixtures:
        """Let the layers learn mixtures of the shared weights; their tying then stays as it is.

        The coefficients are added to the optimizer, if there is one (of several, to the first that
        holds vectors): without weight decay, and with a higher learning rate (see ``Mixtures``).
        Schedulers of learning rates are made later.

        Raises:
            InputError: if there are fewer than two independent layers, or the layers differ, the
                optimizer has a scheduler of learning rates already, or gradients are the owner's
                only.
        """
        if self.mixtures is None:
            refuse_sharded(self.stack.model)
            refuse_schedulers(self.optimizers)
            settings = self.settings.but(mixes=True)
            self.mixtures = self._mixtures()
            self.settings = settings
            self._set_weight_access()
            parts.remember_part(self.stack, settings)
        return self.mixtures

    def _mixtures(self) -> Mixtures:
        """New coefficients, or those of a model that mixes already, in one of the optimizers."""
        mixtures = Mixtures(self.stack, self.tying)
        if self.optimizers:
            add_to_optimizers(mixtures, self.optimizers)
        return mixtures

    def verify(self) -> None:
        """Check that state and storage agree.

        Raises:
            InvariantError: if storage is not what the tying says, or an optimizer has lost a
                parameter, or holds one twice, or one that no layer uses, or its state.
        """
        stored = tying_in_storage(self.stack)
        if stored != self.tying:
            raise InvariantError(f"the tying is {self.tying}, but the layers share as {stored}")
        owned = self._owned()
        held = {id(p): held_here(p) for p in owned.values()}
        addresses = {i: p.data_ptr() for i, p in held.items() if p.numel() and not p.is_meta}
        if len(set(addresses.values())) != len(addresses):
            raise InvariantError("two parameters of independent layers share memory")
        live = {id(p) for p in self.stack.model.parameters()}
        for state in self._states:
            state.verify(owned, live)

    def drop_optimizer_state(self, layers: Iterable[int]) -> None:
        """Forget the optimizer's state of the parameters that these layers use."""
        for state in self._states:
            for layer in layers:
                state.drop(self.parameters(layer).values())

    def _point(self, layer: int, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, slot in self.stack.slots[layer].items():
            store(slot, parameters[name])

    def _copy(self, parameters: Parameters) -> Parameters:
        """New parameters of equal values, one for each distinct one, with their state."""
        distinct = {id(parameter): parameter for parameter in parameters.values()}
        copies: dict[int, nn.Parameter] = {}
        try:
            for identity, parameter in distinct.items():
                copies[identity] = _copied(parameter)
                for state in self._states if self._copies_state() else ():
                    state.copy(parameter, copies[identity])
        except BaseException:  # no layer will use them
            for state in self._states:
                state.drop(copies.values())
            raise
        return {name: copies[id(parameter)] for name, parameter in parameters.items()}

    def _owned(self) -> Parameters:
        """The parameters of the independent layers, by their names in the model."""
        return {
            f"{self.stack.names[layer]}.{name}": parameter
            for layer in self.tying.independent_layers
            for name, parameter in self.parameters(layer).items()
        }

    def _remove_from_optimizers(self) -> None:
        for state in self._states:
            state.remove(self._owned())

    def _add_to_optimizers(self) -> None:
        names = self.stack.names
        in_first_of_kind = {
            f"{names[layer]}.{name}": f"{names[self.stack.kinds[layer]]}.{name}"
            for layer in self.tying.independent_layers
            for name in self.stack.slots[layer]
        }
        for state in self._states:
            state.add(self._owned(), in_first_of_kind)

    def _layers_that_lose_state(self, sources: Mapping[int, tuple[int, bool]]) -> set[int]:
        """The owners whose storage is dropped, or taken over by a layer without optimizer state."""
        keeping = {
            source
            for owner, (source, _) in sources.items()
            if self._copies_state() or owner == source
        }
        return set(self.tying.independent_layers) - keeping

    def _copies_state(self) -> bool:
        return self.settings.optimizer_state == "copy"

    def _set_weight_access(self) -> None:
        for layer, owner in enumerate(self.tying.owners):
            slots = self.stack.slots[layer].values()
            read_as_they_are(module for module, _ in slots)
            if self.settings.gradient == "owner" and layer != owner:
                read_detached(slots)
        if self.mixtures:
            self.mixtures.set_weight_access()
        if not self.settings.residual_scaling:
            return
        scales = factors(self.tying, self.settings.residual_scaling)
        found = parts.own_residual_modules(self.stack, self.settings)
        for modules, factor in zip(found, scales, strict=True):
            for module in modules:
                scale_output(module, factor)


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    """A new parameter of equal values; subclasses, such as quantised weights, know how."""
    if issubclass(type(parameter), nn.Parameter) and type(parameter) is not nn.Parameter:
        return copy.deepcopy(parameter)
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
