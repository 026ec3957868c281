"""Healing: a tied model is trained to do what the untouched one did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layer_tying.compression.closed_form import start_from_closed_form
from layer_tying.compression.grouping import Reading
from layer_tying.compression.outcome import OutcomeOf, divergence
from layer_tying.compression.settings import HealingSettings
from layer_tying.core.find import MIXTURE
from layer_tying.core.mixtures import FACTOR_KEY
from layer_tying.core.parts import stack_of
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.errors import InputError
from layer_tying.runs.config import OptimizationConfig
from layer_tying.runs.optimization import adamw, learning_rate


def tie_as(layers: TiedLayers, reading: Reading) -> None:
    """Tie layers so that each reads what a reading says, from the weights in use now.

    The first layer of a group becomes its owner and takes over the weights of the group's source.
    """
    tying = Tying.from_labels(reading)
    with torch.no_grad():
        for owner in tying.independent_layers:
            if layers.tying.owners[reading[owner]] != layers.tying.owners[owner]:
                taken = layers.parameters(reading[owner])
                for name, parameter in layers.parameters(owner).items():
                    parameter.copy_(taken[name])
                layers.drop_optimizer_state([owner])
    layers.apply(tying)


def stages(reading: Reading) -> list[Reading]:
    """A reading reached by one group after another, the group of the last layer first."""
    found = []
    now = tuple(range(len(reading)))
    for source in dict.fromkeys(reversed(reading)):
        now = tuple(source if reading[layer] == source else old for layer, old in enumerate(now))
        found.append(now)
    return found


@dataclass(frozen=True)
class Progress:
    """What one step of healing minimised.

    Attributes:
        divergence: of the student's outputs from the teacher's, in nats.
        loss: on the labels, in nats; None without labels.
    """

    divergence: Tensor
    loss: Tensor | None


class Healing:
    """A student that is trained to give its teacher's outputs, step by step.

    Args:
        teacher: the untouched model; it is used in eval mode and does not change.
        student: a copy of it, whose layers are independent; it is tied here, and trained in
            float32.
        reading: what the student's layers read in the end.
        optimization: the number of steps (``max_steps``), the learning rate and the like.
        settings: of the sharing and the loss.
        outcome_of: what a model makes of a batch.
        options: of ``TiedLayers``.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        reading: Reading,
        optimization: OptimizationConfig,
        settings: HealingSettings,
        *,
        outcome_of: OutcomeOf,
        **options: Any,
    ) -> None:
        assert optimization.max_steps is not None
        self.teacher = teacher.eval()
        self._types = {name: p.dtype for name, p in _tensors(student)}
        self.student = student.float().train()  # in half precision small changes would be lost
        if not any(p.requires_grad for p in student.parameters()):  # it was frozen, for inference
            student.requires_grad_(True)
        self.optimization = optimization
        self.settings = settings
        self.num_steps: int = optimization.max_steps
        self.step = 0
        self._divergence = torch.zeros(())  # of the newest step
        self.optimizer = adamw(student, optimization)
        self.layers = TiedLayers(student, self.optimizer, **options)
        self._blocks = [teacher.get_submodule(name) for name in self.layers.stack.names]
        self._outcome_of = outcome_of
        self._stages = stages(reading) if settings.gradual else [reading]
        self._tie_what_is_due()

    def start_from(self, batches: Sequence[Any]) -> None:
        """Set what mixtures start from, where that is to be computed on some batches."""
        if self.settings.start == "closed-form":
            stack = stack_of(self.teacher, self.layers.settings)
            start_from_closed_form(self.layers, stack, batches, self._outcome_of)

    def train_step(self, batch: Any) -> Progress:
        """One optimizer step on a batch."""
        self._tie_what_is_due()
        rate = learning_rate(self.optimization, self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(FACTOR_KEY, 1.0)
        total, progress = self._objective(batch)
        total.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.optimization.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._divergence = progress.divergence
        return progress

    def check(self) -> None:
        """Raise an InputError if the newest divergence is infinite or not a number."""
        if not math.isfinite(apart := float(self._divergence)):
            raise InputError(
                f"the divergence is {apart} after {self.step} steps of healing: take a smaller lr "
                f"than {self.optimization.lr:g}"
            )

    def finished(self) -> nn.Module:
        """The student in eval mode, its weights in the types that it came with.

        Raises:
            InputError: if its training diverged.
        """
        self.check()
        for name, tensor in _tensors(self.student):
            known = name if name in self._types else name.removesuffix(MIXTURE)
            tensor.data = tensor.data.to(self._types[known])
        return self.student.eval()

    def _objective(self, batch: Any) -> tuple[Tensor, Progress]:
        device = next(self.student.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.optimization.precision == "bf16"):
            with torch.no_grad(), _outputs_of(self._blocks) as theirs:
                wanted = self._outcome_of(self.teacher, batch)
            with _outputs_of(self.layers.stack.blocks) as ours:
                found = self._outcome_of(self.student, batch)
        apart = divergence(found.logits, wanted.logits, self.settings.temperature)
        share = 0.0 if found.loss is None else self.settings.loss_weight
        total = (1 - share) * apart
        if found.loss is not None:
            total = total + share * found.loss
        if self.settings.hidden_weight:
            total = total + self.settings.hidden_weight * _distance(ours, theirs)
        return total, Progress(apart.detach(), None if found.loss is None else found.loss.detach())

    def _tie_what_is_due(self) -> None:
        """The tying of this step; the last one, from which mixtures start, from half way on."""
        last = len(self._stages) - 1
        due = self._stages[min(last, 2 * self.step * len(self._stages) // self.num_steps)]
        if self.layers.mixtures is None and self.layers.tying != Tying.from_labels(due):
            tie_as(self.layers, due)
        if due == self._stages[last] and self.settings.sharing == "mixture":
            self.layers.mix()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def _outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What layers return while the context lasts (of a tuple, its first element)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _distance(hidden: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over layers of the squared distance, relative to the squared size of the target."""
    each = [
        (one.float() - other.float()).pow(2).mean() / other.float().pow(2).mean()
        for one, other in zip(hidden, wanted, strict=True)
    ]
    return torch.stack(each).mean()
