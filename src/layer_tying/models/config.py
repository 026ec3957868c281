"""The shape of a model, as settings. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from layer_tying.errors import InputError
from layer_tying.models.families import FAMILIES
from layer_tying.settings import (
    check_at_least,
    check_finite,
    check_positive,
    check_shares,
    check_types,
)

if TYPE_CHECKING:
    FamilyName = str
else:  # so that the command lists the names
    FamilyName = Literal[tuple(FAMILIES)]


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    Raises:
        InputError: if a value is out of its range, or two values contradict each other.
    """

    family: FamilyName = "gpt2"
    """the kind of transformer"""
    nlayers: int = 8
    """L, the number of layers"""
    nhead: int = 4
    """attention heads"""
    emsize: int = 128
    """width of the model"""
    dropout: float = 0.0
    """dropout probability"""
    init_std: float = 0.02
    """standard deviation of the initial weights"""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, ("nhead", "emsize"))
        check_at_least(self, 2, ("nlayers",))
        check_shares(self, ("dropout",))
        check_positive(self, ("init_std",))
        check_finite(self, ("init_std",))
        if self.emsize % self.nhead:
            raise InputError(f"emsize {self.emsize} is not divisible by nhead {self.nhead}")
        multiple = FAMILIES[self.family].head_width_multiple
        if self.emsize // self.nhead % multiple:
            raise InputError(
                f"emsize {self.emsize} over nhead {self.nhead} is {self.emsize // self.nhead}: the "
                f"width of a head of family {self.family} is a multiple of {multiple}"
            )
