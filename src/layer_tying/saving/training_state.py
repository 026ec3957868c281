"""What training needs to go on besides weights: the optimizer's state by name, random numbers.

Files hold such states as trees of JSON-able values, whose tensors are put aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layer_tying.core.distributed import is_sharded
from layer_tying.core.gather import sharded_as
from layer_tying.errors import InputError

SCALARS = (type(None), bool, int, float, str)  # what JSON holds as it is


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state with parameters' names for keys."""
    return {
        name: dict(optimizer.state[p])
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_optimizer_state_by_name(
    model: nn.Module, optimizer: Optimizer, states: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give each named parameter the optimizer state that ``optimizer_state_by_name`` saved."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, state in states.items():
        parameter = parameters[name]
        group = groups[parameter]
        optimizer.state[parameter] = {
            key: at_home(key, _like(value, parameter), parameter, group)
            for key, value in state.items()
        }


def at_home(key: str, value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """A value of the optimizer's state on its parameter's device.

    Counts of steps stay on the CPU, unless the parameter's group is of an optimizer that reads them
    on the device.
    """
    is_counted_here = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value if is_counted_here or not isinstance(value, Tensor) else value.to(parameter.device)


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Rows of a value that is whole, where the parameter holds rows."""
    is_whole = isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape
    return sharded_as(value, parameter) if is_whole and is_sharded(parameter) else value


def rng_state() -> dict[str, Any]:
    """The state of torch's global random numbers, on the CPU and on this process's GPU."""
    gpu = _gpu()
    on_gpu = {gpu: torch.get_device_module(gpu).get_rng_state()} if gpu else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers that ``rng_state`` saw, on a GPU of the same kind as well."""
    torch.set_rng_state(state["cpu"])
    gpu = _gpu()
    if gpu and state.get(gpu) is not None:
        torch.get_device_module(gpu).set_rng_state(state[gpu])


def _gpu() -> str | None:
    """The kind of GPU there is: cuda, mps, ..."""
    device = torch.accelerator.current_accelerator()
    return device.type if device and torch.accelerator.is_available() else None


def split_tree(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The tree as JSON-able values, its tensors put aside under their paths.

    Dictionaries become lists of pairs, since an optimizer's keys are integers.

    Raises:
        InputError: if it holds something else, such as an object of an optimizer.
    """
    if isinstance(tree, Tensor):
        while path in tensors:  # of the keys "a/b", and "a" with "b" in it
            path += "'"
        tensors[path] = tree.detach().contiguous()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {"pairs": [[k, split_tree(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [split_tree(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]}
    if isinstance(tree, SCALARS):
        return {"value": tree}
    raise InputError(
        f"cannot save {path.lstrip('/')} of type {type(tree).__name__}: a checkpoint holds "
        f"tensors, numbers and texts, in lists and dictionaries"
    )


def copied_where_shared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those copied that share memory with an earlier one: safetensors refuses them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return found


def join_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that ``split_tree`` took apart."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: join_tree(value, tensors) for key, value in content}
    if kind == "list":
        return [join_tree(value, tensors) for value in content]
    return content
