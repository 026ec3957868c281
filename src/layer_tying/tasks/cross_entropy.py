"""The loss of a language model without its logits: a few positions at a time.

The logits of all positions, [positions, vocabulary], are the largest tensor of a training step: in
float32, with their gradient, 0.4 GB for 1,024 positions of GPT-2's vocabulary. They are needed only
for sums over them, so the head, the loss and the loss's gradient are computed for one chunk of
positions after the other, all in the forward pass; nothing is computed twice. The gradients of the
hidden states and of the head's weights are exact. (Liger Kernel and Apple's Cut Cross-Entropy do
this on GPUs.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from layer_tying.data.batches import IGNORED
from layer_tying.models.families import FAMILIES, Family
from layer_tying.tasks.evaluation import cross_entropy

CHUNK = 2**23  # logits computed at a time: 32 MiB in float32


def language_model_loss(model: PreTrainedModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean nats per predicted token: what ``cross_entropy(model(inputs).logits, labels)`` gives.

    Args:
        model: with its language model's head. Of a family in ``FAMILIES`` the logits are never in
            memory at once; of others, which may do more after the head, they are.
        inputs, labels: [B, T] token ids, already shifted; label -100 is not predicted.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return cross_entropy(model(input_ids=inputs).logits, labels)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    pending: list[Tensor] | None = None
    if embedding.weight is head.weight and head.weight.requires_grad and torch.is_grad_enabled():
        pending = []
        embedded = _Lookup.apply(inputs, embedding.weight, embedding.padding_idx, pending)
        hidden = _read_by_head(model, family, inputs_embeds=embedded)
    else:
        hidden = _read_by_head(model, family, input_ids=inputs)
    return chunked_cross_entropy(hidden, head, labels, pending)


def predicted_logits(model: PreTrainedModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """The logits [N, vocabulary] of the N positions whose label is not ignored, in their order.

    Of a family in ``FAMILIES`` no others are computed. The arguments are those of
    ``language_model_loss``.
    """
    predicted = labels != IGNORED
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return model(input_ids=inputs).logits[predicted]
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head(_read_by_head(model, family, input_ids=inputs)[predicted])


def _read_by_head(model: PreTrainedModel, family: Family, **inputs: Tensor) -> Tensor:
    """The hidden states [B, T, width] that the head of a language model reads."""
    hidden = model.base_model(**inputs).last_hidden_state
    return model.get_submodule(family.head_transform)(hidden) if family.head_transform else hidden


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, pending: list[Tensor] | None = None
) -> Tensor:
    """Mean negative log-likelihood in nats of labels under ``softmax(head(hidden))``.

    What autocast is set to holds for the matrix products; the softmax is in float32, or in float64
    where the hidden states are.

    Args:
        hidden: [..., width] the last hidden states.
        head: from width to the vocabulary, with or without a bias.
        labels: [...] token ids; -100 is ignored, and no logits are computed for it.
        pending: where the gradient of the head's weight is left, for whoever adds to it and hands
            it on; None: it goes to the weight.
    """
    predicted = labels != IGNORED
    weight = head.weight if pending is None else head.weight.detach()
    tensors = [hidden[predicted], weight, head.bias]
    if not torch.is_grad_enabled():
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
        pending = None
    loss = _ChunkedCrossEntropy.apply(*tensors, labels[predicted], pending)
    return loss  # type: ignore[return-value]


class _Lookup(torch.autograd.Function):
    """An embedding whose weights are those of the head too: their two gradients are made as one.

    Left to itself autograd makes a second gradient of [vocabulary, width], nearly all zeros, at the
    very moment when the gradients of all layers are there, and adds it to the head's.
    """

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, pending: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.pending = padding_idx, pending
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the decorator makes its argument nameless
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        total = ctx.pending.pop()  # the head comes after the embedding, so its gradient is there
        rows = grad_outputs[0].to(total.dtype)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        total.index_put_((ids,), rows, accumulate=True)  # deterministic, also on GPUs
        return None, total, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Hidden states [N, d], weight [V, d], bias [V] and labels [N], none ignored, to a scalar."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, weight, bias, labels, ctx.pending = arguments
        is_wanted = list(ctx.needs_input_grad[:3])
        is_wanted[1] |= ctx.pending is not None
        ctx.gradients = gradients = [
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), is_wanted, strict=True)
        ]
        to_hidden, *to_head = gradients
        dtype = _dtype_of_products(hidden)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            head = [None if t is None else t.to(dtype) for t in (weight, bias)]
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                here = [None if to_hidden is None else to_hidden[chunk], *to_head]
                total += _chunk_loss(hidden[chunk], labels[chunk], head, here, 1 / len(labels))
        return total / len(labels)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the decorator makes its argument nameless
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # autograd may add to them in place
        if gradients is None:
            raise RuntimeError("the gradient of chunked_cross_entropy can be taken only once")
        hidden, weight, bias = (None if g is None else g.mul_(grad_outputs[0]) for g in gradients)
        if ctx.pending is not None:
            ctx.pending.append(weight)
            weight = None
        return hidden, weight, bias, None, None


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    """Autocast's, where it is on and would cast."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else hidden.dtype


def _chunk_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    scale: float,
) -> Tensor:
    """The summed loss of a chunk. Adds its gradient, scaled; its logits end with this call."""
    weight, bias = head
    assert weight is not None
    hidden = hidden.to(weight.dtype)
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = _softmax_loss(logits, labels)  # of the logits it leaves their gradient
    to_logits = logits.mul_(scale).to(weight.dtype)
    to_hidden, to_weight, to_bias = gradients
    if to_hidden is not None:
        to_hidden += to_logits @ weight
    if to_weight is not None:
        _add_product(to_weight, to_logits, hidden)
    if to_bias is not None:
        to_bias += to_logits.sum(0)
    return loss


def _softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of logits [N, V], which it overwrites with its gradient."""
    logits -= logits.amax(1, keepdim=True)
    of_labels = logits.gather(1, labels[:, None])
    norm = logits.exp_().sum(1, keepdim=True)
    logits.div_(norm).scatter_add_(1, labels[:, None], torch.full_like(of_labels, -1))
    return (norm.log() - of_labels).sum()


def _add_product(total: Tensor, to_logits: Tensor, hidden: Tensor) -> None:
    """Add ``to_logits.T @ hidden`` to a tensor [V, d], without another of its size."""
    if total.dtype == hidden.dtype:
        total.addmm_(to_logits.T, hidden)
        return
    rows = max(1, CHUNK // hidden.shape[1])
    for start in range(0, len(total), rows):
        chunk = slice(start, start + rows)
        total[chunk] += to_logits[:, chunk].T @ hidden
