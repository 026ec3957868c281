"""Hard limits on a model's size, as the number of layers that may be independent.

A limit holds at every moment of a run if it holds for the worst tying of so many independent
layers, so sizes are computed for that one: the largest layers independent, the longest names. The
size of a compact export is a bound, at most some hundred bytes a tensor above the real file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layer_tying.core.find import MIXTURE, LayerStack
from layer_tying.core.tying_settings import settings_of
from layer_tying.errors import InputError

SCALE = "_int8_scale"  # what ``saving/int8.py`` calls the scales of a matrix
ENTRY = '"{}":{{"dtype":"BF16","shape":{},"data_offsets":[{},{}]}},'  # of a tensor, in the header
DIGITS = 10  # of a number of rows
SETTINGS = 500  # what the settings of a tying may grow by: patterns of names
OWNER = 6  # of a layer, in these settings
FRAME = 100  # of a file: the header's length, its braces, the metadata's key, padding


def max_independent(
    stack: LayerStack,
    *,
    num_layers: int | None = None,
    num_parameters: int | None = None,
    num_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    mixes: bool = False,
) -> int:
    """The most independent layers with which a model stays within limits, whatever its tying.

    Args:
        stack: the model's layers (``TiedLayers(model).stack``), tied or not, on any device.
        num_layers: a limit on the independent layers themselves.
        num_parameters: a limit on the distinct parameters of the whole model.
        num_bytes: a limit on the file that ``export_compact`` writes.
        dtype: the type in which it stores the weights; the model's own by default.
        mixes: whether the layers will read mixtures, whose coefficients count as well.

    Raises:
        InputError: if a limit is below what the model has with one layer of each kind, or, of its
            size and where layers mix, with two.
    """
    num_kinds = len(set(stack.kinds))
    found = [len(stack.kinds)]
    if num_layers is not None:
        if num_layers < num_kinds:
            raise _too_small(num_layers, "independent layers", num_kinds, num_kinds)
        found.append(num_layers)
    sizes = (
        (num_parameters, "parameters", _numbers_of_parameters(stack, mixes)),
        (num_bytes, "bytes", _numbers_of_bytes(stack, dtype, mixes)),
    )
    least = min(max(num_kinds, 2 if mixes else 1), len(stack.kinds))
    for limit, unit, size_with in sizes:
        if limit is not None:
            if size_with[least] > limit:
                raise _too_small(limit, unit, size_with[least], num_kinds, mixes)
            found.append(max(n for n, size in size_with.items() if size <= limit))
    return min(found)


def _too_small(
    limit: int, unit: str, needed: int, num_kinds: int, mixes: bool = False
) -> InputError:
    if num_kinds > 1:
        layers = f"{num_kinds} kinds of layer"
    else:
        layers = "two layers to mix (tied ones need one)" if mixes else "one independent layer"
    return InputError(
        f"a budget of {limit:,} {unit} is too small: with {layers}, the least that is possible, "
        f"this model needs {needed:,}"
    )


def _numbers_of_parameters(stack: LayerStack, mixes: bool) -> dict[int, int]:
    """For each number of independent layers, the parameters of the largest tying of so many."""
    sizes = _sizes(stack, {p: p.numel() for p in stack.model.parameters()})
    vectors = len(_mixing(stack)) if mixes else 0
    return {n: size + n * vectors for n, size in sizes.items()}


def _numbers_of_bytes(stack: LayerStack, dtype: torch.dtype | None, mixes: bool) -> dict[int, int]:
    """For each number of independent layers, a bound on the bytes of its compact export."""
    state = stack.model.state_dict(keep_vars=True)
    sizes = {tensor: _stored_bytes(tensor, dtype) for tensor in state.values()}
    vectors = _mixing(stack) if mixes else {}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    shapes |= {f"{name}{MIXTURE}": [len(stack.names)] for name in vectors}
    if dtype == torch.int8:  # the scales of what is stored have entries of their own
        entry = len(ENTRY.format(max(state, key=len) + SCALE, [], *[sum(sizes.values())] * 2))
        sizes = {t: size + has_rows(t.shape) * (entry + DIGITS) for t, size in sizes.items()}
    header = _header_bytes(shapes, sum(sizes.values())) + _settings_bytes(stack)
    of_one = sum(_stored_bytes(matrix.flatten()[:1], dtype) for matrix in vectors.values())
    return {n: size + n * of_one + header for n, size in _sizes(stack, sizes).items()}


def _mixing(stack: LayerStack) -> dict[str, Tensor]:
    """The matrices of all layers, by names in the model; each would have coefficients."""
    return {
        f"{layer}.{name}": parameter
        for layer, slots in zip(stack.names, stack.slots, strict=True)
        for name, (module, attribute) in slots.items()
        if (parameter := module._parameters[attribute]) is not None and parameter.ndim > 1
    }


def _sizes(stack: LayerStack, sizes: Mapping[Tensor, int]) -> dict[int, int]:
    """For each number of independent layers, the summed sizes of the largest tying of so many."""
    layers = [
        {p for module, name in slots.values() if (p := module._parameters[name]) is not None}
        for slots in stack.slots
    ]
    of_layer = [sum(sizes[p] for p in layer) for layer in layers]
    shared = set().union(*layers)
    rest = sum(size for tensor, size in sizes.items() if tensor not in shared)
    kinds = set(stack.kinds)
    least = rest + sum(of_layer[kind] for kind in kinds)
    others = sorted((size for i, size in enumerate(of_layer) if i not in kinds), reverse=True)
    return {len(kinds) + n: least + sum(others[:n]) for n in range(len(others) + 1)}


def _stored_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """What ``export_compact`` stores of a tensor."""
    if not dtype or not tensor.is_floating_point():
        return tensor.nbytes
    if dtype == torch.int8:  # and a scale for each row
        return tensor.numel() + 4 * len(tensor) if has_rows(tensor.shape) else tensor.nbytes
    return tensor.numel() * dtype.itemsize


def has_rows(shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix to ``int8`` exports: rows of more than one number."""
    return math.prod(shape[1:]) > 1


def _header_bytes(shapes: Mapping[str, list[int]], data_bytes: int) -> int:
    """Each name is that of a stored tensor, or in the map: the longer of the two is counted."""
    longest = max(shapes, key=len)
    total = FRAME
    for name, shape in shapes.items():
        stored = ENTRY.format(name, shape, data_bytes, data_bytes)
        mapped = json.dumps(f'"{name}": "{longest}", ')
        total += max(len(stored), len(mapped))
    return total


def _settings_bytes(stack: LayerStack) -> int:
    settings = settings_of(stack.model)
    owners = OWNER * len(stack.blocks) * (1 + len(settings.others))
    return len(json.dumps(settings.to_json())) + owners + SETTINGS
