"""The arithmetic that a run is trained in: a rule says which, and the model is run in it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

NOT_WITH_BF16 = (torch.float16, torch.float64)
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # of CPUs, as torch calls them


def usual_precision(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What ``--precision auto`` stands for: ``bf16`` where the device computes in it.

    A CPU without instructions for bfloat16 emulates it, slower than single precision. Weights in
    float16 and float64 do not go with it: some operations take no mixture of the two.
    """
    if dtype in NOT_WITH_BF16:
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if _cpu_computes_in_bf16() else "fp32"
    return "fp32"


def _cpu_computes_in_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return torch.cpu._is_avx512_bf16_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)


def autocast(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.autocast:
    """The context in which the model runs: bfloat16 where the precision says so.

    Not with weights in float16 or float64 (see ``usual_precision``).
    """
    is_on = precision == "bf16" and dtype not in NOT_WITH_BF16
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


SHORT_SEQUENCE = 256
"""Tokens up to which PyTorch's fused attention in bf16 is slower on CPUs than matrix products: 9
against 1.8 ms forward and backward at 128 tokens, 7.9 against 3.3 at 256, equal at 512."""


def choose_attention(model: PreTrainedModel, precision: str, num_tokens: int) -> None:
    """Let the model attend by the kernel that is faster for its device and sequence length."""
    is_short = num_tokens <= SHORT_SEQUENCE
    if model.device.type == "cpu" and precision == "bf16" and is_short:
        model.set_attn_implementation("eager")
