"""Keeping an optimizer in step with parameters that come and go.

torch's optimizers hold parameters in ``param_groups`` and their moments in ``state``, and keep both
until told otherwise: a parameter that is swapped out of a model stays in memory with its moments
and would go on being "updated". A ``Ledger`` takes the layers' parameters out of the books before
a transition and enters those that are live after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

Name = tuple[int, str]  # (layer, name of the parameter within the layer)


class Ledger:
    """The layers' entries in one optimizer.

    A name's group is remembered while its layer is tied, so that a parameter which comes back is
    treated as it was before: decayed or not, its learning rate.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._group_of: dict[Name, int | None] = {}

    def take_out(self, parameters: Mapping[Name, nn.Parameter]) -> None:
        """Note each name's group and remove the parameters from the groups; moments stay."""
        groups = self.optimizer.param_groups
        index_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        for name, parameter in parameters.items():
            self._group_of[name] = index_of.get(id(parameter))
        taken = {id(p) for p in parameters.values()}
        for group in groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in taken]

    def enter(self, parameters: Mapping[Name, nn.Parameter], fallback: Mapping[int, int]) -> None:
        """Add the parameters to the groups their names had, in the order given.

        An optimizer's state dict names parameters by their place, so the order must depend on the
        tying alone: the process that loads builds the same one.

        Args:
            parameters: the live parameters of the independent layers.
            fallback: for each layer another one, whose groups it takes for names never seen.
        """
        entered: set[int] = set()
        for (layer, name), parameter in parameters.items():
            known = self._group_of.get((layer, name), self._group_of.get((fallback[layer], name)))
            if known is not None and id(parameter) not in entered:
                self.optimizer.param_groups[known]["params"].append(parameter)
                entered.add(id(parameter))

    def drop_moments(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the optimizer's state of these parameters."""
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def copy_moments(self, source: nn.Parameter, target: nn.Parameter) -> None:
        """Give ``target`` a copy of the optimizer's state of ``source``, if it has any."""
        if source in self.optimizer.state:
            self.optimizer.state[target] = _cloned(self.optimizer.state[source])


def _cloned(state: object) -> object:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _cloned(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_cloned(value) for value in state]
    return state
