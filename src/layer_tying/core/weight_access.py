"""How a layer reads the weights that it shares: as they are, detached, mixed, gathered, or scaled.

A layer reads a weight by ``module.weight``. To change what it reads, the module's class is
exchanged for a subclass in which the weight is a property, as ``torch.nn.utils.parametrize`` does.
Unlike hooks that change weights while a layer runs, this leaves nothing to restore when a layer
raises, sees the recomputed forward pass of gradient checkpointing, and gives compiled layers one
graph for each way of reading, not one for each tying. ``module.parameters()`` and ``state_dict()``
go on showing the stored tensors; ``module._parameters[name]`` is the way to reach one.

A weight can be read in one of these ways (``READERS``), and what a module returns can be scaled:

- *detached*: a tied layer reads without gradient. Autograd saves nothing for the weight gradient
  and computes none, while the gradient of the activations flows on (gradient mode ``"owner"``,
  which is what the published code does: its tied copies are frozen).
- *mixed*: a layer reads a combination of several stored weights (see ``mixtures.py``).
- *gathered*: a sharded weight is gathered from all processes, and freed after use (see
  ``gather.py``); *gathered, detached* likewise, without gradient; *gathered, mixed* a mixture of
  sharded weights (see ``gather_mixed.py``).
- *scaled*: what a module returns is multiplied by a factor (1/n residual scaling), by a forward
  hook, since torch's ``TransformerEncoderLayer`` skips the forward of its parts in inference unless
  they have hooks. The factor is a tensor, so that compiled layers are not compiled again when it
  changes; the class is exchanged as well, because that is what compiled layers check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layer_tying.core.distributed import is_sharded
from layer_tying.core.find import MIXTURE, LayerStack, Slot, class_name, is_mixture
from layer_tying.core.gather import gather
from layer_tying.core.gather_mixed import gather_mixed
from layer_tying.core.mix import mix
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError

FACTOR = "_residual_factor"  # where a scaled module keeps its factor, a 0-dimensional tensor
SETS = "_mixture_sets"  # where a mixing module keeps, by attribute, the slots of the stored weights
_plain_class: dict[type[nn.Module], type[nn.Module]] = {}
# Modules whose output is linear in all of their parameters together: a factor fits into those.
LINEAR = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
LINEAR_BY_NAME = ("Conv1D",)  # of transformers, which is not imported here
# PEFT's layers return base_layer(x) + sum over adapters of lora_B(lora_A(x)); not so with DoRA.
LORA, DORA = {"base_layer", "lora_A", "lora_B"}, "lora_magnitude_vector"
Ways = tuple[tuple[str, str], ...]  # attribute -> way of reading, for those not read as they are


def read_as_they_are(modules: Iterable[nn.Module]) -> None:
    """Let modules read their weights, and return their outputs, as their own classes do."""
    for module in modules:
        gathered = tuple((attribute, GATHERED) for attribute in _gathered_by(module))
        module.__class__ = _plain_class.get(type(module), type(module))
        module.__dict__.pop(SETS, None)
        is_scaled = module.__dict__.pop(FACTOR, None) is not None
        if gathered:
            _exchange(module, gathered)
        if is_scaled:
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if hook is _scaled]:
                del hooks[key]


def drop_mixtures(model: nn.Module) -> None:
    """Let a model read its weights as they are, and drop the coefficients."""
    read_as_they_are(model.modules())
    for module in model.modules():
        held = module._parameters
        for name in [name for name in held if is_mixture(name, held)]:
            del held[name]


def read_detached(slots: Iterable[Slot]) -> None:
    """Let modules read these of their weights without gradient."""
    for module, attribute in slots:
        is_gathered = attribute in _gathered_by(module)
        _read(module, attribute, GATHERED_DETACHED if is_gathered else "detached")


def read_gathered(module: nn.Module, attribute: str) -> None:
    """Let a module gather this weight, which is a DTensor, where it reads it; for good."""
    _read(module, attribute, GATHERED)


def refuse_sharded(model: nn.Module) -> None:
    """Raise an InputError if weights are sharded that no layer gathers: FSDP2 does that."""
    for module in model.modules():
        gathered = _gathered_by(module)
        for name, weight in module._parameters.items():
            is_ours = name in gathered or is_mixture(name, module._parameters)
            if weight is not None and not is_ours and is_sharded(weight):
                raise InputError(
                    "the model is sharded by FSDP, which settles which layers share weights: its "
                    "tying cannot change any more. Shard it with layer_tying.shard_tied_layers, or "
                    "tie the layers first, keep that tying, and shard last"
                )


def read_mixed(module: nn.Module, attribute: str, sets: Sequence[Slot]) -> None:
    """Let a module read the mixture of the weights in M slots, by its own coefficients.

    The coefficients are its parameter ``{attribute}_mixture``, [M].
    """
    module.__dict__.setdefault(SETS, {})[attribute] = tuple(sets)
    is_gathered = attribute in _gathered_by(module)
    _read(module, attribute, GATHERED_MIXED if is_gathered else "mixed")


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply what a module returns (of a tuple, its first element) by a factor."""
    if FACTOR not in module.__dict__:
        module.register_forward_hook(_scaled, prepend=True)
        module.__dict__[FACTOR] = torch.tensor(factor, device="cpu")
        _exchange(module, _ways(module))
    module.__dict__[FACTOR] = torch.tensor(factor, device="cpu")


