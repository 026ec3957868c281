"""Keeping an optimizer in step with parameters that come and go.

torch's optimizers hold parameters in ``param_groups`` and their state in ``state``, and keep both
until told otherwise: a parameter that is swapped out of a model stays in memory with its state and
would still be updated. An ``OptimizerState`` removes the layers' parameters from the groups before
a transition and adds those that are live after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layer_tying.errors import InvariantError

Group = dict[str, Any]  # one of an optimizer's param_groups
# By optimizer and model: the index of the group that each name's parameter is in, or was in last.
_groups_of: WeakKeyDictionary[Optimizer, WeakKeyDictionary[nn.Module, dict[str, int]]]
_groups_of = WeakKeyDictionary()


class OptimizerState:
    """The layers' entries in one optimizer.

    A name's group is remembered while its layer is tied, so that a parameter which comes back is
    treated as it was before: decayed or not, its learning rate. It is remembered for as long as the
    model and the optimizer exist, whoever ties the layers next.

    Args:
        optimizer: it is kept in step.
        model: whose layers they are. The optimizer may hold parameters of others as well.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._model = model
        of_models = _groups_of.setdefault(optimizer, WeakKeyDictionary())
        self._remembered = of_models.setdefault(model, {})
        self._group_of: dict[str, int | None] = {**self._remembered}
        self._before: dict[int, int] = {}  # of a group: how many of others precede the model's
        self._removed: dict[int, ref[nn.Parameter]] = {}  # by id: what was once the model's

    def remove(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note each name's group and remove the parameters from the groups; their state stays."""
        groups = self.optimizer.param_groups
        ours = {id(p) for p in self._model.parameters()}
        for index, group in enumerate(groups):
            is_ours = [id(p) in ours for p in group["params"]]
            if any(is_ours):
                self._before[index] = is_ours.index(True)
        alive = {key: each for key, each in self._removed.items() if each() is not None}
        self._removed = alive | {id(p): ref(p) for p in parameters.values()}
        index_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        found = {name: index_of.get(id(parameter)) for name, parameter in parameters.items()}
        self._group_of |= found
        self._remembered |= {name: index for name, index in found.items() if index is not None}
        remove_from(self.optimizer, parameters.values())

    def add(self, parameters: Mapping[str, nn.Parameter], fallback: Mapping[str, str]) -> None:
        """Add the parameters to the groups their names had.

        An optimizer's state dict names parameters by their place. So the order is the model's,
        whatever was changed last: that of an optimizer which is made of the tied model.

        Args:
            parameters: the live parameters of the independent layers, by their names in the model.
            fallback: for each name another one, whose group it takes if it was never seen.
        """
        entered: set[int] = set()
        for name, parameter in parameters.items():
            known = self._group_of.setdefault(name, self._group_of.get(fallback[name]))
            if known is not None and id(parameter) not in entered:
                group = self.optimizer.param_groups[known]
                for key, value in zip(_columns(group), (parameter, name), strict=False):
                    group[key].append(value)
                entered.add(id(parameter))
        self._sort()

    def _sort(self) -> None:
        """Put the model's parameters into its order within their groups, where they were."""
        place = {id(p): number for number, p in enumerate(self._model.parameters())}
        for index, group in enumerate(self.optimizer.param_groups):
            places = [place.get(id(p), -1) for p in group["params"]]
            others = [number for number, each in enumerate(places) if each < 0]
            ours = sorted(set(range(len(places))) - {*others}, key=places.__getitem__)
            before = self._before.get(index, 0)
            order = [*others[:before], *ours, *others[before:]]
            for key in _columns(group):
                group[key][:] = [group[key][number] for number in order]

    def verify(self, parameters: Mapping[str, nn.Parameter], live: set[int]) -> None:
        """Check that the optimizer holds what the model uses.

        Args:
            parameters: those of the independent layers, by name.
            live: the ids of all parameters of the model.

        Raises:
            InvariantError: if it holds a parameter twice, one that no layer uses or the state of
                one, or has lost one.
        """
        groups = self.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        if sum(len(group["params"]) for group in groups) != len(held):
            raise InvariantError("the optimizer holds a parameter twice")
        ours = {key for key, each in self._removed.items() if each() is not None}
        if not held & ours <= live:
            raise InvariantError("the optimizer holds a parameter that no layer uses")
        if not {id(p) for p in self.optimizer.state} <= held:
            raise InvariantError("the optimizer keeps the state of a parameter that it dropped")
        for name, parameter in parameters.items():
            if self._group_of.get(name) is not None and id(parameter) not in held:
                raise InvariantError(f"the optimizer has lost {name}")

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the optimizer's state of these parameters."""
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def copy(self, source: nn.Parameter, target: nn.Parameter) -> None:
        """Give ``target`` a copy of the optimizer's state of ``source``, if it has any."""
        if source in self.optimizer.state:
            self.optimizer.state[target] = _cloned(self.optimizer.state[source])


def listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> Sequence[Optimizer]:
    """What is given as one optimizer, several, or none."""
    return [optimizer] if isinstance(optimizer, Optimizer) else optimizer or ()


def remove_from(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer's groups; their state stays."""
    taken = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        stays = [id(p) not in taken for p in group["params"]]
        for key in _columns(group):
            group[key][:] = compress(group[key], stays)


def order_in(optimizers: Iterable[Optimizer]) -> list[tuple[Group, Group]]:
    """The groups of optimizers, and what they hold now in its order, for ``restore_order``."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [(group, {key: [*group[key]] for key in _columns(group)}) for group in groups]


def restore_order(order: Iterable[tuple[Group, Group]]) -> None:
    """Put parameters into the order they had, in the groups that hold the same ones.

    An optimizer's state dict names parameters by their place, so that one saved earlier fits again.
    """
    for group, before in order:
        if {id(p) for p in group["params"]} == {id(p) for p in before["params"]}:
            for key, values in before.items():
                group[key][:] = values


def _columns(group: Mapping[str, object]) -> list[str]:
    """What a group has one of for each parameter: itself and, in some optimizers, its name."""
    return [key for key in ("params", "param_names") if key in group]


def _cloned(state: object) -> object:
    if is_traceable_wrapper_subclass(state):  # quantised state, which need not know clone()
        names, context = state.__tensor_flatten__()
        parts = {name: _cloned(getattr(state, name)) for name in names}
        return type(state).__tensor_unflatten__(parts, context, state.size(), state.stride())  # type: ignore[arg-type]
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _cloned(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_cloned(value) for value in state]
    return copy.deepcopy(state)
