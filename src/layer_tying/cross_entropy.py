"""The loss of a language model without its logits: a few positions at a time.

The logits of all positions, [positions, vocabulary], are the largest tensor of a training step: in
float32, with their gradient, 0.4 GB for 1,024 positions of GPT-2's vocabulary. They are needed only
for sums over them, so the head, the loss and the loss's gradient are computed for one chunk of
positions after the other, all in the forward pass; nothing is computed twice. The gradients of the
hidden states and of the head's weights are exact. (Liger Kernel and Apple's Cut Cross-Entropy do
this on GPUs.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

IGNORED = -100  # the label of a position that is not predicted, as in torch and transformers
CHUNK = 2**23  # logits computed at a time: 32 MiB in float32


def language_model_loss(model: PreTrainedModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean nats per predicted token: what ``cross_entropy(model(inputs).logits, labels)`` gives.

    Args:
        model: a GPT-2, Llama or BERT of transformers with a language model's head.
        inputs, labels: [B, T] token ids, already shifted; label -100 is not predicted.
    """
    hidden = model.base_model(input_ids=inputs).last_hidden_state
    if model.config.model_type == "bert":
        hidden = model.get_submodule("cls.predictions.transform")(hidden)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return chunked_cross_entropy(hidden, head, labels)


def chunked_cross_entropy(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of labels under ``softmax(head(hidden))``.

    What autocast is set to holds for the matrix products; the softmax is in float32, or in float64
    where the hidden states are.

    Args:
        hidden: [..., width] the last hidden states.
        head: from width to the vocabulary, with or without a bias.
        labels: [...] token ids; -100 is ignored, and no logits are computed for it.
    """
    predicted = labels != IGNORED
    return _ChunkedCrossEntropy.apply(  # type: ignore[return-value]
        hidden[predicted], head.weight, head.bias, labels[predicted]
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Hidden states [N, d], weight [V, d], bias [V] and labels [N], none ignored, to a scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        to_hidden, to_weight, to_bias = ctx.gradients = [
            torch.zeros_like(tensor) if is_wanted and tensor is not None else None
            for tensor, is_wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        dtype = _dtype_of_products(hidden)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                here = hidden[chunk].to(dtype)
                logits = nn.functional.linear(here, matrix, offset).to(total.dtype)
                loss, to_logits = _softmax_loss(logits, labels[chunk])
                total += loss
                to_logits = to_logits.div_(len(labels)).to(dtype)
                if to_hidden is not None:
                    to_hidden[chunk] = to_logits @ matrix
                if to_weight is not None:
                    _add_product(to_weight, to_logits, here)
                if to_bias is not None:
                    to_bias += to_logits.sum(0)
        return total / len(labels)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the decorator makes its argument nameless
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # autograd may add to them in place
        if gradients is None:
            raise RuntimeError("the gradient of chunked_cross_entropy can be taken only once")
        return *(None if g is None else g.mul_(grad_outputs[0]) for g in gradients), None


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    """Autocast's, where it is on and would cast."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else hidden.dtype


def _softmax_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient with respect to the logits [N, V], which it overwrites."""
    logits -= logits.amax(1, keepdim=True)
    of_labels = logits.gather(1, labels[:, None])
    norm = logits.exp_().sum(1, keepdim=True)
    loss = (norm.log() - of_labels).sum()
    to_logits = logits.div_(norm)
    to_logits.scatter_add_(1, labels[:, None], torch.full_like(of_labels, -1))
    return loss, to_logits


def _add_product(total: Tensor, to_logits: Tensor, hidden: Tensor) -> None:
    """Add ``to_logits.T @ hidden`` to a tensor [V, d], without another of its size."""
    if total.dtype == hidden.dtype:
        total.addmm_(to_logits.T, hidden)
        return
    rows = max(1, CHUNK // hidden.shape[1])
    for start in range(0, len(total), rows):
        chunk = slice(start, start + rows)
        total[chunk] += to_logits[:, chunk].T @ hidden