def _scaled(module: nn.Module, _: Any, output: Any) -> Any:
    factor = module.__dict__[FACTOR]
    if isinstance(output, tuple):
        return output[0] * factor, *output[1:]
    return output * factor


def stored(slot: Slot) -> nn.Parameter:
    """The parameter that a slot holds, however it is read."""
    module, attribute = slot
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def store(slot: Slot, parameter: nn.Parameter) -> None:
    """Put a parameter into a slot, without reading what is there."""
    module, attribute = slot
    if attribute in _gathered_by(module):
        module._parameters[attribute] = parameter  # torch would read it first, and thus gather it
    else:
        setattr(module, attribute, parameter)  # recurrent networks take note of it


def tying_in_use(stack: LayerStack) -> Tying:
    """The tying that the identities of the layers' parameters show."""
    return Tying.from_labels(
        [tuple(id(stored(slot)) for slot in slots.values()) for slots in stack.slots]
    )


def tying_in_storage(stack: LayerStack) -> Tying:
    """Likewise, of layers that share all of their parameters or none.

    Raises:
        InputError: if layers share some of their parameters and not all.
    """
    tying = tying_in_use(stack)
    seen: dict[int, int] = {}
    for layer in tying.independent_layers:
        for identity in {id(stored(slot)) for slot in stack.slots[layer].values()}:
            if identity in seen:
                one, other = stack.names[seen[identity]], stack.names[layer]
                raise InputError(
                    f"{one} and {other} share some of their parameters but not all: "
                    f"tie or untie them whole, or name what is shared in untied=..."
                )
            seen[identity] = layer
    return tying


def weights_as_read(stack: LayerStack) -> Iterator[tuple[str, Tensor]]:
    """What each layer computes with, by names in the model: mixed, and multiplied by the factor.

    Weights that a layer does not share are among them, since what they write can be scaled as well.
    One weight at a time is made, or gathered, by all processes where it is sharded.

    Raises:
        InputError: before the first, if what is scaled is more than one linear map, so that weights
            cannot show it.
    """
    factors = [
        _factors(layer, block) for layer, block in zip(stack.names, stack.blocks, strict=True)
    ]
    for layer, block, by_name in zip(stack.names, stack.blocks, factors, strict=True):
        for path, module in block.named_modules(prefix=layer, remove_duplicate=False):
            for attribute, parameter in module._parameters.items():
                if parameter is not None and not is_mixture(attribute, module._parameters):
                    name = f"{path}.{attribute}"
                    weight = getattr(module, attribute).detach()
                    yield name, weight * by_name[name] if name in by_name else weight


