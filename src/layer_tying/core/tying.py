"""The algebra of tying: which layer uses whose weights. Standard library only.

A *tying* of L layers is a tuple of owners: ``owners[i]`` is the lowest-index layer whose weights
layer i uses, so ``owners[i] == i`` says that layer i is independent. Every tie is resolved to its
root, hence a tying is a set partition of the layers in canonical form and there are Bell(L) of
them. An *action* names, for each layer i, a layer ``a[i] <= i`` whose weights it is to use; Eq. 1
of the paper (David-Hay and Wolf, ICLR 2024) turns it into the next tying::

    s'[0] = 0;   s'[i] = i  where a[i] == i,  else  s'[a[i]]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index

from layer_tying.errors import InputError


@dataclass(frozen=True)
class Tying:
    """A pattern of shared layers, in canonical form.

    Attributes:
        owners: for each layer the lowest-index layer whose weights it uses.

    Raises:
        InputError: if the owners are not in canonical form.
    """

    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            owners = tuple(index(owner) for owner in self.owners)
        except TypeError:
            raise InputError(f"owners are layers, whole numbers: got {self.owners!r}") from None
        object.__setattr__(self, "owners", owners)  # frozen; a list or numpy's integers will do
        if not self.owners:
            raise InputError("a tying needs at least one layer, got none")
        for layer, owner in enumerate(self.owners):
            if not 0 <= owner <= layer or self.owners[owner] != owner:
                raise InputError(
                    f"owners {list(self.owners)} are not canonical: layer {layer} names {owner}, "
                    f"which is not an independent layer at or before it"
                )

    @classmethod
    def independent(cls, num_layers: int) -> Tying:
        """Every layer has weights of its own: conventional training."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def all_tied(cls, num_layers: int) -> Tying:
        """Every layer uses the weights of layer 0: the paper's start, and ALBERT's pattern."""
        return cls((0,) * num_layers)

    @classmethod
    def from_action(cls, action: Sequence[int]) -> Tying:
        """The next state of an action (Eq. 1): each tie is followed to its root.

        Raises:
            InputError: if a layer names one after itself, or a negative one.
        """
        owners: list[int] = []
        for layer, choice in enumerate(action):
            if not 0 <= choice <= layer:
                raise InputError(
                    f"layer {layer} cannot use the weights of layer {choice}: "
                    f"an action names a layer from 0 to {layer} there"
                )
            owners.append(layer if choice == layer else owners[choice])
        return cls(tuple(owners))

    @classmethod
    def from_labels(cls, labels: Iterable[object]) -> Tying:
        """Layers with equal labels share weights: ``"abba"`` is owners 0, 1, 1, 0."""
        first: dict[object, int] = {}
        return cls(tuple(first.setdefault(label, i) for i, label in enumerate(labels)))

    def permuted(self, places: Sequence[int]) -> Tying:
        """The same partition after layer i has moved to ``places[i]``."""
        labels = dict(zip(places, self.owners, strict=True))
        return Tying.from_labels(labels[place] for place in range(self.num_layers))

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.owners)

    @property
    def independent_layers(self) -> tuple[int, ...]:
        """The layers that own their weights, in order."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == i)

    @property
    def num_independent(self) -> int:
        """How many distinct sets of weights there are."""
        return len(self.independent_layers)

    @property
    def groups(self) -> dict[int, tuple[int, ...]]:
        """Each owner with the layers that use its weights, itself included."""
        members: dict[int, list[int]] = {}
        for layer, owner in enumerate(self.owners):
            members.setdefault(owner, []).append(layer)
        return {owner: tuple(layers) for owner, layers in members.items()}

    def __str__(self) -> str:
        return " ".join(map(str, self.owners))


@dataclass(frozen=True)
class Rules:
    """Which tyings are allowed: what can be shared at all, and how many layers may be independent.

    Attributes:
        kinds: for each layer the first layer that it could share weights with (itself, if none).
            Layers of different kinds (other shapes, other attention) are never tied.
        max_independent: the most independent layers a tying may have.

    Raises:
        InputError: if the budget is smaller than the number of kinds.
    """

    kinds: tuple[int, ...]
    max_independent: int

    def __post_init__(self) -> None:
        if self.max_independent < len(set(self.kinds)):
            raise InputError(
                f"a budget of {self.max_independent} independent layers is too small: "
                f"the model has {len(set(self.kinds))} kinds of layer, and each needs one"
            )

    @classmethod
    def free(cls, num_layers: int) -> Rules:
        """Any layer may use any earlier layer's weights, and all may be independent."""
        return cls((0,) * num_layers, num_layers)

    @property
    def tightest(self) -> Tying:
        """The tying with the fewest independent layers: one for each kind."""
        return Tying.from_labels(self.kinds)

    def choices(self, layer: int) -> tuple[int, ...]:
        """The layers whose weights a layer may use: itself and the earlier ones of its kind."""
        return tuple(j for j in range(layer + 1) if self.kinds[j] == self.kinds[layer])

    def check(self, tying: Tying) -> None:
        """Raise an InputError that says what is wrong, if the tying is not allowed."""
        if tying.num_layers != len(self.kinds):
            raise InputError(
                f"a tying of {tying.num_layers} layers does not fit a model of {len(self.kinds)}"
            )
        for layer, owner in enumerate(tying.owners):
            if self.kinds[layer] != self.kinds[owner]:
                raise InputError(
                    f"layer {layer} cannot use the weights of layer {owner}: they are not alike"
                )
        if tying.num_independent > self.max_independent:
            raise InputError(
                f"{tying.num_independent} independent layers are over "
                f"the budget of {self.max_independent}"
            )


def storage_sources(old: Tying, new: Tying) -> dict[int, tuple[int, bool]]:
    """Where each independent layer of ``new`` finds its weights in the storage of ``old``.

    A group of layers goes on with the weights that its first layer used, as in the paper.
    Of all the new owners that come from one old storage, one takes it over as it is (the old owner
    itself where it stays independent, else the lowest) and the others copy it, so nothing is copied
    that could be kept.

    Args:
        old: the tying in force.
        new: the one to come.

    Returns:
        For each independent layer of ``new``: the old owner, and whether a copy is needed.
    """
    wanted = {owner: old.owners[owner] for owner in new.independent_layers}
    sources: dict[int, tuple[int, bool]] = {}
    taken: set[int] = set()
    for layer in sorted(wanted, key=lambda i: (wanted[i] != i, i)):
        sources[layer] = (wanted[layer], wanted[layer] in taken)
        taken.add(wanted[layer])
    return dict(sorted(sources.items()))
