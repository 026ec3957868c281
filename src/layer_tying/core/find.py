"""Finding the layers of a model: the one list of equal blocks that a transformer is made of."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layer_tying.errors import InputError

MIXTURE = "_mixture"  # ends the names of coefficients (see mixtures.py): each layer has its own
COMPILED = "._orig_mod"  # in the names of what torch.compile(module) has wrapped
Slot = tuple[nn.Module, str]  # the module that holds a parameter, and the attribute's name


def is_mixture(name: str, names: Container[str]) -> bool:
    """Whether a name is that of the coefficients of another one among all names."""
    return name.endswith(MIXTURE) and name.removesuffix(MIXTURE) in names


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model, and where each keeps the parameters that can be shared.

    Attributes:
        model: the whole model.
        names: the dotted name of each layer.
        blocks: the layers themselves.
        slots: for each layer, where its parameters live, by their names within the layer.
        kinds: for each layer the first one that is like it (all zeros in most models).
    """

    model: nn.Module
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    slots: tuple[dict[str, Slot], ...]
    kinds: tuple[int, ...]


class Traits(NamedTuple):
    """What two layers must have in common to share weights."""

    block_class: str
    parameters: dict[str, str]  # name -> shape, type, device and whether it trains
    settings: dict[str, object]  # the switches that make equal shapes compute different things


