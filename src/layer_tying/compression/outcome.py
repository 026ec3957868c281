"""What a model makes of a batch, and how far one model's outputs are from another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layer_tying.errors import InputError


class Outcome(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        logits: [N, C] of all that is predicted.
        loss: the mean loss of the batch's labels, in nats; None without labels.
    """

    logits: Tensor
    loss: Tensor | None = None


OutcomeOf = Callable[[nn.Module, Any], Outcome]


def outcome_of(model: nn.Module, batch: Any) -> Outcome:
    """The outcome of a model of transformers, or of any module that returns logits.

    Args:
        model: it is called with the batch.
        batch: a mapping of keyword arguments (``input_ids``, ``labels``, ...), or a tensor. Rows
            where ``attention_mask`` is 0 do not count.

    Raises:
        InputError: if the model returns no logits.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        batch = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        output = model(**batch)
    elif isinstance(batch, Tensor):
        batch, output = {}, model(batch.to(device))
    else:
        raise InputError(
            f"a batch is a mapping of keyword arguments or a tensor, got a "
            f"{type(batch).__name__}: pass outcome_of=... for others"
        )
    found = output if isinstance(output, Mapping) else {"logits": output}
    logits = found.get("logits")
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{type(model).__name__} returns a {type(output).__name__} without logits: take a "
            f"model with a head, or pass outcome_of=..."
        )
    counts = _counts(model, batch, logits)
    flat = logits.flatten(0, -2)
    return Outcome(flat if counts is None else flat[counts], found.get("loss"))


def _counts(model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
    """Which rows of the logits are of real input and not of padding.

    ``attention_mask`` is of the logits' positions only where there is no encoder before them.
    """
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = batch.get("decoder_attention_mask" if has_encoder else "attention_mask")
    if mask is None or mask.shape != logits.shape[:-1]:
        return None
    return mask.flatten().bool()


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean Kullback-Leibler divergence of a student's distribution from its teacher's, in nats.

    With a temperature T both are softened, and the result is multiplied by T^2, so that gradients
    keep their size (Hinton, Vinyals and Dean 2015).

    Args:
        logits: [N, C] the student's.
        teacher: [N, C].
        temperature: T.
    """
    student = torch.log_softmax(logits.float() / temperature, -1)
    target = torch.log_softmax(teacher.float() / temperature, -1)
    total = nn.functional.kl_div(student, target, reduction="batchmean", log_target=True)
    return total * temperature**2
