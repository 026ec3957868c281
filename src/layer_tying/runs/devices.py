"""The device of a run, and the other processes where a launcher started several."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator

from layer_tying.core import distributed
from layer_tying.errors import InputError


def make_accelerator(**options: Any) -> Accelerator:
    """The device, and the other processes where a launcher started several.

    Raises:
        InputError: if several were launched and accelerate does not join them.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != distributed.world_size():
        raise InputError(
            f"{launched} processes were launched, but accelerate joins none of them on "
            f"{accelerator.device.type}: launch one, or add --cpu to accelerate launch"
        )
    return accelerator


def check_shares(batch_size: int) -> None:
    """Raise an InputError if a batch cannot be dealt out to the processes there are."""
    if batch_size % distributed.world_size():
        raise InputError(
            f"batch_size {batch_size} is that of all processes together, and not divisible "
            f"by the {distributed.world_size()} there are"
        )