def find_layers(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    untied: Sequence[str] = (),
    by_kind: bool = False,
) -> LayerStack:
    """Find the list of layers in a model and check that they can share weights.

    The lists of a model are its outermost ones of two or more modules of one class. Where several
    hold equal blocks one must be named; where there is only one list, it is taken.

    Args:
        model: any module.
        layers: the dotted name of a ``ModuleList`` or ``Sequential``, or several; None to search.
        untied: patterns of names, within a layer, that are neither shared nor compared.
        by_kind: group layers that differ into kinds instead of refusing them.

    Raises:
        InputError: if there is no such list or more than one, if layers differ, also in what the
            rest of the model uses of them, if a pattern of what is untied matches nothing, or if
            the model is wrapped for many processes in a way that does not notice parameters that
            are exchanged.
    """
    _refuse_wrapped(model)
    containers = _named(model, layers) if layers else [_search(model, untied)]
    names, blocks = [], []
    for container in containers:
        for child in model.get_submodule(container)._modules:
            name = f"{container}.{child}"
            if class_name(model.get_submodule(name)) == "OptimizedModule":  # by torch.compile
                name += COMPILED
            names.append(name)
            blocks.append(model.get_submodule(name))
    if len(blocks) < 2:
        raise InputError(f"{', '.join(containers)} holds {len(blocks)} layer(s): nothing to tie")
    _refuse_repeats(names, blocks)
    _check_untied(names, blocks, untied)
    kinds = _kinds(names, [_traits(block, untied) for block in blocks], by_kind)
    outside = _parameters_outside(model, blocks)
    slots = tuple(_slots(block, untied, outside) for block in blocks)
    if not slots[0]:
        raise InputError(f"the layers {names[0]}, ... have no parameters to share")
    _check_alike(names, slots, kinds)
    return LayerStack(model, tuple(names), tuple(blocks), slots, kinds)


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise InputError(
            "the model is wrapped in DistributedDataParallel, which never syncs parameters made "
            "later: make DynamicTying with the bare model first, then wrap it (accelerator.prepare "
            "wraps too)"
        )
    if any(class_name(module) == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(
            "the model is wrapped in FullyShardedDataParallel, which keeps its own handles to the "
            "weights and would not notice that they are exchanged: shard it with "
            "layer_tying.shard_tied_layers instead"
        )


def _named(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        try:
            container = model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"the model has no module {name!r}; its lists of blocks are: {_listing(model)}"
            ) from None
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            raise InputError(
                f"{name!r} is a {type(container).__name__}, not a ModuleList or Sequential; "
                f"the model's lists of blocks are: {_listing(model)}"
            )
    return names


def _search(model: nn.Module, untied: Sequence[str]) -> str:
    lists = dict(_lists(model))
    equal = [name for name, blocks in lists.items() if _alike(blocks, untied)]
    candidates = equal or list(lists)
    if len(candidates) == 1:
        _refuse_a_larger_one(candidates[0], lists, untied)
        return candidates[0]  # if its blocks differ, the caller says in what
    if not lists and isinstance(model, (nn.ModuleList, nn.Sequential)):
        raise InputError(
            f"the model is itself a {type(model).__name__}: hold the list of its layers in a "
            f"module, so that the list has a name"
        )
    problem = "more than one list" if equal else "no list"
    raise InputError(
        f"{problem} of equal blocks in {type(model).__name__}; name one with layers=... "
        f"(in compress, stack=...): {_listing(model)}"
    )


def _refuse_a_larger_one(
    chosen: str, lists: dict[str, list[nn.Module]], untied: Sequence[str]
) -> None:
    """A list that holds more parameters is more likely meant, even if its blocks differ."""
    sizes = {name: sum(p.numel() for b in lists[name] for p in b.parameters()) for name in lists}
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > sizes[chosen]:
        first, *others = (_traits(block, untied) for block in lists[largest])
        odd = next(number for number, each in enumerate(others, 1) if each != first)
        raise InputError(
            f"the blocks of {chosen} are equal, but {largest} is larger, and its blocks 0 and "
            f"{odd} differ: {_difference(first, others[odd - 1])}; name one list with layers=... "
            f"(in compress, stack=...)"
        )


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost lists of two or more modules of one class that have parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        blocks = list(module)
        is_one_class = len(blocks) > 1 and len({class_name(block) for block in blocks}) == 1
        if is_one_class and all(any(True for _ in block.parameters()) for block in blocks):
            found.append(name)
            yield name, blocks


def _alike(blocks: Sequence[nn.Module], untied: Sequence[str]) -> bool:
    first = _traits(blocks[0], untied)
    return all(_traits(block, untied) == first for block in blocks[1:])


def _listing(model: nn.Module) -> str:
    found = [
        f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in _lists(model)
    ]
    return ", ".join(found) or "none"


def class_name(block: nn.Module) -> str:
    """By name: a class that torch or we derive from a block's to wrap it is still that class."""
    return type(block).__qualname__


def _refuse_repeats(names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
    """Sharing a module shares its buffers, hooks and place in the KV cache, and is not undone."""
    first: dict[nn.Module, str] = {}
    for name, block in zip(names, blocks, strict=True):
        if block in first:
            raise InputError(
                f"{first[block]} and {name} are one and the same module: give each layer a module "
                f"of its own (copy.deepcopy) and leave it to this library to share the weights"
            )
        first[block] = name


def _kinds(names: Sequence[str], traits: Sequence[Traits], by_kind: bool) -> tuple[int, ...]:
    """For each layer the first one that is like it."""
    kinds = tuple(traits.index(one) for one in traits)
    num_kinds = len(set(kinds))
    if num_kinds == 1 or (by_kind and num_kinds < len(kinds)):
        return kinds
    other = next(i for i, kind in enumerate(kinds) if kind)
    remedy = "" if by_kind else ", or tie only the layers that are alike with by_kind=True"
    raise InputError(
        f"{names[0]} and {names[other]} cannot share weights: "
        f"{_difference(traits[0], traits[other])}; leave parameters out with untied=...{remedy}"
    )


def _is_untied(name: str, untied: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in untied)


def _check_untied(names: Sequence[str], blocks: Sequence[nn.Module], untied: Sequence[str]) -> None:
    """A pattern that matches nothing is a slip of the pen: what it was for would be shared."""
    if not untied:
        return
    traits = [_traits(block, ()) for block in blocks]
    known = [name for each in traits for name in (*each.parameters, *each.settings)]
    for pattern in untied:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(
                f"untied {pattern!r} is the name of nothing in {names[0]} or the other layers; "
                f"their parameters are {', '.join(traits[0].parameters)}"
            )


def _traits(block: nn.Module, untied: Sequence[str]) -> Traits:
    parameters = {
        name: f"{tuple(p.shape)} {p.dtype} on {p.device}{'' if p.requires_grad else ', frozen'}"
        for name, p in block.named_parameters(remove_duplicate=False)
        if not _is_untied(name, untied)
    }
    settings = {}
    for prefix, module in block.named_modules():
        for attribute, value in vars(module).items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            is_switch = value is None or isinstance(value, (bool, str))
            is_state = attribute.startswith("_") or attribute == "training"
            if is_switch and not is_state and not _is_untied(name, untied):
                settings[name] = value
    return Traits(class_name(block), parameters, settings)


def _difference(one: Traits, other: Traits) -> str:
    if one.block_class != other.block_class:
        return f"one is a {one.block_class}, the other a {other.block_class}"
    for ours, theirs in ((one.parameters, other.parameters), (one.settings, other.settings)):
        for name in [*ours, *theirs]:
            this, that = ours.get(name, "absent"), theirs.get(name, "absent")
            if this != that:
                return f"{name} is {this} in one and {that} in the other"
    raise AssertionError("the traits are equal")


def _parameters_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Parameters that the rest of the model also uses: those stay as they are."""
    rest = _modules_outside(model, set(blocks))
    return {id(p) for module in rest for p in module.parameters(recurse=False)}


def _modules_outside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules that can be reached without passing through a block."""
    if module not in blocks:
        yield module
        for child in module.children():
            yield from _modules_outside(child, blocks)


def _check_alike(
    names: Sequence[str], slots: Sequence[dict[str, Slot]], kinds: Sequence[int]
) -> None:
    """What the rest of the model uses is not shared: it has to be the same of each layer."""
    for layer, kind in enumerate(kinds):
        if odd := slots[layer].keys() ^ slots[kind].keys():
            name = min(odd)
            its = names[layer if name in slots[kind] else kind]
            raise InputError(
                f"{its}.{name} is used elsewhere in the model as well, and that of other layers is "
                f"not: leave it out with untied=[{name!r}], or remove its second name"
            )


def _slots(block: nn.Module, untied: Sequence[str], outside: set[int]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    named = dict(block.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        is_own = _is_untied(name, untied) or is_mixture(name, named)
        if not is_own and id(parameter) not in outside:
            path, _, attribute = name.rpartition(".")
            slots[name] = (block.get_submodule(path), attribute)
    return slots
