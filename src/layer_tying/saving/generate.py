"""Text from a run or an export, by transformers' own ``generate`` with its KV cache.

Each layer has a module, an index and a place in the cache of its own, so shared weights need no
special care: cached and uncached decoding agree.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.data.sources import is_encodable
from layer_tying.errors import InputError
from layer_tying.models.build import context_of
from layer_tying.saving.export_run import check_tokenizer, tokenizer_of
from layer_tying.saving.load import load

COLDEST = 1e-6  # a temperature, below which logits overflow
USUAL_LENGTH = 100  # new tokens, where none are asked for and the context has room


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Go on from a prompt with a run's best weights, or with a compact export.

    Args:
        folder: the run folder, or the export with its tokenizer.
        prompt: the text to go on from; where it is empty, a new document is begun.
        max_new_tokens: the most tokens to add; by default 100, or as many as the context allows.
        temperature: 1 samples from the model's distribution, less sharpens it, 0 takes the most
            likely token.
        top_k: sample among so many of the most likely tokens only.
        seed: of the samples.

    Returns:
        The new text, without the prompt.

    Raises:
        InputError: if the model is not one that goes on from a text, its outputs are not finite, or
            the context is too short.
    """
    sampling = _sampling(temperature, top_k)
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is at least 0 and less than 2^63, got {seed}")
    if not is_encodable(prompt):
        raise InputError(f"the prompt is not UTF-8: {prompt!r}")
    tokenizer = tokenizer_of(folder)
    model = load(folder)
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise InputError(f"{folder} holds a {type(model).__name__}, which does not generate text")
    ids = tokenizer.encode(prompt).tolist()
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]  # what stands between two documents
    check_tokenizer(tokenizer, model, folder)
    length = _new_tokens(len(ids), max_new_tokens, context_of(model))
    model.generation_config = _tokens_only(model.generation_config)
    model = model.to(Accelerator().device)  # type: ignore[arg-type]
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        if not model(inputs).logits[:, -1].isfinite().all():
            raise InputError(f"{folder}: the model's outputs are not finite, as of a diverged run")
    torch.manual_seed(seed)
    output: torch.Tensor = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=length,
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
        **sampling,
    )
    TiedLayers(model).verify()
    text = tokenizer.decode(output[0].tolist())
    return text[len(tokenizer.decode(ids)) :]  # the new tokens alone may lose a space before them


def _sampling(temperature: float, top_k: int | None) -> dict[str, Any]:
    """How the next token is chosen, as transformers' ``generate`` takes it."""
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise InputError(f"temperature is 0 or at least {COLDEST:g}, got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top-k is at least 1, got {top_k}")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}


def _tokens_only(config: GenerationConfig) -> GenerationConfig:
    """Which tokens begin and end a text, and nothing of how a checkpoint is usually sampled."""
    settings = config.to_dict().items()
    return GenerationConfig(**{name: each for name, each in settings if name.endswith("_token_id")})


def _new_tokens(num_prompt: int, asked: int | None, context: float) -> int:
    """How many tokens to add, within the context."""
    if num_prompt < 1:
        raise InputError("the prompt is empty, and the tokenizer has no end-of-text to start from")
    room = context - num_prompt
    if room < 1:
        raise InputError(
            f"the prompt has {num_prompt} tokens and the model's context {context}: shorten it by "
            f"{1 - room}, so that there is room for a new one"
        )
    if asked is None:
        return int(min(USUAL_LENGTH, room))
    if asked < 1:
        raise InputError(f"max-new-tokens is at least 1, got {asked}")
    if asked > room:
        raise InputError(
            f"{num_prompt} tokens of the prompt and {asked} new ones do not fit the model's "
            f"context of {context}: ask for at most {room} new tokens"
        )
    return asked