def mixed_or_scaled(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, that compute with something else than what they store."""
    return {name: m for name, m in model.named_modules() if m.__dict__.keys() & {SETS, FACTOR}}


def _factors(layer: str, block: nn.Module) -> dict[str, Any]:
    """What multiplies the weights of a layer, by their names in the model."""
    factors: dict[str, Any] = {}
    for path, module in block.named_modules(prefix=layer, remove_duplicate=False):
        factor = module.__dict__.get(FACTOR)
        if factor is None:
            continue
        for name, linear in _last_maps(path, module):
            factors |= {f"{name}.{attribute}": factor for attribute in linear._parameters}
    return factors


def _last_maps(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear maps, by name, that multiply a module's output by what their weights are."""
    parts = dict(module.named_children())
    if isinstance(module, nn.MultiheadAttention):
        return [(f"{path}.out_proj", module.out_proj)]
    if parts.keys() >= LORA and not any(True for _ in parts.get(DORA, nn.Module()).children()):
        adapters = parts["lora_B"].named_children()
        added = [(f"{path}.lora_B.{name}", adapter) for name, adapter in adapters]
        return [*_last_maps(f"{path}.base_layer", parts["base_layer"]), *added]
    if parts or not _is_linear(module):
        raise InputError(
            f"the scale of {path} cannot be put into its weights, as a {class_name(module)} "
            f"is not known to be one linear map: name linear maps in residual_outputs"
        )
    return [(path, module)]


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes as one of the known linear maps does, and no subclass changed how."""
    computes = type(module).forward
    return class_name(module) in LINEAR_BY_NAME or computes in {each.forward for each in LINEAR}


def _detached(module: nn.Module, attribute: str) -> Tensor:
    return stored((module, attribute)).detach()


def _mixed(module: nn.Module, attribute: str) -> Tensor:
    coefficients = stored((module, f"{attribute}{MIXTURE}"))
    return mix(coefficients, *(stored(slot) for slot in module.__dict__[SETS][attribute]))


def _gathered(module: nn.Module, attribute: str) -> Tensor:
    return gather(stored((module, attribute)), module)


def _gathered_detached(module: nn.Module, attribute: str) -> Tensor:
    return gather(stored((module, attribute)).detach(), module)


def _gathered_mixed(module: nn.Module, attribute: str) -> Tensor:
    coefficients = stored((module, f"{attribute}{MIXTURE}"))
    sets = (stored(slot) for slot in module.__dict__[SETS][attribute])
    return gather_mixed(module, coefficients, *sets)


GATHERED, GATHERED_DETACHED = "gathered", "gathered, detached"
GATHERED_MIXED = "gathered, mixed"
READERS: dict[str, Callable[[nn.Module, str], Tensor]] = {
    "detached": _detached,
    "mixed": _mixed,
    GATHERED: _gathered,
    GATHERED_DETACHED: _gathered_detached,
    GATHERED_MIXED: _gathered_mixed,
}


def _read(module: nn.Module, attribute: str, way: str) -> None:
    _exchange(module, tuple(sorted({**dict(_ways(module)), attribute: way}.items())))


def _gathered_by(module: nn.Module) -> list[str]:
    """The attributes that a module gathers."""
    return [name for name, way in _ways(module) if way.startswith(GATHERED)]


def _ways(module: nn.Module) -> Ways:
    return getattr(type(module), "_ways", ()) if type(module) in _plain_class else ()


def _exchange(module: nn.Module, ways: Ways) -> None:
    plain = _plain_class.get(type(module), type(module))
    module.__class__ = _reading(plain, ways, FACTOR in module.__dict__)


@cache
def _reading(plain: type[nn.Module], ways: Ways, is_scaled: bool) -> type[nn.Module]:
    """One subclass for all modules that read alike, so that they share compiled code."""

    def reduced(self: nn.Module, protocol: Any) -> tuple[object, ...]:
        _, _, *state = plain.__reduce_ex__(self, protocol)
        return _blank, (plain, ways, is_scaled), *state

    body: dict[str, object] = {name: _property(name, READERS[way]) for name, way in ways}
    body["_ways"] = ways
    body["__reduce_ex__"] = reduced  # by name, pickle would take the class for the plain one
    derived = type(plain.__name__, (plain,), {"__module__": plain.__module__, **body})
    derived.__qualname__ = plain.__qualname__
    _plain_class[derived] = plain
    return derived


def _blank(plain: type[nn.Module], ways: Ways, is_scaled: bool) -> nn.Module:
    """A module as pickle and copy create it, before they restore its state."""
    derived = _reading(plain, ways, is_scaled)
    return derived.__new__(derived)


def _property(name: str, read: Callable[[nn.Module, str], Tensor]) -> property:
    return property(lambda module: read(module, name))
